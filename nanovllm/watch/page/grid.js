// The KV cache: a grid of the blocks that are in use, each free, cached but free, held by one or
// shared, in their colours; and a bar of all blocks, with the grid's part framed.

import { json } from "./api.js";
import { byId, colour, el, hueOf, isCalm, legend, number, plural, prepared } from "./dom.js";

const MAX_HEIGHT = 172;
const LARGE = 24; // pixels of a block
const READABLE = 10; // rather than make them smaller, only a part is shown
const BAR_HEIGHT = 14;
const FINE = window.matchMedia("(hover: hover)").matches;
const FLASH_S = 0.5;
const LOOK_AGAIN_MS = 700;

export class Grid {
  #store;
  #canvas = byId("grid");
  #inspector = byId("inspector");
  #chosen = null; // cell
  #byHand = false; // chosen with the keyboard or a click: stays when the pointer leaves
  #shape = { columns: 1, size: 8, gap: 1, pitch: 9 };
  #first = 0; // cells that the grid shows
  #count = 0;
  #bar = byId("overview");
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
    for (const kind of ["pointerdown", "pointermove"]) {
      this.#bar.addEventListener(kind, (event) => (kind === "pointerdown" || event.buttons) && this.#jump(event));
    }
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
    const { context } = this.#prepare();
    const { size } = this.#shape;
    const radius = size >= 9 ? 2 : size >= 6 ? 1 : 0;
    const counts = { used: 0, shared: 0, cached: 0, free: 0 };
    const isQuiet = isCalm();
    for (let cell = 0; cell < layout.num_cells; cell += 1) {
      const state = cells[cell];
      const held = state >> 1;
      counts[held ? "used" : state ? "cached" : "free"] += 1;
      if (held > 1) counts.shared += 1;
      if (cell < this.#first || cell >= this.#first + this.#count) continue;
      const [x, y] = this.#at(cell);
      if (held === 0) {
        context.fillStyle = state ? colour("cached") : colour("faint");
        box(context, x, y, size, radius);
      } else {
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
    this.#overview();
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

  /** All blocks where that leaves them readable; else those that are held, and what fits beside. */
  #prepare() {
    const { num_cells: count } = this.#store.layout;
    const width = this.#canvas.clientWidth;
    const gapOf = (s) => (s >= 7 ? 2 : 1);
    const columnsOf = (s) => Math.max(1, Math.floor((width + gapOf(s)) / (s + gapOf(s))));
    const fitting = (s) => columnsOf(s) * Math.floor(MAX_HEIGHT / (s + gapOf(s)));
    const [from, to] = this.#heldRange();
    const isWhole = count <= fitting(READABLE);
    let size = isWhole ? LARGE : READABLE;
    while (size > (isWhole ? READABLE : 3) && fitting(size) < (isWhole ? count : to - from)) size -= 1;
    const columns = columnsOf(size);
    this.#count = Math.min(count, fitting(size));
    if (this.#count === count) this.#first = 0;
    // It stays where it is as long as that shows what is held.
    else if (from < this.#first || to > this.#first + this.#count) this.#first = Math.floor(from / columns) * columns;
    if (this.#chosen !== null) this.#reveal(columns);
    this.#first = Math.max(0, Math.min(this.#first, Math.ceil((count - this.#count) / columns) * columns));
    this.#count = Math.min(this.#count, count - this.#first);
    const gap = gapOf(size);
    this.#shape = { columns, size, gap, pitch: (width + gap) / columns };
    return prepared(this.#canvas, Math.ceil(this.#count / columns) * (size + gap));
  }

  /** From the first block that is held to the last. Nothing held: what is shown already. */
  #heldRange() {
    const { cells } = this.#store;
    let [from, to] = [cells.length, 0];
    for (let cell = 0; cell < cells.length; cell += 1) {
      if (cells[cell] < 2) continue;
      if (cell < from) from = cell;
      to = cell + 1;
    }
    return to ? [from, to] : [this.#first, this.#first];
  }

  #reveal(columns) {
    const row = Math.floor(this.#chosen / columns) * columns;
    if (this.#chosen < this.#first) this.#first = row;
    else if (this.#chosen >= this.#first + this.#count) this.#first = row + columns - this.#count;
  }

  /** Every block in its place on one line: held, cached or free; the grid's part is framed. */
  #overview() {
    const { cells } = this.#store;
    const { context, width, height } = prepared(this.#bar, BAR_HEIGHT);
    const [top, high] = [3, height - 6];
    context.fillStyle = colour("faint");
    context.fillRect(0, top, width, high);
    const x = (cell) => (cell / cells.length) * width;
    for (const [isIt, fill] of [[(state) => state === 1, "cached"], [(state) => state > 1, "accent"]]) {
      context.fillStyle = colour(fill);
      for (let from = 0; from < cells.length; from += 1) {
        if (!isIt(cells[from])) continue;
        let to = from + 1;
        while (to < cells.length && isIt(cells[to])) to += 1;
        context.fillRect(x(from), top, Math.max(1, x(to) - x(from)), high);
        from = to;
      }
    }
    context.strokeStyle = colour("ink");
    context.strokeRect(x(this.#first) + 0.5, 0.5, Math.max(3, x(this.#count)) - 1, height - 1);
  }

  #jump(event) {
    const { layout } = this.#store;
    if (!layout || this.#count === layout.num_cells) return;
    const { columns } = this.#shape;
    const middle = Math.floor((event.offsetX / this.#bar.clientWidth) * layout.num_cells);
    this.#first = Math.max(0, Math.floor((middle - this.#count / 2) / columns) * columns);
    this.#canvas.focus();
    this.#byHand = true;
    this.#choose(Math.min(layout.num_cells - 1, Math.max(0, middle)));
  }

  #at(cell) {
    const { columns, size, gap, pitch } = this.#shape;
    const place = cell - this.#first;
    return [Math.round((place % columns) * pitch), Math.floor(place / columns) * (size + gap)];
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
    const some = this.#count < layout.num_cells ? `; below, those around what is in use` : "";
    byId("cache-sub").textContent = `${plural(layout.num_blocks, "block")} of ${layout.block_size} tokens${part}${some}`;
    const used = layout.num_blocks - counters.num_free_blocks;
    const cachedShare = counts.cached / Math.max(1, counts.cached + counts.free);
    const cached = Math.round(counters.num_free_blocks * cachedShare);
    const roughly = layout.stride > 1 ? "about " : "";
    const text = `${number(used)} in use, ${number(counts.shared)} shared, ${roughly}${number(cached)} cached but free, of ${number(layout.num_blocks)}`;
    this.#bar.setAttribute("aria-label", text);
    this.#bar.title = text;
    Object.assign(this.#canvas.dataset, { ...counts, first: this.#first, shown: this.#count, size: this.#shape.size });
    this.#canvas.setAttribute("aria-label", `Blocks of the KV cache: ${text}`);
    if (this.#chosen !== null && performance.now() - this.#askedAt > LOOK_AGAIN_MS) this.#ask();
  }

  // ---- choosing a block

  #point(event, byHand) {
    if (!this.#store.layout || (this.#byHand && !byHand)) return;
    const { columns, pitch, size, gap } = this.#shape;
    const column = Math.floor(event.offsetX / pitch);
    const place = Math.floor(event.offsetY / (size + gap)) * columns + column;
    const cell = this.#first + place;
    const isInside = column < columns && place >= 0 && place < this.#count;
    this.#byHand = byHand && isInside;
    this.#choose(isInside ? cell : null);
  }

  #key(event) {
    const { columns } = this.#shape;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.#store.layout) return;
    event.preventDefault();
    const last = this.#store.layout.num_cells - 1;
    const to = this.#chosen === null ? this.#first : this.#chosen + moves[event.key];
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
      this.#inspector.replaceChildren(el("span", { class: "hint" }, `${FINE ? "Point at" : "Tap"} a block to see its tokens and its hash.`));
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
