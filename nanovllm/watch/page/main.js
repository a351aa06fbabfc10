// The page as a whole: tabs, theme, shortcuts, key and the line to the engine.

import { apiKey, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, readPalette } from "./dom.js";
import { Engine } from "./engine.js";
import { Life } from "./life.js";
import { Pace } from "./pace.js";
import { Store } from "./store.js";
import { closeTip, watchTerms } from "./terms.js";
import { Tour } from "./tour.js";

const THEME = "nanovllm-theme";
const WIDE = window.matchMedia("(min-width: 1080px)");
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const TABS = ["chat", "engine", "life"];

const store = new Store();
const life = new Life(store);
const engine = new Engine(store, (uid) => {
  life.choose(uid);
  show("life");
});
const pace = new Pace(store);
const tour = new Tour(store, pace, { onStart: () => show("engine"), onStep: (step) => engine.steps.choose(step) });
const chat = new Chat((requestId) => {
  const request = life.find(requestId);
  if (!request) return false;
  life.choose(request.uid);
  show("life");
  return true;
});

// ---- panels: beside the chat there is room for one on a wide screen

let panel = "chat";
let side = "engine";

function show(wanted, focus = false) {
  panel = wanted;
  if (wanted !== "chat") side = wanted;
  const isWide = WIDE.matches;
  const visible = isWide ? ["chat", side] : [panel];
  for (const name of TABS) {
    byId(`panel-${name}`).hidden = !visible.includes(name);
    const tab = byId(`tab-${name}`);
    const isOn = isWide ? name === side : name === panel;
    tab.setAttribute("aria-selected", isOn);
    tab.tabIndex = isOn ? 0 : -1;
  }
  byId("tab-chat").hidden = isWide;
  draw();
  if (focus) (wanted === "chat" ? byId("composer") : byId(`tab-${wanted}`)).focus();
}

for (const name of TABS) byId(`tab-${name}`).addEventListener("click", () => show(name));
document.querySelector(".tabs").addEventListener("keydown", (event) => {
  const shown = TABS.filter((name) => !byId(`tab-${name}`).hidden);
  const at = shown.findIndex((name) => byId(`tab-${name}`) === document.activeElement);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (at < 0 || !step) return;
  const next = shown[(at + step + shown.length) % shown.length];
  show(next);
  byId(`tab-${next}`).focus();
});
WIDE.addEventListener("change", () => show(panel));

// ---- theme

function applyTheme() {
  const chosen = localStorage.getItem(THEME);
  document.documentElement.dataset.theme = chosen ?? (DARK.matches ? "dark" : "light");
  readPalette();
  draw();
}

function toggleTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  // What the system prefers need not be remembered, and follows it when it changes.
  if (next === (DARK.matches ? "dark" : "light")) localStorage.removeItem(THEME);
  else localStorage.setItem(THEME, next);
  applyTheme();
}

byId("theme-button").addEventListener("click", toggleTheme);
DARK.addEventListener("change", applyTheme);

// ---- keyboard

const SHORTCUTS = {
  "/": () => show("chat", true),
  c: () => show("chat", true),
  e: () => show("engine", true),
  r: () => show("life", true),
  t: toggleTheme,
  s: () => store.pace.is_allowed && pace.step(),
  p: () => store.pace.is_allowed && (pace.isHeld ? pace.release() : pace.hold()),
  "?": () => byId("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (closeTip() || chat.stop()) event.preventDefault();
    else if (event.target === byId("composer")) byId("composer").blur();
    return;
  }
  const isTyping = event.target.closest("input, textarea, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !(event.key in SHORTCUTS)) return;
  event.preventDefault();
  SHORTCUTS[event.key]();
});
byId("help-button").addEventListener("click", () => byId("help").showModal());

// ---- key

function askForKey() {
  const dialog = byId("key");
  byId("key-button").hidden = false;
  if (!dialog.open) dialog.showModal();
}

byId("key-button").addEventListener("click", askForKey);
byId("key-form").addEventListener("submit", () => {
  useKey(byId("key-input").value.trim());
  byId("key-input").value = "";
  document.dispatchEvent(new CustomEvent("key-given"));
});
document.addEventListener("key-wanted", askForKey);
if (apiKey()) byId("key-button").hidden = false;

// ---- the engine

const WORDS = { connecting: "connecting", ready: "ready", loading: "loading", away: "the server is gone", refused: "chat only", locked: "locked" };

function onState(state, text) {
  const status = byId("status");
  const said = state === "ready" ? `${store.layout.model} on ${store.layout.device}` : WORDS[state];
  if (status.dataset.state !== state || byId("status-text").textContent !== said) {
    status.dataset.state = state;
    status.title = text;
    byId("status-text").textContent = state === "loading" ? text : said;
  }
  if (state === "refused") engine.refuse(text);
}

let isScheduled = false;

function draw() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    pace.draw();
    if (!byId("panel-engine").hidden) engine.draw();
    if (!byId("panel-life").hidden) life.draw();
  });
}

store.addEventListener("change", draw);
new ResizeObserver(draw).observe(document.querySelector("main"));
watchTerms();
byId("tour-button").addEventListener("click", () => tour.start());
applyTheme();
show("chat");
if (WIDE.matches) byId("composer").focus();
store.follow(onState);
