// One plan, and why it is so: what a step ran, what limited it, and what the others wait for.

import { el, milliseconds, number, plural } from "./dom.js";
import { tag } from "./grid.js";
import { told } from "./terms.js";

export const CAUSES = {
  "": "for the next step",
  seats: "for a seat in the batch",
  budget: "for token budget",
  kv: "for free blocks",
  sibling: "for its sibling’s prompt",
  results: "for its last tokens",
  client: "for its client to read",
};
const MAX_NAMED = 8;

/** Lines about a step; isLast: it is the latest, so what waits now waited for it. */
export function explain(step, store, isLast) {
  const { layout } = store;
  const chunks = new Map(step.chunks.map(([uid, start, tokens]) => [uid, { start, tokens }]));
  const decodes = store.uidsOf(step).filter((uid) => !chunks.has(uid));
  const total = step.num_decodes + step.chunks.reduce((sum, [, , tokens]) => sum + tokens, 0);
  const lines = [line(`[Step|step] ${number(step.step)} ran ${plural(total, "token")} in ${milliseconds((step.ended_at - step.started_at) * 1000)}. Its [plan]:`)];
  if (decodes.length) lines.push(line(`${plural(decodes.length, "[decode]", "[decodes|decode]")}, a token each:`, decodes));
  for (const [uid, { start, tokens }] of chunks) {
    const request = store.requests.get(uid);
    const total_ = request ? ` of ${number(Math.max(request.prompt, start + tokens))}` : "";
    const isWhole = request && start + tokens >= request.prompt;
    const cached = request && start && start === request.cached ? ` Its first ${number(start)} are those of a [shared prefix|prefix], and need no computing.` : "";
    const cut = isWhole ? (start ? " That is the rest of its prompt." : " That is its whole prompt.") : ` More of it does not fit the [budget].`;
    lines.push(line(`a [chunk] of`, [uid], `: tokens ${number(start)} to ${number(start + tokens)}${total_}.${cached}${cut}`));
  }
  if (chunks.size && step.budget < layout.max_num_batched_tokens) {
    lines.push(line(`Beside ${plural(step.num_decodes, "decode")} the [budget] was ${number(step.budget)} tokens instead of ${number(layout.max_num_batched_tokens)}, so that those who decode need not wait long.`));
  }
  for (const uid of step.preempted) lines.push(line("[Preempted|preemption]:", [uid], ". No block was free for those before it."));
  if (isLast) lines.push(...waits(store));
  return lines;
}

/** Who waits now, by what for. */
function waits(store) {
  const causes = new Map();
  for (const request of store.live) {
    if (request.state === "running") continue;
    causes.set(request.cause, [...(causes.get(request.cause) ?? []), request.uid]);
  }
  const { layout, counters } = store;
  const why = {
    seats: ` All ${number(layout.max_num_seqs)} [seats|seat] are taken.`,
    budget: " The [budget] went to those before.",
    kv: ` ${plural(counters.num_free_blocks, "[block] is", "[blocks|block] are")} free, which its prompt and the growth of the others need more than.`,
  };
  return [...causes].map(([cause, uids]) => line("", uids, ` ${uids.length === 1 ? "waits" : "wait"} ${CAUSES[cause]}.${why[cause] ?? ""}`));
}

function line(before, uids = [], after = "") {
  const shown = uids.slice(0, MAX_NAMED).flatMap((uid, i) => (i ? [" ", tag(uid)] : [tag(uid)]));
  const more = uids.length > MAX_NAMED ? [` and ${number(uids.length - MAX_NAMED)} more`] : [];
  return el("li", {}, ...told(before), before && uids.length ? " " : "", ...shown, ...more, ...told(after));
}
