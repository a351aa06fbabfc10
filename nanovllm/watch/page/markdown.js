// Markdown as elements: `marked` reads it, and nothing ever becomes markup (html stays text).

import { Lexer } from "./marked.js";
import { copyButton, el } from "./dom.js";

const SAFE = /^(https?:|mailto:)/i;
const lexer = { gfm: true, breaks: true };

/** The elements that a text stands for; unfinished ones too, while it is still being written. */
export function markdown(text) {
  const found = el("div", { class: "words" });
  try {
    found.append(...blocks(Lexer.lex(text, lexer)));
  } catch {
    found.append(el("p", { class: "plain" }, text)); // what cannot be read is shown as it is
  }
  return found;
}

const blocks = (tokens) => tokens.map(block).filter(Boolean);

function block(token) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading": // the page's own headings come before those of an answer
      return el(`h${Math.min(6, token.depth + 1)}`, {}, ...inline(token.tokens));
    case "code":
      return el("div", { class: "code" }, copyButton(() => token.text, "Copy code"), el("pre", { tabindex: "0" }, el("code", {}, token.text)));
    case "blockquote":
      return el("blockquote", {}, ...blocks(token.tokens));
    case "list":
      return el(token.ordered ? "ol" : "ul", { start: token.ordered && token.start !== 1 ? token.start : null }, ...token.items.map(item));
    case "table":
      return el("div", { class: "table", tabindex: "0" }, el("table", {}, el("thead", {}, row(token.header, "th")), el("tbody", {}, ...token.rows.map((cells) => row(cells, "td")))));
    case "hr":
      return el("hr");
    case "paragraph":
      return el("p", {}, ...inline(token.tokens));
    case "text":
      return el("span", {}, ...inline(token.tokens ?? [token]));
    default:
      return el("p", { class: "plain" }, token.raw);
  }
}

function item(token) {
  const mark = token.task ? [token.checked ? "☑ " : "☐ "] : [];
  return el("li", {}, ...mark, ...blocks(token.tokens.filter((one) => one.type !== "checkbox")));
}

const row = (cells, tag) => el("tr", {}, ...cells.map((cell) => el(tag, { "data-align": cell.align }, ...inline(cell.tokens))));

function inline(tokens) {
  return tokens.map((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return el(token.type, {}, ...inline(token.tokens));
      case "codespan":
        return el("code", {}, token.text);
      case "br":
        return el("br");
      case "link":
        if (!SAFE.test(token.href)) return token.raw;
        return el("a", { href: token.href, rel: "noreferrer", target: "_blank" }, ...inline(token.tokens));
      case "text":
        return token.tokens ? el("span", {}, ...inline(token.tokens)) : token.text;
      case "escape":
        return token.text;
      default: // images and html: what was written
        return token.raw;
    }
  });
}
