// The last steps, one bar each: how its token budget was split into decodes and chunks of prompts.

import { byId, colour, hueOf, legend, milliseconds, number, plural, prepared } from "./dom.js";

const HEIGHT = 132;
const BAR = 7;
const GAP = 2;
const LEFT = 34;
const BOTTOM = 14;
const TOP = 12;

export class Steps {
  #store;
  #canvas = byId("steps");
  #shown = [];
  #chosen = null; // number of a step

  constructor(store) {
    this.#store = store;
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.#choose(null));
    this.#canvas.addEventListener("blur", () => this.#choose(null));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    legend(byId("steps-legend"), [
      ["decode", "decodes, a token each"],
      ["used", "chunks of prompts, in their request’s colour"],
      ["limit", "their limit, where it is less than the dashed line"],
      ["bad", "a request was preempted"],
    ]);
  }

  draw() {
    const { layout, steps, counters } = this.#store;
    if (!layout) return;
    const { context, width } = prepared(this.#canvas, HEIGHT);
    const most = layout.max_num_batched_tokens;
    const full = HEIGHT - TOP - BOTTOM;
    // Of a budget of thousands a decode is nothing: the scale is logarithmic, and says so.
    const heightOf = (tokens) => (full * Math.log2(1 + tokens)) / Math.log2(1 + most);
    this.#axis(context, { width, most, heightOf });
    const count = Math.floor((width - LEFT) / (BAR + GAP));
    this.#shown = steps.slice(-count);
    this.#shown.forEach((step, i) => {
      const x = LEFT + i * (BAR + GAP);
      let tokens = 0;
      const segment = (more, fill) => {
        const from = heightOf(tokens);
        tokens += more;
        context.fillStyle = fill;
        context.fillRect(x, HEIGHT - BOTTOM - heightOf(tokens), BAR, Math.max(1, heightOf(tokens) - from - 0.5));
      };
      if (step.num_decodes) segment(step.num_decodes, colour("decode"));
      for (const [uid, , more] of step.chunks) segment(more, hueOf(uid));
      if (step.chunks.length && step.budget < most) {
        // Beside decodes a step takes fewer tokens of prompts: up to here.
        context.fillStyle = colour("muted");
        context.fillRect(x - 1, Math.round(HEIGHT - BOTTOM - heightOf(step.budget)), BAR + 2, 1);
      }
      if (step.preempted.length) {
        context.fillStyle = colour("bad");
        context.beginPath();
        context.moveTo(x - 1, TOP - 10);
        context.lineTo(x + BAR + 1, TOP - 10);
        context.lineTo(x + BAR / 2, TOP - 2);
        context.fill();
      }
      if (step.step === this.#chosen) {
        context.strokeStyle = colour("accent");
        context.lineWidth = 1.5;
        context.strokeRect(x - 1.5, TOP - 1, BAR + 3, full + 2);
      }
    });
    byId("steps-sub").textContent = `${number(counters.num_steps)} so far, ${plural(counters.num_preemptions, "preemption")}; up to ${number(most)} tokens each`;
    this.#canvas.dataset.count = steps.length;
    this.#caption();
  }

  #axis(context, { width, most, heightOf }) {
    context.font = "10px ui-monospace, 'JetBrains Mono', monospace";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const marks = [1, 8, 64, 512, 4096].filter((mark) => mark < most / 2);
    for (const mark of [...marks, most]) {
      const y = Math.round(HEIGHT - BOTTOM - heightOf(mark)) + 0.5;
      context.strokeStyle = mark === most ? colour("muted") : colour("line");
      context.setLineDash(mark === most ? [3, 3] : []);
      context.beginPath();
      context.moveTo(LEFT, y);
      context.lineTo(width, y);
      context.stroke();
      context.fillStyle = colour("muted");
      context.fillText(mark >= 10000 ? `${Math.round(mark / 1000)}k` : String(mark), LEFT - 6, y);
    }
    context.setLineDash([]);
  }

  #point(event) {
    const step = this.#shown[Math.floor((event.offsetX - LEFT) / (BAR + GAP))];
    this.#choose(step ? step.step : null);
  }

  #key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.#shown.length) return;
    event.preventDefault();
    const at = this.#shown.findIndex((step) => step.step === this.#chosen);
    const to = at < 0 ? this.#shown.length - 1 : at + moves[event.key];
    this.#choose(this.#shown[Math.min(this.#shown.length - 1, Math.max(0, to))].step);
  }

  #choose(number_) {
    if (number_ === this.#chosen) return;
    this.#chosen = number_;
    this.draw();
  }

  #caption() {
    const step = this.#shown.find((one) => one.step === this.#chosen);
    const lost = this.#store.numLost ? ` ${number(this.#store.numLost)} steps were too many to show.` : "";
    byId("step-caption").textContent = step ? describe(step) : `Logarithmic scale, newest at the right.${lost}`;
  }
}

function describe(step) {
  const parts = [];
  if (step.num_decodes) parts.push(plural(step.num_decodes, "decode"));
  for (const [uid, start, tokens] of step.chunks) parts.push(`tokens ${number(start)} to ${number(start + tokens)} of #${uid}`);
  if (step.chunks.length) parts.push(`of at most ${plural(step.budget, "token")}`);
  for (const uid of step.preempted) parts.push(`#${uid} preempted`);
  return `Step ${number(step.step)}, ${milliseconds((step.ended_at - step.started_at) * 1000)}: ${parts.join(", ")}.`;
}
