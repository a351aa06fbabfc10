// Holding the engine, taking it step by step, slowing it down: `POST /v1/engine/pace`.

import { json } from "./api.js";
import { byId } from "./dom.js";

const HOLD_S = 20; // then it goes on by itself: whoever held it may be gone
const RENEW_MS = 6000;
const SLOW_MS = 400;

export class Pace {
  #store;
  #asked = null; // what this page has asked for, and asks for again in time

  constructor(store) {
    this.#store = store;
    byId("hold").addEventListener("click", () => (this.isHeld ? this.release() : this.hold()));
    byId("step").addEventListener("click", () => this.step());
    byId("slow").addEventListener("click", () => (store.pace.interval_ms ? this.release() : this.slow()));
    setInterval(() => this.#asked && this.#ask(this.#asked), RENEW_MS);
  }

  get isHeld() {
    return this.#store.pace.is_held;
  }

  hold = () => this.#ask({ num_steps: 0 });
  slow = () => this.#ask({ interval_ms: SLOW_MS });
  release = () => this.#ask({}, null);

  /** Takes some steps; resolves when they are over, or when nothing is left to do. */
  async step(count = 1) {
    const store = this.#store;
    const target = store.counters.num_steps + count;
    await this.#ask({ num_steps: count }, { num_steps: 0 });
    await store.until(() => store.counters.num_steps >= target || !store.live.length);
    if (store.counters.num_steps >= target) return;
    await this.release(); // what is left of them is not for whoever comes next
    await this.hold();
  }

  /** lasting: what is asked for again from now on, until something else is asked for. */
  async #ask(wanted, lasting = wanted) {
    this.#asked = lasting;
    try {
      const pace = await json("v1/engine/pace", { body: { ...wanted, for_s: HOLD_S } });
      this.#store.setPace(pace);
    } catch (error) {
      this.#asked = null;
      byId("pace-text").textContent = error.message;
    }
  }

  draw() {
    const { is_allowed: isAllowed, is_held: isHeld, interval_ms: interval } = this.#store.pace;
    byId("controls").hidden = !isAllowed;
    if (!isAllowed) return;
    byId("hold").textContent = isHeld ? "Go on" : "Pause";
    byId("hold").setAttribute("aria-pressed", isHeld);
    byId("slow").setAttribute("aria-pressed", interval > 0);
    const text = isHeld ? "Held: no step begins until you take one." : interval ? `Slow: a step each ${interval} ms.` : "";
    if (byId("pace-text").textContent !== text) byId("pace-text").textContent = text;
  }
}
