// The engine as the events of /v1/engine/events tell it: now, and since this page was opened.

import { events } from "./api.js";

const MAX_REQUESTS = 200; // that have ended and are still remembered
const MAX_STEPS = 2000;
const MAX_DECODES = 8192; // per request
const WINDOW_S = 60;

/** One sequence: where it is, and everything that has happened to it. */
class Request {
  constructor(told) {
    this.waits = []; // {from, to, cause}: by what was seen, a few times a second
    this.chunks = []; // {step, from, to, start, tokens}
    this.decodes = []; // {step, from, to}
    this.preemptedAt = [];
    this.table = [];
    this.end = null;
    this.take(told);
  }

  take(told) {
    Object.assign(this, {
      uid: told.uid,
      id: told.request_id ?? this.id ?? null,
      state: told.state,
      cause: told.cause,
      queuedAt: told.queued_at,
      startedAt: told.started_at,
      ttft: told.ttft_s,
      prompt: told.num_prompt_tokens,
      tokens: told.num_tokens,
      computed: told.num_computed,
      cached: told.num_cached_tokens,
      preemptions: told.num_preemptions,
    });
  }

  /** Lengthen the present wait up to `now`, or begin one. */
  wait(now) {
    const last = this.waits.at(-1);
    const from = last ? Math.max(last.to, this.lastRanAt) : this.queuedAt;
    if (last && last.cause === this.cause && last.to >= this.lastRanAt) last.to = now;
    else this.waits.push({ from: Math.max(from, this.lastRanAt), to: now, cause: this.cause });
  }

  /** It runs again: whatever it waited for last, it waited until now. */
  run(chunk) {
    const last = this.waits.at(-1);
    if (last && last.to >= this.lastRanAt) last.to = Math.max(last.to, chunk.from);
    this.chunks.push(chunk);
  }

  get lastRanAt() {
    return Math.max(this.queuedAt, this.chunks.at(-1)?.to ?? 0, this.decodes.at(-1)?.to ?? 0);
  }
}

/** One that began and ended between two looks. */
function brief(end) {
  return new Request({
    uid: end.uid,
    request_id: end.request_id,
    state: "running",
    cause: "",
    queued_at: end.queued_at,
    started_at: end.queued_at + end.queued_ms / 1000,
    ttft_s: 0,
    num_prompt_tokens: end.num_prompt_tokens,
    num_tokens: end.num_tokens,
    num_computed: end.num_tokens,
    num_cached_tokens: end.num_cached_tokens,
    num_preemptions: end.num_preemptions,
  });
}

export class Store extends EventTarget {
  layout = null;
  counters = null;
  now = 0;
  cells = new Uint16Array(0);
  changedAt = new Float64Array(0);
  requests = new Map(); // uid → Request, unfinished ones and the last that ended
  steps = [];
  holders = new Map(); // block → uids
  pace = { is_allowed: false, is_held: false, interval_ms: 0 };
  numHidden = 0;
  numLost = 0;
  series = { tokens: [], ttft: [], interToken: [], hitRate: [] }; // [time, value]
  #batches = new Map();
  #history = []; // counters by time
  #live = new Set();

  /** Listen while the page can be seen. `onState` is told how it goes, in a word and a text. */
  async follow(onState) {
    let stopped = false;
    while (!stopped) {
      if (document.hidden) {
        await new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
        continue;
      }
      const controller = new AbortController();
      const leave = () => document.hidden && controller.abort();
      document.addEventListener("visibilitychange", leave);
      let waitS = 1;
      const onComment = (text) => text.startsWith("loading") && onState("loading", text);
      try {
        for await (const event of events("v1/engine/events", { signal: controller.signal, onComment })) {
          this.apply(event);
          onState("ready", "");
        }
        onState("away", "the server has ended the stream");
      } catch (error) {
        if (error.status === 403) {
          onState("refused", error.message);
          stopped = true;
        } else if (error.status === 401) {
          onState("locked", "an API key is needed");
          await new Promise((go) => document.addEventListener("key-given", go, { once: true }));
          waitS = 0;
        } else if (error.name !== "AbortError") {
          onState(error.code === "loading" ? "loading" : "away", error.message);
          waitS = Math.min(error.retryAfter ?? 1, 5);
        }
      } finally {
        document.removeEventListener("visibilitychange", leave);
      }
      if (!stopped) await new Promise((go) => setTimeout(go, waitS * 1000));
    }
  }

  /** Resolves at the first change after which `isTrue` says so, or at once. */
  until(isTrue) {
    return new Promise((go) => {
      const look = () => {
        if (!isTrue()) return;
        this.removeEventListener("change", look);
        go();
      };
      this.addEventListener("change", look);
      look();
    });
  }

  /** What the server has answered; the next event tells the same. */
  setPace(pace) {
    this.pace = pace;
    this.dispatchEvent(new CustomEvent("change"));
  }

  /** Who ran in a step. */
  uidsOf(step) {
    return this.#batches.get(step.batch) ?? [];
  }

