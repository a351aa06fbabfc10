// "What happens to your prompt?": about a minute on the live engine, which is held at each station.

import { json } from "./api.js";
import { byId, number, plural } from "./dom.js";
import { told } from "./terms.js";

const NARROW = window.matchMedia("(max-width: 1079px)"); // the tour covers the lower half there
const MAX_STEPS = 400; // that one station may take
const OPENING =
  "You explain how a small language model is served to people who have never seen it. Be friendly, use short sentences and everyday pictures, and begin with what happens to the words somebody has typed. A prompt becomes tokens; a step computes some of them; their keys and values are kept in blocks of memory, so that nothing is computed twice. ";
const QUESTION = "Explain it to a child of nine years who likes trains, and say what a block is, what a step is, and why both are needed to answer quickly.";
const OTHERS = ["As a kitchen.", "As a railway.", "As a library.", "As a post office.", "As a school.", "As a harbour."];

/** A station: title, where to look, what to do before it is told, and what to tell. */
const STATIONS = [
  {
    title: "A request waits",
    at: "batch-card",
    async run(tour) {
      await tour.pace.hold();
      tour.first = tour.send([tour.opening + QUESTION], 200);
      await tour.store.until(() => tour.request(tour.first));
    },
    text: (tour) => `Your prompt has become ${number(tour.request(tour.first).prompt)} tokens and a [request]. It stands in the [queue]. The engine is held, so no [step] begins until this tour takes one.`,
  },
  {
    title: "A seat",
    at: "batch-card",
    run: (tour) => tour.stepUntil(() => tour.request(tour.first).chunks.length),
    text: (tour) => `One [step] has run. The request has one of ${plural(tour.store.layout.max_num_seqs, "[seat]", "[seats|seat]")} now, and keeps it until it ends or is [preempted|preemption].`,
  },
  {
    title: "A chunk of the prompt, within the budget",
    at: "steps-card",
    run: async () => {},
    text(tour) {
      const { layout } = tour.store;
      const [chunk] = tour.request(tour.first).chunks;
      return `A step runs at most ${number(layout.max_num_batched_tokens)} tokens: that is the [budget]. So of the prompt it took a [chunk], tokens ${number(chunk.start)} to ${number(chunk.start + chunk.tokens)}. Below the bars stands the [plan], and why it is so.`;
    },
  },
  {
    title: "Blocks",
    at: "cache-card",
    run: (tour) => tour.stepUntil(() => tour.request(tour.first).ttftSeen),
    text: (tour) => `Keys and values of ${number(tour.store.blockSize)} tokens each lie in a [block]. The whole prompt is computed now, in ${plural(tour.request(tour.first).chunks.length, "step")}, and holds ${plural(tour.request(tour.first).table.length, "block")} of the [KV cache|kv cache]. ${tour.tap} one to read it.`,
  },
  {
    title: "Decode",
    at: "steps-card",
    run: (tour) => tour.stepUntil(() => tour.request(tour.first).decodes.length >= 3),
    text: (tour) => `From here on each step runs one token of this request, and gets its next one: it [decodes|decode]. It has ${plural(tour.request(tour.first).tokens - tour.request(tour.first).prompt, "token")} of an answer by now. One token fills little of the budget.`,
  },
  {
    title: "A shared prefix",
    at: "cache-card",
    async run(tour) {
      tour.second = tour.send([`${tour.opening}Explain it as a play in three acts.`], 200);
      await tour.store.until(() => tour.request(tour.second));
      await tour.stepUntil(() => tour.request(tour.second).chunks.length);
    },
    text: (tour) => `A second request begins with the same words. ${number(tour.request(tour.second).cached)} of its ${number(tour.request(tour.second).prompt)} tokens were found in the cache by a hash: a [shared prefix|prefix]. Both hold those blocks (striped); nothing of them was computed again.`,
  },
  {
    title: "The budget, shared",
    at: "steps-card",
    async run(tour) {
      const before = tour.store.steps.at(-1).step;
      const name = tour.send(OTHERS.map((text) => `${text} ${tour.opening}`), 200);
      await tour.store.until(() => tour.requests(name).length === OTHERS.length);
      await tour.stepUntil(() => tour.store.steps.at(-1).step > before && tour.store.steps.at(-1).chunks.length);
    },
    text: (tour) => `Six more have come. Those who decode come first in each step, and what is left of the [budget] goes to [chunks|chunk] of prompts. ${plural(tour.store.counters.num_waiting, "request")} ${tour.store.counters.num_waiting === 1 ? "waits" : "wait"}: the plan below says what for.`,
  },
  {
    title: "Preemption",
    at: "batch-card",
    async run(tour) {
      const before = tour.store.steps.at(-1).step;
      const find = () => tour.store.steps.find((one) => one.step > before && one.preempted.length);
      tour.isFull = await tour.stepUntil(find, 12);
      if (tour.isFull) tour.onStep(find().step);
    },
    text: (tour) =>
      tour.isFull
        ? "All grow, until no [block] is free. Then the one that came last gives its blocks and its seat back: [preemption]. It waits, and is computed again later; nothing of its answer is lost, and its reader only sees a pause."
        : "If all grew until no [block] was free, the one that came last would give its blocks and its seat back: [preemption]. This cache is large enough for all of these.",
  },
  {
    title: "That is what happens to your prompt",
    at: "batch-card",
    run: (tour) => tour.pace.release(),
    text: () => "The engine goes on at full speed. Write a message, pause it where you like, and take its steps one by one: the [plan] of each tells why it is so.",
  },
];

