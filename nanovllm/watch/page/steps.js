// The last steps, one bar each: how its token budget was split into decodes and chunks of prompts.

import { byId, colour, hueOf, legend, number, plural, prepared } from "./dom.js";
import { explain } from "./plan.js";

const HEIGHT = 112;
const FINE = window.matchMedia("(hover: hover)").matches;
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
  #told = "";

  constructor(store) {
    this.#store = store;
    for (const kind of ["pointermove", "pointerdown"]) this.#canvas.addEventListener(kind, (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.choose(null));
    this.#canvas.addEventListener("blur", () => this.choose(null));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    legend(byId("steps-legend"), [
      ["decode", "decodes, a token each"],
      ["used", "chunks of prompts, in their request’s colour"],
      ["limit", "what chunks may take beside decodes"],
      ["bad", "preemption"],
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
    this.choose(step ? step.step : null);
  }

  #key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.#shown.length) return;
    event.preventDefault();
    const at = this.#shown.findIndex((step) => step.step === this.#chosen);
    const to = at < 0 ? this.#shown.length - 1 : at + moves[event.key];
    this.choose(this.#shown[Math.min(this.#shown.length - 1, Math.max(0, to))].step);
  }

  choose(number_) {
    if (number_ === this.#chosen) return;
    this.#chosen = number_;
    this.draw();
  }

  /** The chosen step's plan in words; while the engine is held, the last one's. */
  #caption() {
    const { pace, steps, numLost, counters } = this.#store;
    const last = steps.at(-1);
    const step = this.#shown.find((one) => one.step === this.#chosen) ?? (pace.is_held ? last : undefined);
    const told = step ? `${step.step} ${step === last} ${counters.num_waiting} ${counters.num_running}` : `none ${numLost}`;
    if (told === this.#told) return;
    this.#told = told;
    const lost = numLost ? ` ${number(numLost)} steps were too many to show.` : "";
    byId("step-caption").hidden = Boolean(step);
    byId("step-caption").textContent = `Logarithmic scale, newest at the right. ${FINE ? "Point at" : "Tap"} a step to see its plan.${lost}`;
    byId("plan").hidden = !step;
    byId("plan").replaceChildren(...(step ? explain(step, this.#store, step === last) : []));
    byId("plan").dataset.step = step?.step ?? "";
  }
}
