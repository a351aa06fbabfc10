// The engine's words, each told where it stands: when it is pointed at, focused or tapped.

import { byId, el } from "./dom.js";

const TERMS = {
  request: "What a client sends: a prompt, and how to sample. The core runs it as a sequence, the worker as a row.",
  queue: "Requests that have no seat yet, or no room for their prompt. They begin in order of arrival.",
  seat: "A row of the batch. There are max_num_seqs of them; whoever runs has one.",
  step: "One forward pass, for all the tokens that its plan names.",
  plan: "Made before each step: which sequences it runs, how many tokens of each, and in which blocks their keys and values lie. The scheduler knows counts only, and decides from them.",
  budget: "The most tokens that one step may run (max_num_batched_tokens). Beside decodes, which have to wait for it, a step takes fewer tokens of prompts.",
  chunk: "The part of a prompt that one step computes, where all of it would be more than the budget.",
  decode: "Once its prompt is computed, a sequence runs one token in each step, and so gets its next one.",
  block: "A page of KV: the keys and values of a few neighbouring tokens of a sequence.",
  "kv cache": "The keys and values of all tokens so far. They are kept in blocks, so that no token is computed twice.",
  prefix: "A block that is full is known by a hash of its tokens and of all before them. Requests that begin alike share such blocks, also with requests that have ended.",
  preemption: "When no block is free, the sequence that comes last in order gives its blocks and its seat back. It waits, and is computed again later.",
};

/** A word with its meaning; text: as it stands here. */
export const term = (name, text = name) => el("button", { type: "button", class: "term", "data-term": name }, text);

/** Text with terms: what stands in [brackets], or [text|term]. */
export function told(text) {
  return text.split(/\[([^\]]+)\]/).map((part, i) => {
    if (i % 2 === 0) return part;
    const [shown, name = shown] = part.split("|");
    return term(name, shown);
  });
}

let current = null;

function show(button) {
  const tip = byId("tip");
  current?.removeAttribute("aria-describedby");
  current = button;
  if (!button) {
    if (tip.matches(":popover-open")) tip.hidePopover();
    return;
  }
  tip.textContent = TERMS[button.dataset.term];
  button.setAttribute("aria-describedby", "tip");
  if (!tip.matches(":popover-open")) tip.showPopover();
  const at = button.getBoundingClientRect();
  const isLow = at.bottom + tip.offsetHeight + 12 > window.innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${isLow ? at.top - tip.offsetHeight - 6 : at.bottom + 6}px`;
}

/** Is a tooltip closed by this? */
export function closeTip() {
  const isOpen = current !== null;
  show(null);
  return isOpen;
}

export function watchTerms() {
  const find = (event) => event.target.closest?.(".term") ?? null;
  for (const kind of ["pointerover", "focusin", "click"]) {
    document.addEventListener(kind, (event) => {
      const button = find(event);
      if (button !== current && (button || kind !== "focusin")) show(button);
    });
  }
  document.addEventListener("focusout", (event) => find(event) && show(null));
  document.addEventListener("scroll", () => show(null), true);
}