export class Tour {
  #index = -1;
  #onStart;
  #sent = null; // ends the requests of this tour

  /** onStart: shows the engine. onStep: shows the plan of a step. */
  constructor(store, pace, { onStart, onStep }) {
    this.store = store;
    this.pace = pace;
    this.onStep = onStep;
    this.#onStart = onStart;
    this.tap = window.matchMedia("(hover: hover)").matches ? "Point at" : "Tap";
    byId("tour-next").addEventListener("click", () => this.#go(this.#index + 1));
    byId("tour-end").addEventListener("click", () => this.end());
  }

  start() {
    this.end(false);
    this.#sent = new AbortController();
    this.opening = `Lesson ${crypto.getRandomValues(new Uint16Array(1))[0]}. ${OPENING}`; // in no cache yet
    byId("tour").hidden = false;
    this.#onStart();
    this.#go(0);
  }

  end(isToGoOn = true) {
    if (!this.#sent) return;
    this.#sent.abort();
    this.#sent = null;
    this.#index = -1;
    byId("tour").hidden = true;
    this.#spot(null);
    if (isToGoOn) {
      this.pace.release();
      byId("tour-button").focus();
    }
  }

  async #go(index) {
    if (index >= STATIONS.length) {
      this.end();
      return;
    }
    const sent = this.#sent;
    const station = STATIONS[index];
    this.#index = index;
    byId("tour").dataset.station = "";
    byId("tour-next").disabled = true;
    byId("tour-title").textContent = station.title;
    byId("tour-place").textContent = `${index + 1} of ${STATIONS.length}`;
    this.#spot(station.at);
    let text;
    try {
      await station.run(this);
      text = told(station.text(this));
    } catch (error) {
      text = [`The tour cannot go on: ${error.message}`];
    }
    if (this.#sent !== sent) return; // ended meanwhile
    byId("tour-text").replaceChildren(...text);
    byId("tour-next").disabled = false;
    byId("tour-next").textContent = index === STATIONS.length - 1 ? "Done" : "Next";
    byId("tour").dataset.station = index + 1;
    byId("tour-next").focus({ preventScroll: true });
  }

  #spot(id) {
    for (const one of document.querySelectorAll(".spot")) one.classList.remove("spot");
    if (!id) return;
    byId(id).classList.add("spot");
    byId(id).scrollIntoView({ block: NARROW.matches ? "start" : "nearest" });
  }

  // ---- what stations do

  /** Send prompts; returns a name, by which `requests` finds them. They go as one HTTP request:
   * browsers open six connections to a server, and holding the engine needs one. */
  send(prompts, max_tokens) {
    const name = `tour-${crypto.getRandomValues(new Uint32Array(1))[0].toString(16)}`;
    const body = { prompt: prompts.map((text) => `${text}\n\n`), max_tokens, ignore_eos: true, temperature: 1, request_id: name };
    json("v1/completions", { body, signal: this.#sent.signal }).catch((error) => {
      if (error.name !== "AbortError") byId("tour-text").textContent = error.message;
    });
    return name;
  }

  requests = (name) => [...this.store.requests.values()].filter((one) => one.id?.includes(name));
  request = (name) => this.requests(name)[0];

  /** Steps until it is so; false if that takes too long, or nothing is left to do. */
  async stepUntil(isTrue, atOnce = 1) {
    const sent = this.#sent;
    for (let count = 0; count < MAX_STEPS && this.#sent === sent; count += atOnce) {
      if (isTrue()) return true;
      if (!this.store.live.length) return false;
      await this.pace.step(atOnce);
    }
    return Boolean(isTrue());
  }
}
