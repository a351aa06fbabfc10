// Lives of requests as a Chrome trace: for chrome://tracing, Perfetto and the like.
// Format: "Trace Event Format" (Google), JSON object form; times are microseconds.

const ENGINE = 1;
const REQUESTS = 2;

/** The trace of some requests and of the steps they ran in. */
export function chromeTrace(requests, steps) {
  const origin = Math.min(...requests.map((request) => request.queuedAt));
  const us = (time) => Math.round((time - origin) * 1e6);
  const named = (name, pid, tid, args) => ({ ph: "M", name, pid, tid, args });
  const events = [
    named("process_name", ENGINE, 0, { name: "engine" }),
    named("thread_name", ENGINE, 0, { name: "steps" }),
    named("process_name", REQUESTS, 0, { name: "requests" }),
  ];
  const span = (name, pid, tid, from, to, args = {}) => events.push({ ph: "X", cat: "engine", name, pid, tid, ts: us(from), dur: Math.max(1, us(to) - us(from)), args });
  const ran = new Set();
  for (const request of requests) {
    const tid = request.uid + 1;
    const mark = (name, at, args = {}) => events.push({ ph: "i", s: "t", cat: "engine", name, pid: REQUESTS, tid, ts: us(at), args });
    events.push(named("thread_name", REQUESTS, tid, { name: `#${request.uid}${request.id ? ` ${request.id}` : ""}` }));
    mark("queued", request.queuedAt, { prompt_tokens: request.prompt, cached_tokens: request.cached });
    for (const wait of request.waits) span(wait.cause ? `waiting: ${wait.cause}` : "waiting", REQUESTS, tid, wait.from, wait.to);
    for (const chunk of request.chunks) {
      ran.add(chunk.step);
      span("prefill", REQUESTS, tid, chunk.from, chunk.to, { step: chunk.step, start: chunk.start, tokens: chunk.tokens });
    }
    for (const decode of request.decodes) {
      ran.add(decode.step);
      span("decode", REQUESTS, tid, decode.from, decode.to, { step: decode.step });
    }
    if (request.ttft) mark("first token", request.queuedAt + request.ttft);
    for (const at of request.preemptedAt) mark("preempted", at);
    if (request.end) mark(`ended: ${request.end.reason}`, request.end.ended_at, request.end);
  }
  for (const step of steps) {
    if (!ran.has(step.step)) continue;
    const chunks = step.chunks.map(([uid, start, tokens]) => ({ request: uid, start, tokens }));
    span(`step ${step.step}`, ENGINE, 0, step.started_at, step.ended_at, { decodes: step.num_decodes, chunks });
  }
  return { traceEvents: events, displayTimeUnit: "ms", otherData: { source: "nanovllm" } };
}

/** Give it to the user as a file. */
export function download(name, content) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