  get live() {
    return [...this.#live].map((uid) => this.requests.get(uid));
  }

  get blockSize() {
    return this.layout?.block_size ?? 16;
  }

  blockOf(cell) {
    const { num_dense: dense, stride } = this.layout;
    return cell < dense ? cell + 1 : dense + 1 + (cell - dense) * stride;
  }

  apply(event) {
    if (event.kind === "snapshot") this.#reset(event);
    this.now = event.now;
    this.pace = event.pace;
    this.numHidden = event.num_hidden;
    this.numLost += event.num_lost_steps;
    for (const [batch, uids] of Object.entries(event.batches)) this.#batches.set(Number(batch), uids);
    this.#applyCells(event.cells);
    for (const told of event.sequences) {
      const known = this.requests.get(told.uid);
      if (known) known.take(told);
      else this.requests.set(told.uid, new Request(told));
      this.#live.add(told.uid);
      if (told.ttft_s && !known?.ttftSeen) this.#sawFirstToken(told.uid, told.ttft_s * 1000);
    }
    for (const end of event.ended) if (!this.requests.has(end.uid)) this.requests.set(end.uid, brief(end));
    for (const [uid, tokens, computed] of event.progress) Object.assign(this.requests.get(uid) ?? {}, { tokens, computed });
    for (const [uid, index, blocks] of event.tables) this.requests.get(uid)?.table.splice(index, Infinity, ...blocks);
    for (const step of event.steps) this.#applyStep(step);
    for (const end of event.ended) this.#applyEnd(end);
    for (const uid of event.gone) this.#live.delete(uid);
    for (const uid of this.#live) {
      const request = this.requests.get(uid);
      if (request.state !== "running") request.wait(this.now);
    }
    if (event.tables.length || event.gone.length || event.kind === "snapshot") this.#indexHolders();
    this.#count(event.counters);
    this.#forget();
    this.dispatchEvent(new CustomEvent("change"));
  }

  #reset(event) {
    // A later snapshot in the same life of the core keeps what was seen; another life does not.
    const goesOn = this.layout && event.now >= this.now && event.counters.num_steps >= (this.counters?.num_steps ?? 0);
    this.layout = event.layout;
    this.cells = new Uint16Array(event.layout.num_cells);
    this.changedAt = new Float64Array(event.layout.num_cells);
    this.#live.clear();
    if (goesOn) {
      const last = this.steps.at(-1)?.step ?? -1;
      event.steps = event.steps.filter((step) => step.step > last);
      if (event.steps.length) this.numLost += event.steps[0].step - last - 1;
      for (const request of this.requests.values()) request.table = [];
    } else {
      this.requests.clear();
      this.steps = [];
      this.#batches.clear();
      this.#history = [];
      for (const points of Object.values(this.series)) points.length = 0;
    }
  }

  #applyCells(changes) {
    for (let i = 0; i < changes.length; i += 2) {
      this.cells[changes[i]] = changes[i + 1];
      this.changedAt[changes[i]] = this.now;
    }
  }

  #applyStep(step) {
    const before = this.steps.at(-1);
    this.steps.push(step);
    const uids = this.#batches.get(step.batch) ?? [];
    const chunked = new Set();
    for (const [uid, start, tokens] of step.chunks) {
      chunked.add(uid);
      this.requests.get(uid)?.run({ step: step.step, from: step.started_at, to: step.ended_at, start, tokens });
    }
    for (const uid of uids) {
      const decodes = this.requests.get(uid)?.decodes;
      if (decodes && !chunked.has(uid) && decodes.length < MAX_DECODES) {
        decodes.push({ step: step.step, from: step.started_at, to: step.ended_at });
      }
    }
    for (const uid of step.preempted) this.requests.get(uid)?.preemptedAt.push(step.started_at);
    if (step.num_decodes && before && step.ended_at - before.ended_at < 2) {
      this.series.interToken.push([step.ended_at, (step.ended_at - before.ended_at) * 1000]);
    }
  }

  #applyEnd(end) {
    const request = this.requests.get(end.uid);
    if (!request) return;
    request.end = end;
    request.id ??= end.request_id;
    request.tokens = end.num_tokens;
    request.state = "ended";
    if (end.ttft_ms !== null && !request.ttftSeen) this.#sawFirstToken(end.uid, end.ttft_ms);
  }

  #sawFirstToken(uid, ms) {
    const request = this.requests.get(uid);
    request.ttftSeen = true;
    request.ttft = ms / 1000;
    this.series.ttft.push([request.queuedAt + ms / 1000, ms]);
  }

  #indexHolders() {
    this.holders = new Map();
    for (const uid of this.#live) {
      for (const block of this.requests.get(uid).table) {
        const uids = this.holders.get(block);
        if (uids) uids.push(uid);
        else this.holders.set(block, [uid]);
      }
    }
  }

  /** Rates, from counters a second (tokens) and the window (hits) apart. */
  #count(counters) {
    this.counters = counters;
    this.#history.push([this.now, counters.num_generation_tokens, counters.prefix_cache_queries, counters.prefix_cache_hits]);
    const [, tokens, queries, hits] = this.#history.at(-1);
    const before = this.#history.findLast(([time]) => time <= this.now - 1) ?? this.#history[0];
    if (this.now - before[0] > 0.2) {
      this.series.tokens.push([this.now, (tokens - before[1]) / (this.now - before[0])]);
    }
    const [, , oldQueries, oldHits] = this.#history[0];
    if (queries > oldQueries) this.series.hitRate.push([this.now, (100 * (hits - oldHits)) / (queries - oldQueries)]);
    else if (this.series.hitRate.length) this.series.hitRate.push([this.now, this.series.hitRate.at(-1)[1]]);
  }

  #forget() {
    const since = this.now - WINDOW_S;
    const drop = (points) => {
      let count = 0;
      while (count < points.length && points[count][0] < since) count += 1;
      if (count) points.splice(0, count);
    };
    Object.values(this.series).forEach(drop);
    drop(this.#history);
    if (this.steps.length > MAX_STEPS) this.steps.splice(0, this.steps.length - MAX_STEPS);
    const oldest = this.steps[0]?.batch ?? 0;
    for (const batch of this.#batches.keys()) if (batch < oldest) this.#batches.delete(batch);
    const ended = [...this.requests.keys()].filter((uid) => !this.#live.has(uid));
    for (const uid of ended.slice(0, Math.max(0, ended.length - MAX_REQUESTS))) this.requests.delete(uid);
  }
}
