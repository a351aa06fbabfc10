// One request's life as a timeline, told in words as well, beside those of the others.

import { byId, colour, el, hueOf, legend, milliseconds, number, plural, prepared } from "./dom.js";
import { tag } from "./grid.js";
import { CAUSES } from "./plan.js";
import { chromeTrace, download } from "./trace.js";

const LANES = ["waits", "prefill", "decode"];
const LEFT = 62;
const LANE = 30;
const AXIS = 22;
const MAX_LISTED = 24;

export class Life {
  #store;
  #chosen = null; // uid; null: the latest
  #items = new Map();

  constructor(store) {
    this.#store = store;
    legend(byId("life-legend"), [
      ["seats", "waits for a seat"],
      ["budget", "for token budget"],
      ["kv", "for blocks"],
      ["other", "otherwise"],
      ["used", "chunk of its prompt"],
      ["decode", "decode step"],
    ]);
    byId("trace-button").addEventListener("click", () => this.#export());
  }

  choose(uid) {
    this.#chosen = uid;
    this.draw();
  }

  /** The request that an answer of this page came from, if it is known. */
  find(requestId) {
    return [...this.#store.requests.values()].find((request) => request.id === requestId);
  }

  get #request() {
    return this.#store.requests.get(this.#chosen) ?? [...this.#store.requests.values()].at(-1);
  }

  draw() {
    const request = this.#request;
    byId("trace-button").disabled = !request;
    byId("gantt-empty").hidden = Boolean(request);
    if (!request) {
      byId("life-sub").textContent = "of the next one, if this page is open then";
      return;
    }
    byId("life-title").replaceChildren("The life of ", tag(request.uid));
    byId("life-sub").textContent = request.id ?? "";
    this.#drawTimeline(request);
    byId("story").replaceChildren(...story(request).map(([at, text]) => el("li", {}, el("time", {}, milliseconds((at - request.queuedAt) * 1000)), text)));
    this.#drawList();
  }

  #drawTimeline(request) {
    const { context, width, height } = prepared(byId("timeline"), LANES.length * LANE + AXIS);
    const from = request.queuedAt;
    const to = Math.max(endOf(request, this.#store.now), from + 0.001);
    const x = (time) => LEFT + ((time - from) / (to - from)) * (width - LEFT - 8);
    axis(context, { from, to, x, height, width });
    context.font = "11px Inter, system-ui, sans-serif";
    context.textBaseline = "middle";
    LANES.forEach((name, i) => {
      context.fillStyle = colour("muted");
      context.textAlign = "left";
      context.fillText(name, 0, i * LANE + LANE / 2);
    });
    paint(context, request, { x, y: (lane) => lane * LANE + 6, high: LANE - 12 });
    if (request.ttft) {
      flag(context, x(from + request.ttft), height - AXIS, colour("accent"));
    }
    for (const at of request.preemptedAt) flag(context, x(at), height - AXIS, colour("bad"));
    byId("timeline").setAttribute("aria-label", `Timeline of request ${request.uid}: the list below tells the same`);
  }

  /** The last ones, each a button with its life on the common clock. */
  #drawList() {
    const all = [...this.#store.requests.values()].slice(-MAX_LISTED);
    const from = Math.min(...all.map((request) => request.queuedAt));
    const to = Math.max(...all.map((request) => endOf(request, this.#store.now)), from + 0.001);
    const listed = new Set(all.map((request) => request.uid));
    for (const [uid, item] of this.#items) {
      if (listed.has(uid)) continue;
      item.button.remove();
      this.#items.delete(uid);
    }
    const current = this.#request.uid;
    for (const request of all) {
      let item = this.#items.get(request.uid);
      if (!item) {
        const canvas = el("canvas", { "aria-hidden": "true" });
        const text = el("span", { class: "gantt-text" });
        const button = el("button", { class: "gantt-row", onclick: () => this.choose(request.uid) }, tag(request.uid), canvas, text);
        item = { canvas, text, button };
        this.#items.set(request.uid, item);
        byId("gantt").append(button);
      }
      item.button.setAttribute("aria-pressed", request.uid === current);
      item.text.textContent = summary(request);
      const { context, width } = prepared(item.canvas, 16);
      const x = (time) => ((time - from) / (to - from)) * (width - 2);
      paint(context, request, { x, y: () => 3, high: 10 });
    }
  }

  #export() {
    const request = this.#request;
    download(`nanovllm-request-${request.uid}.trace.json`, chromeTrace([request], this.#store.steps));
  }
}

const endOf = (request, now) => request.end?.ended_at ?? now;

function summary(request) {
  if (request.end) return `${plural(request.tokens - request.prompt, "token")} in ${milliseconds((request.end.ended_at - request.queuedAt) * 1000)}`;
  return request.state === "running" ? plural(request.tokens - request.prompt, "token") : "waits";
}

/** Waits, chunks and decode steps; steps too close to be told apart are one bar. */
function paint(context, request, { x, y, high }) {
  const bar = (lane, from, to, fill) => {
    context.fillStyle = fill;
    context.fillRect(x(from), y(lane), Math.max(1, x(to) - x(from)), high);
  };
  const known = ["seats", "budget", "kv"];
  const first = request.waits[0]?.from ?? request.startedAt;
  const started = request.startedAt || first;
  if (started > request.queuedAt && first > request.queuedAt) bar(0, request.queuedAt, Math.min(started, first), colour("other"));
  for (const wait of request.waits) bar(0, wait.from, wait.to, known.includes(wait.cause) ? colour(wait.cause) : colour("other"));
  for (const chunk of request.chunks) {
    bar(1, chunk.from, chunk.to, hueOf(request.uid));
    if (x(chunk.to) - x(chunk.from) > 3) {
      context.fillStyle = colour("panel");
      context.fillRect(x(chunk.to) - 1, y(1), 1, high);
    }
  }
  let last = -Infinity;
  for (const decode of request.decodes) {
    const [left, right] = [x(decode.from), x(decode.to)];
    if (right - last < 0.75) continue;
    const gap = right - left > 4 ? 1 : 0;
    context.fillStyle = colour("decode");
    context.fillRect(Math.max(left, last), y(2), Math.max(0.75, right - Math.max(left, last) - gap), high);
    last = right;
  }
}

function flag(context, x, height, fill) {
  context.fillStyle = fill;
  context.fillRect(x - 0.75, 0, 1.5, height);
  context.beginPath();
  context.moveTo(x, 0);
  context.lineTo(x + 8, 3.5);
  context.lineTo(x, 7);
  context.fill();
}

function axis(context, { from, to, x, height, width }) {
  const rough = ((to - from) * 1000) / Math.max(2, (width - LEFT) / 110);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  context.font = "10px ui-monospace, 'JetBrains Mono', monospace";
  context.textBaseline = "alphabetic";
  for (let ms = 0; ms <= (to - from) * 1000; ms += step) {
    const at = Math.round(x(from + ms / 1000)) + 0.5;
    context.strokeStyle = colour("line");
    context.beginPath();
    context.moveTo(at, 0);
    context.lineTo(at, height - AXIS + 4);
    context.stroke();
    context.fillStyle = colour("muted");
    context.textAlign = ms === 0 ? "left" : "center";
    if (at < width - 20) context.fillText(ms === 0 ? "0" : milliseconds(ms).replace(/(\.\d*?)0+ s$/, "$1 s").replace(". s", " s"), at, height - 6);
  }
}

/** What happened when, in words: [time, text]. */
export function story(request) {
  const told = [[request.queuedAt, `Queued with a prompt of ${plural(request.prompt, "token")}.`]];
  const end = request.end;
  const started = request.startedAt;
  if (started) {
    const causes = end ? [["seats", end.seats_ms], ["budget", end.budget_ms], ["kv", end.kv_ms]].filter(([, ms]) => ms >= 0.05) : [];
    const why = causes.length ? `: ${causes.map(([cause, ms]) => `${milliseconds(ms)} ${CAUSES[cause]}`).join(", ")}` : "";
    const cached = request.cached ? ` ${number(request.cached)} of its tokens were in the cache.` : "";
    told.push([started, `Started after ${milliseconds((started - request.queuedAt) * 1000)} of waiting${request.preemptions ? " at first" : ""}${why}.${cached}`]);
  } else if (request.state !== "ended") {
    told.push([request.waits.at(-1)?.to ?? request.queuedAt, `Waits ${CAUSES[request.cause]}.`]);
  }
  for (const chunk of request.chunks) {
    told.push([chunk.from, `Step ${number(chunk.step)} computed its tokens ${number(chunk.start)} to ${number(chunk.start + chunk.tokens)} in ${milliseconds((chunk.to - chunk.from) * 1000)}.`]);
  }
  for (const at of request.preemptedAt) told.push([at, "Preempted: its blocks went to others, and are computed again later."]);
  if (request.ttft) told.push([request.queuedAt + request.ttft, "The first token."]);
  if (request.decodes.length) {
    const [first, last] = [request.decodes[0], request.decodes.at(-1)];
    const mean = ((last.to - first.from) * 1000) / request.decodes.length;
    told.push([last.to, `${plural(request.decodes.length, "decode step")}, ${milliseconds(mean)} each.`]);
  }
  if (end) told.push([end.ended_at, `Ended (${end.reason}) with ${plural(request.tokens - request.prompt, "token")}.`]);
  return told.sort(([a], [b]) => a - b);
}
