// Building and measuring elements. Text only ever becomes text: nothing here parses markup.

/** An element with attributes, properties of `on…` handlers, and children (strings are text). */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** A canvas's drawing context in CSS pixels, cleared; sized to its box, `height` high. */
export function prepared(canvas, height) {
  const width = Math.max(1, canvas.clientWidth);
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

let palette = {};
let isDark = false;

/** Read the theme's colours once per change of theme: canvases cannot use CSS variables. */
export function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const names = ["bg", "panel", "line", "ink", "muted", "faint", "accent", "decode", "cached", "bad", "seats", "budget", "kv", "other"];
  palette = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  isDark = document.documentElement.dataset.theme === "dark";
}

export const colour = (name) => palette[name];

/** A request's own colour: neighbours in time are far apart in hue, and none has decode's gold. */
export function hueOf(uid, alpha = 1) {
  const hue = (130 + ((65 + uid * 110.77) % 290)) % 360;
  return isDark ? `oklch(0.76 0.115 ${hue} / ${alpha})` : `oklch(0.63 0.135 ${hue} / ${alpha})`;
}

export const isCalm = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

export function milliseconds(ms) {
  if (ms === null || ms === undefined || !Number.isFinite(ms)) return "–";
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  if (ms >= 100) return `${Math.round(ms)} ms`;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

const plain = new Intl.NumberFormat("en");
export const number = (value) => plain.format(value);

export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

/** A button that copies what `text` returns. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "link copy" }, label);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/** A legend: [kind of swatch, text] each. */
export function legend(list, entries) {
  list.replaceChildren(...entries.map(([kind, text]) => el("li", {}, el("i", { class: `swatch ${kind}` }), text)));
}
