// Talking to the model: streaming, parameters, stop, and what each answer cost.

import { events, json } from "./api.js";
import { byId, copyButton, el, milliseconds, number, plural } from "./dom.js";
import { visible } from "./grid.js";
import { markdown } from "./markdown.js";

const IDEAS = ["Why is the sky blue?", "Write a haiku about memory.", "Count to twenty in words."];
const KEPT = "nanovllm-chat"; // in this browser: a conversation survives a reload
const NEAR_END = 60; // pixels: whoever reads further up is not scrolled away

export class Chat {
  #messages = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
  #controller = null;
  #list = byId("messages");
  #input = byId("composer");
  #welcome = byId("welcome");
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
    if (this.#messages.length) byId("welcome").remove();
    for (const message of this.#messages) this.#show(message);
    this.#scroll(true);
  }

  /** Stop the answer that is being written; false if there is none. */
  stop() {
    this.#controller?.abort();
    return this.#controller !== null;
  }

  #restart() {
    this.stop();
    this.#cut(0);
    this.#input.focus();
  }

  /** Forget the conversation from a message on. */
  #cut(from) {
    this.#messages.length = from;
    this.#keep();
    if (from) [...this.#list.querySelectorAll(".message")].slice(from).forEach((one) => one.remove());
    else this.#list.replaceChildren(this.#welcome);
  }

  #keep() {
    localStorage.setItem(KEPT, JSON.stringify(this.#messages));
  }

  /** A message that is there already, with what can be done with it. */
  #show({ role, content }) {
    if (role === "user") {
      const article = el("article", { class: "message user", "aria-label": "You" }, el("div", { class: "plain" }, content));
      const edit = el("button", { type: "button", class: "link", onclick: () => this.#edit(article, content) }, "Edit");
      article.append(el("p", { class: "actions" }, edit, copyButton(() => content)));
      this.#list.append(article);
      return;
    }
    const article = el("article", { class: "message assistant", "aria-label": "The model" }, el("div", { class: "text" }, markdown(content)));
    article.append(this.#actions(content));
    this.#list.append(article);
  }

  #actions(text) {
    const again = el("button", { type: "button", class: "link again", onclick: () => this.#again() }, "Regenerate");
    return el("p", { class: "actions" }, text ? copyButton(() => text) : null, again);
  }

  #edit(article, content) {
    if (this.#controller) return;
    this.#cut([...this.#list.querySelectorAll(".message")].indexOf(article));
    this.#input.value = content;
    this.#fit();
    this.#input.focus();
  }

  /** Answer the last message once more. */
  #again() {
    if (this.#controller) return;
    const last = this.#messages.findLastIndex((one) => one.role === "user");
    const { content } = this.#messages[last];
    this.#cut(last);
    this.#send(content);
  }

  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${Math.min(this.#input.scrollHeight + 2, 180)}px`;
  }

  async #send(text) {
    if (!text || this.#controller) return;
    this.#welcome.remove();
    this.#input.value = "";
    this.#fit();
    const message = { role: "user", content: text };
    this.#messages.push(message);
    this.#keep();
    this.#show(message);
    const answer = new Answer(this.#list, this.#onLife);
    this.#scroll(true);
    this.#controller = new AbortController();
    this.#toggle(true);
    try {
      await this.#stream(answer);
    } catch (error) {
      if (error.name === "AbortError") answer.finish("stopped");
      else answer.fail(error instanceof TypeError ? "The server is gone. Start it again, then Regenerate." : error.message);
    } finally {
      this.#controller = null;
      this.#toggle(false);
      if (answer.text) this.#messages.push({ role: "assistant", content: answer.text });
      this.#keep();
      answer.element.append(this.#actions(answer.text));
      this.#scroll();
    }
  }

  /** The events of an answer; while the model loads, it is asked for again. */
  async *#events(body, answer) {
    const { signal } = this.#controller;
    for (;;) {
      try {
        yield* events("v1/chat/completions", { body, signal });
        return;
      } catch (error) {
        if (error.code !== "loading") throw error;
        answer.wait(error.message);
        await new Promise((go, stop) => {
          const timer = setTimeout(go, 1000 * Math.min(2, error.retryAfter));
          signal.addEventListener("abort", () => (clearTimeout(timer), stop(signal.reason)), { once: true });
        });
      }
    }
  }

  async #stream(answer) {
    const system = byId("system").value.trim();
    // A message that got no answer is followed by the next: models want them in turns.
    const turns = this.#messages.filter((one, i, all) => one.role !== all[i + 1]?.role);
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];
    const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, request_id: answer.name };
    for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
      const value = byId(name).value;
      if (value !== "") body[name] = Number(value);
    }
    answer.asked = { messages };
    for await (const event of this.#events(body, answer)) {
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

  /** Nothing of it can come yet. */
  wait(why) {
    this.#facts.textContent = `${why}: it will be asked again`;
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
    const thought = this.#thought ? el("details", { class: "thought", open: !this.text }, el("summary", {}, "Thinking"), markdown(this.#thought)) : null;
    this.#body.replaceChildren(...[thought, markdown(this.text)].filter(Boolean));
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
