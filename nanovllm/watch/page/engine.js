// The live engine: figures over the last minute, the cache, the steps, the batch and the queue.

import { json } from "./api.js";
import { byId, colour, el, legend, milliseconds, number, plural, prepared } from "./dom.js";
import { Grid, tag } from "./grid.js";
import { CAUSES } from "./plan.js";
import { Steps } from "./steps.js";

const WINDOW_S = 60;
const MAX_ROWS = 40;
const TOPIC = "You are one of eight who answer the same question about how a small language model is served: what happens between a request and its first token? Batches, blocks of cache, a budget of tokens and a queue come into it. ";
const ASKED = ["Explain it to a child.", "Explain it in one sentence.", "Write a short poem about it.", "List three things that can go wrong.", "Describe it as a kitchen.", "Describe it as a railway.", "What would you measure first?", "Tell it as a fairy tale."];

export class Engine {
  #store;
  #tiles;
  #rows = new Map();
  #onChoose;

  constructor(store, onChoose) {
    this.#store = store;
    this.#onChoose = onChoose;
    this.grid = new Grid(store);
    this.steps = new Steps(store);
    const { series } = store;
    this.#tiles = [
      new Tile("Tokens per second", series.tokens, { shown: (v) => number(Math.round(v)), hue: "accent" }),
      new Tile("To first token", series.ttft, { shown: milliseconds, hue: "budget", dots: true, isMedian: true }),
      new Tile("Between tokens", series.interToken, { shown: milliseconds, hue: "decode", isMedian: true, latest: 5 }),
      new Tile("Cache hit rate", series.hitRate, { shown: (v) => `${Math.round(v)} %`, hue: "cached-strong", top: 100 }),
    ];
    byId("tiles").append(...this.#tiles.map((tile) => tile.element));
    legend(byId("batch-legend"), [
      ["cached", "of its prompt: from the cache"],
      ["computed", "computed"],
      ["todo", "to come"],
      ["decode", "its answer"],
    ]);
    byId("load-button").addEventListener("click", () => this.#sendLoad());
  }

  draw() {
    if (!this.#store.layout) return;
    for (const tile of this.#tiles) tile.draw(this.#store.now);
    this.grid.draw();
    this.steps.draw();
    this.#drawRows();
  }

  refuse(text) {
    const notice = byId("engine-notice");
    notice.hidden = false;
    notice.textContent = `${text}. The chat works all the same.`;
  }

  #drawRows() {
    const { counters, numHidden } = this.#store;
    const live = this.#store.live.slice(0, MAX_ROWS);
    const hidden = numHidden + this.#store.live.length - live.length;
    const more = hidden ? `; ${number(hidden)} more are not listed` : "";
    byId("batch-sub").textContent = `${number(counters.num_running)} running, ${number(counters.num_waiting)} waiting${counters.num_paused ? `, ${number(counters.num_paused)} paused` : ""}${more}`;
    byId("rows-empty").hidden = live.length > 0;
    const longest = Math.max(256, ...live.map((request) => request.tokens));
    const seen = new Set();
    for (const request of live) {
      seen.add(request.uid);
      let row = this.#rows.get(request.uid);
      if (!row) {
        row = new Row(request.uid, this.#onChoose);
        this.#rows.set(request.uid, row);
        byId("rows").append(row.element);
      }
      row.draw(request, longest);
    }
    for (const [uid, row] of this.#rows) {
      if (seen.has(uid)) continue;
      row.element.remove();
      this.#rows.delete(uid);
    }
  }

  /** Eight prompts that begin alike, in two batches of different lengths. */
  async #sendLoad() {
    const button = byId("load-button");
    button.disabled = true;
    const room = Math.max(1, Math.floor((this.#store.layout?.max_model_len ?? 512) / 4));
    const send = (prompts, max_tokens) =>
      json("v1/completions", { body: { prompt: prompts.map((text) => TOPIC + text + "\n\n"), max_tokens: Math.min(max_tokens, room), temperature: 1, ignore_eos: true } });
    try {
      await Promise.all([send(ASKED.slice(0, 4), 96), send(ASKED.slice(4), 48)]);
    } catch (error) {
      byId("batch-sub").textContent = error.message;
    } finally {
      button.disabled = false;
    }
  }
}

/** A figure and its last minute. */
class Tile {
  #points;
  #options;
  #value = el("strong", {}, "–");
  #scale = el("span", { class: "scale", title: "the top of the curve" });
  #canvas = el("canvas", { "aria-hidden": "true" });

  constructor(title, points, options) {
    this.#points = points;
    this.#options = options;
    this.element = el("article", { class: "tile" }, el("h2", {}, title, this.#scale), this.#value, this.#canvas);
  }

  draw(now) {
    const { shown, hue, dots, top, isMedian = false, latest = WINDOW_S } = this.#options;
    const points = this.#points;
    const stroke = hue === "cached-strong" ? colour("cached") : colour(hue);
    const recent = points.filter(([time]) => time > now - (dots ? WINDOW_S : latest)).map(([, value]) => value);
    this.#value.textContent = recent.length ? shown(isMedian ? median(recent) : recent.at(-1)) : "–";
    const { context, width, height } = prepared(this.#canvas, 26);
    context.strokeStyle = colour("line");
    context.beginPath();
    context.moveTo(0, height - 0.5);
    context.lineTo(width, height - 0.5);
    context.stroke();
    if (!points.length) return;
    const highest = top ?? Math.max(...points.map(([, value]) => value)) * 1.1;
    const place = ([time, value]) => [width - ((now - time) / WINDOW_S) * width, height - 2 - (height - 8) * Math.min(1, value / (highest || 1))];
    context.fillStyle = context.strokeStyle = stroke;
    if (dots) {
      for (const point of points) {
        const [x, y] = place(point);
        context.beginPath();
        context.arc(Math.min(x, width - 3), y, 2.5, 0, 7);
        context.fill();
      }
    } else {
      line(context, points.map(place), height, points);
    }
    this.#scale.textContent = `↑ ${shown(highest)}`;
  }
}

/** A line with a faint area below, broken where nothing was measured for a while. */
function line(context, places, height, points) {
  let from = 0;
  for (let i = 1; i <= places.length; i += 1) {
    if (i < places.length && points[i][0] - points[i - 1][0] < 2.5) continue;
    const run = places.slice(from, i);
    from = i;
    context.beginPath();
    run.forEach(([x, y], j) => (j ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.lineWidth = 1.5;
    context.stroke();
    context.lineTo(run.at(-1)[0], height);
    context.lineTo(run[0][0], height);
    context.globalAlpha = 0.14;
    context.fill();
    context.globalAlpha = 1;
  }
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

/** A request in the batch or the queue: what of it was cached, is computed, is to come. */
class Row {
  constructor(uid, onChoose) {
    this.bar = el("span", { class: "progress", "aria-hidden": "true" }, el("i", { class: "cached" }), el("i", { class: "computed" }), el("i", { class: "todo" }), el("i", { class: "made" }));
    this.text = el("span", { class: "row-text" });
    const button = el("button", { class: "row", onclick: () => onChoose(uid), title: "See its life" }, tag(uid), this.bar, this.text);
    this.element = el("li", {}, button);
  }

  draw(request, longest) {
    const { prompt, computed, cached, tokens, state, cause, preemptions } = request;
    const parts = [Math.min(cached, computed), Math.max(0, Math.min(computed, prompt) - cached), Math.max(0, prompt - Math.max(computed, 0)), Math.max(0, tokens - prompt)];
    parts.forEach((part, i) => (this.bar.children[i].style.width = `${(100 * part) / longest}%`));
    this.element.dataset.state = state;
    const generated = tokens - prompt;
    const doing = state === "running" ? (computed < prompt ? `prefill ${number(computed)} of ${number(prompt)}` : `${plural(generated, "token")}`) : `waits ${CAUSES[cause]}`;
    const extra = preemptions ? ` · preempted ${preemptions === 1 ? "once" : `${preemptions} times`}` : cached ? ` · ${number(cached)} cached` : "";
    this.text.textContent = doing + extra;
  }
}
