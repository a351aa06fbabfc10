// Talking to the model: streaming, parameters, stop, and what each answer cost.

import { events, json } from "./api.js";
import { byId, el, milliseconds, number, plural } from "./dom.js";
import { visible } from "./grid.js";

const IDEAS = ["Why is the sky blue?", "Write a haiku about memory.", "Count to twenty in words."];
const NEAR_END = 60; // pixels: whoever reads further up is not scrolled away

export class Chat {
  #messages = [];
  #controller = null;
  #list = byId("messages");
  #input = byId("composer");
  #onLife;

  /** onLife: shows the life of the request with this id; false if it is not known. */
  constructor(onLife) {
    this.#onLife = onLife;
    byId("composer-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(this.#input.value.trim());
    });
    this.#input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send(this.#input.value.trim());
    });
    this.#input.addEventListener("input", () => this.#fit());
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.#restart());
    byId("ideas").append(...IDEAS.map((idea) => el("button", { class: "idea", onclick: () => this.#send(idea) }, idea)));
  }

  /** Stop the answer that is being written; false if there is none. */
  stop() {
    this.#controller?.abort();
    return this.#controller !== null;
  }

  #restart() {
    this.stop();
    this.#messages = [];
    this.#list.replaceChildren(byId("welcome") ?? this.welcome);
    this.#input.focus();
  }

  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${Math.min(this.#input.scrollHeight + 2, 180)}px`;
  }

  async #send(text) {
    if (!text || this.#controller) return;
    const welcome = byId("welcome");
    if (welcome) {
      this.welcome = welcome;
      welcome.remove();
    }
    this.#input.value = "";
    this.#fit();
    this.#messages.push({ role: "user", content: text });
    this.#list.append(el("article", { class: "message user", "aria-label": "You" }, rendered(text)));
    const answer = new Answer(this.#list, this.#onLife);
    this.#scroll(true);
    this.#controller = new AbortController();
    this.#toggle(true);
    try {
      await this.#stream(answer);
    } catch (error) {
      if (error.name === "AbortError") answer.finish("stopped");
      else answer.fail(error.message);
    } finally {
      this.#controller = null;
      this.#toggle(false);
      if (answer.text) this.#messages.push({ role: "assistant", content: answer.text });
      else this.#messages.pop();
      this.#scroll();
    }
  }

  async #stream(answer) {
    const system = byId("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.#messages];
    const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, request_id: answer.name };
    for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
      const value = byId(name).value;
      if (value !== "") body[name] = Number(value);
    }
    answer.asked = { messages };
    for await (const event of events("v1/chat/completions", { body, signal: this.#controller.signal })) {
      answer.take(event);
      this.#scroll();
    }
    answer.finish();
  }

  #toggle(isBusy) {
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    this.#list.setAttribute("aria-busy", isBusy);
  }

  #scroll(always = false) {
    const list = this.#list;
    if (always || list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END + 40) list.scrollTop = list.scrollHeight;
  }
}

/** An answer as it comes, and its figures below. */
class Answer {
  name = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  text = "";
  #thought = "";
  #reason = null;
  #usage = null;
  #startedAt = performance.now();
  #firstAt = null;
  #lastAt = null;
  #body = el("div", { class: "text" });
  #facts = el("p", { class: "facts" }, "…");
  #prompt = el("div", { class: "prompt" });
  #onLife;

  constructor(list, onLife) {
    this.#onLife = onLife;
    this.element = el("article", { class: "message assistant", "aria-label": "The model" }, this.#body, this.#facts, this.#prompt);
    list.append(this.element);
  }

  take(event) {
    this.#usage = event.usage ?? this.#usage;
    const choice = event.choices[0];
    if (!choice) return;
    this.#reason = choice.finish_reason ?? this.#reason;
    const { content, reasoning_content: thought } = choice.delta;
    if (!content && !thought) return;
    this.#lastAt = performance.now();
    this.#firstAt ??= this.#lastAt;
    this.text += content ?? "";
    this.#thought += thought ?? "";
    this.#draw();
  }

  #draw() {
    const thought = this.#thought ? el("details", { class: "thought", open: !this.text }, el("summary", {}, "Thinking"), rendered(this.#thought)) : null;
    this.#body.replaceChildren(...[thought, rendered(this.text)].filter(Boolean));
    this.#facts.textContent = this.#figures().join(" · ");
  }

  #figures() {
    const count = this.#usage?.completion_tokens ?? 0;
    const found = [plural(count, "token")];
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    if (count > 1 && seconds > 0) found.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    if (this.#firstAt !== null) found.push(`first after ${milliseconds(this.#firstAt - this.#startedAt)}`);
    return found;
  }

  finish(reason = this.#reason) {
    const found = this.#figures();
    if (reason && reason !== "stop") found.push(reason === "length" ? "cut at max tokens" : reason);
    this.#facts.textContent = found.join(" · ");
    this.#facts.append(" ", el("button", { class: "link", onclick: () => this.#showLife() }, "its life"));
    if (this.#usage) this.#showPrompt();
  }

  fail(message) {
    this.#facts.textContent = message;
    this.#facts.classList.add("failed");
    this.#facts.setAttribute("role", "alert");
  }

  #showLife() {
    if (!this.#onLife(`chatcmpl-${this.name}`)) {
      this.#facts.append(el("span", { class: "hint" }, " (not seen by this page: it went through another frontend, or is long past)"));
    }
  }

  /** Which part of the prompt came from the cache: as a bar, and token by token if asked. */
  #showPrompt() {
    const { prompt_tokens: total, prompt_tokens_details: details } = this.#usage;
    const cached = details?.cached_tokens ?? 0;
    const bar = el("span", { class: "share", "aria-hidden": "true" }, el("i"));
    bar.firstChild.style.width = `${(100 * cached) / Math.max(1, total)}%`;
    const text = cached ? `${number(cached)} of ${plural(total, "prompt token")} from the cache` : `${plural(total, "prompt token")}, none from the cache`;
    const tokens = el("p", { class: "tokens" });
    const box = el("details", { class: "cache" }, el("summary", {}, bar, text), tokens);
    box.addEventListener("toggle", () => box.open && !tokens.childElementCount && this.#showTokens(tokens, cached));
    this.#prompt.replaceChildren(box);
  }

  async #showTokens(target, cached) {
    try {
      const body = { ...this.asked, return_token_strs: true };
      const { token_strs: texts } = await json("tokenize", { body });
      target.append(...texts.map((text, i) => el("span", { class: i < cached ? "from-cache" : "computed", title: i < cached ? "from the cache" : "computed" }, visible(text))));
    } catch (error) {
      target.textContent = error.message;
    }
  }
}

/** Text with code blocks, inline code and bold; everything else as it is. */
function rendered(text) {
  const parts = document.createDocumentFragment();
  text.split(/```/).forEach((part, i) => {
    if (i % 2) {
      parts.append(el("pre", {}, el("code", {}, part.replace(/^[\w+-]*\n/, "").replace(/\n$/, ""))));
      return;
    }
    const words = el("span", { class: "words" });
    for (const piece of part.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/.test(piece)) words.append(el("code", {}, piece.slice(1, -1)));
      else if (/^\*\*.+\*\*$/.test(piece)) words.append(el("strong", {}, piece.slice(2, -2)));
      else words.append(piece);
    }
    parts.append(words);
  });
  return parts;
}
