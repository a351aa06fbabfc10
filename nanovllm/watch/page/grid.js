// The KV cache as a grid of blocks: free, cached but free, held by one or shared, in their colours.

import { json } from "./api.js";
import { byId, colour, el, hueOf, isCalm, legend, number, plural, prepared } from "./dom.js";

const MAX_HEIGHT = 230;
const FLASH_S = 0.5;
const LOOK_AGAIN_MS = 700;

export class Grid {
  #store;
  #canvas = byId("grid");
  #inspector = byId("inspector");
  #chosen = null; // cell
  #byHand = false; // chosen with the keyboard or a click: stays when the pointer leaves
  #shape = { columns: 1, size: 8, gap: 1, pitch: 9 };
  #contents = null;
  #askedAt = 0;
  #timer = 0;

  constructor(store) {
    this.#store = store;
    const canvas = this.#canvas;
    canvas.addEventListener("pointermove", (event) => this.#point(event, false));
    canvas.addEventListener("pointerdown", (event) => this.#point(event, true));
    canvas.addEventListener("pointerleave", () => this.#byHand || this.#choose(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => {
      this.#byHand = false;
      this.#choose(null);
    });
    legend(byId("cache-legend"), [
      ["used", "held by a request, in its colour"],
      ["shared", "shared"],
      ["cached", "cached, but free"],
      ["free", "free"],
    ]);
    this.#show();
  }

  draw() {
    const { layout, cells } = this.#store;
    if (!layout) return;
    const { context } = this.#prepare(layout.num_cells);
    const { size } = this.#shape;
    const radius = size >= 9 ? 2 : size >= 6 ? 1 : 0;
    const counts = { used: 0, shared: 0, cached: 0, free: 0 };
    const isQuiet = isCalm();
    for (let cell = 0; cell < layout.num_cells; cell += 1) {
      const [x, y] = this.#at(cell);
      const state = cells[cell];
      const held = state >> 1;
      if (held === 0) {
        counts[state ? "cached" : "free"] += 1;
        context.fillStyle = state ? colour("cached") : colour("faint");
        box(context, x, y, size, radius);
      } else {
        counts.used += 1;
        if (held > 1) counts.shared += 1;
        this.#held(context, { x, y, size, radius, cell, held, isKeyed: state & 1 });
      }
      if (!isQuiet && this.#store.now - this.#store.changedAt[cell] < FLASH_S && this.#store.changedAt[cell]) {
        context.strokeStyle = colour("ink");
        context.globalAlpha = 0.55;
        context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
        context.globalAlpha = 1;
      }
    }
    this.#mark(context);
    this.#tell(counts);
  }

  /** A block that is held; stripes for up to three of those who share it. */
  #held(context, { x, y, size, radius, cell, held, isKeyed }) {
    const uids = this.#store.holders.get(this.#store.blockOf(cell)) ?? [];
    const shown = uids.slice(0, 3);
    const alpha = isKeyed ? 1 : 0.6; // still being written
    if (shown.length < 2) {
      context.fillStyle = shown.length ? hueOf(shown[0], alpha) : colour("muted");
      box(context, x, y, size, radius);
    } else {
      shown.forEach((uid, i) => {
        context.fillStyle = hueOf(uid, alpha);
        context.fillRect(x + (i * size) / shown.length, y, size / shown.length, size);
      });
    }
    if (held > 1) {
      context.fillStyle = colour("ink");
      context.fillRect(x, y + size - Math.max(1.5, size / 6), size, Math.max(1.5, size / 6));
    }
  }

  #prepare(count) {
    const width = this.#canvas.clientWidth;
    let size = 18;
    const gapOf = (s) => (s >= 7 ? 2 : 1);
    const heightOf = (s) => Math.ceil(count / Math.max(1, Math.floor(width / (s + gapOf(s))))) * (s + gapOf(s));
    while (size > 3 && heightOf(size) > MAX_HEIGHT) size -= 1;
    const gap = gapOf(size);
    const columns = Math.max(1, Math.floor((width + gap) / (size + gap)));
    this.#shape = { columns, size, gap, pitch: (width + gap) / columns };
    return prepared(this.#canvas, Math.ceil(count / columns) * (size + gap));
  }

  #at(cell) {
    const { columns, size, gap, pitch } = this.#shape;
    return [Math.round((cell % columns) * pitch), Math.floor(cell / columns) * (size + gap)];
  }

  #mark(context) {
    if (this.#chosen === null) return;
    const { size } = this.#shape;
    const [x, y] = this.#at(this.#chosen);
    context.strokeStyle = colour("accent");
    context.lineWidth = 2;
    context.strokeRect(x - 1, y - 1, size + 2, size + 2);
    context.lineWidth = 1;
  }

  #tell(counts) {
    const { layout, counters } = this.#store;
    const part = layout.stride > 1 ? `; shown are the first ${number(layout.num_dense)} and one in ${number(layout.stride)} of the others` : "";
    byId("cache-sub").textContent = `${plural(layout.num_blocks, "block")} of ${layout.block_size} tokens${part}`;
    const used = layout.num_blocks - counters.num_free_blocks;
    const cachedShare = counts.cached / Math.max(1, counts.cached + counts.free);
    const cached = Math.round(counters.num_free_blocks * cachedShare);
    const usage = byId("usage");
    usage.children[0].style.width = `${(100 * used) / layout.num_blocks}%`;
    usage.children[1].style.width = `${(100 * cached) / layout.num_blocks}%`;
    const roughly = layout.stride > 1 ? "about " : "";
    const text = `${number(used)} in use, ${number(counts.shared)} shared, ${roughly}${number(cached)} cached but free, of ${number(layout.num_blocks)}`;
    usage.setAttribute("aria-label", text);
    usage.title = text;
    Object.assign(this.#canvas.dataset, { used: counts.used, shared: counts.shared, cached: counts.cached, free: counts.free });
    this.#canvas.setAttribute("aria-label", `Blocks of the KV cache: ${text}`);
    if (this.#chosen !== null && performance.now() - this.#askedAt > LOOK_AGAIN_MS) this.#ask();
  }

  // ---- choosing a block

  #point(event, byHand) {
    if (!this.#store.layout || (this.#byHand && !byHand)) return;
    const { columns, pitch, size, gap } = this.#shape;
    const column = Math.floor(event.offsetX / pitch);
    const cell = Math.floor(event.offsetY / (size + gap)) * columns + column;
    const isInside = column < columns && cell >= 0 && cell < this.#store.layout.num_cells;
    this.#byHand = byHand && isInside;
    this.#choose(isInside ? cell : null);
  }

  #key(event) {
    const { columns } = this.#shape;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.#store.layout) return;
    event.preventDefault();
    const last = this.#store.layout.num_cells - 1;
    const to = this.#chosen === null ? 0 : this.#chosen + moves[event.key];
    this.#byHand = true;
    this.#choose(Math.min(last, Math.max(0, to)));
  }

  #choose(cell) {
    if (cell === this.#chosen) return;
    this.#chosen = cell;
    this.#contents = null;
    this.draw();
    this.#show();
    clearTimeout(this.#timer);
    if (cell !== null) this.#timer = setTimeout(() => this.#ask(), 90);
  }

  async #ask() {
    const cell = this.#chosen;
    if (cell === null || this.#store.layout.view !== "full") return;
    this.#askedAt = performance.now();
    try {
      const contents = await json(`v1/engine/blocks/${this.#store.blockOf(cell)}`);
      if (cell === this.#chosen) {
        this.#contents = contents;
        this.#show();
      }
    } catch {
      // The stream tells what is wrong with the server; a block can wait.
    }
  }

  #show() {
    const cell = this.#chosen;
    if (cell === null) {
      this.#inspector.replaceChildren(el("span", { class: "hint" }, "Point at a block to see its tokens and its hash."));
      return;
    }
    const state = this.#store.cells[cell];
    const uids = this.#store.holders.get(this.#store.blockOf(cell)) ?? [];
    const held = state >> 1;
    const what = held > 1 ? `shared by ${held}` : held ? "held by" : state ? "cached, but free: the next request with this prefix takes it" : "free";
    const head = el("p", { class: "block-head" }, el("b", {}, `Block ${this.#store.blockOf(cell)}`), ` ${what} `);
    head.append(...uids.slice(0, 8).map((uid) => tag(uid)));
    this.#inspector.replaceChildren(head, ...this.#details());
  }

  #details() {
    const contents = this.#contents;
    if (this.#store.layout.view !== "full") return [el("p", { class: "hint" }, "This server does not show what is in blocks.")];
    if (!contents) return [el("p", { class: "hint" }, "…")];
    const facts = el("p", { class: "hash" });
    if (contents.index !== null) facts.append(`place ${contents.index} of the prompt’s blocks · `);
    facts.append(contents.key ? `hash ${contents.key.slice(0, 12)}… ${contents.parent_key ? `after ${contents.parent_key.slice(0, 12)}…` : "(the first of its prefix)"}` : "no hash yet: not full");
    const texts = contents.texts.length ? contents.texts : contents.token_ids.map(String);
    const tokens = el("p", { class: "tokens" }, ...texts.map((text, i) => el("span", { title: `token ${contents.token_ids[i]}` }, visible(text))));
    return [facts, tokens];
  }
}

/** A request's number in its colour. */
export function tag(uid) {
  const made = el("span", { class: "tag" }, `#${uid}`);
  made.style.setProperty("--hue", hueOf(uid));
  return made;
}

/** White space that can be seen. */
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

function box(context, x, y, size, radius) {
  if (radius === 0) {
    context.fillRect(x, y, size, size);
    return;
  }
  context.beginPath();
  context.roundRect(x, y, size, size, radius);
  context.fill();
}
