// The server's API: keys, JSON, and server-sent events read by fetch (EventSource sends no key).

const KEY = "nanovllm-key";

export class ApiError extends Error {
  constructor(status, message, code, retryAfter) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** The response, if it is a success. Throws `ApiError` with the server's own words. */
async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const text = await response.text();
  let error = { message: text || response.statusText, code: null };
  try {
    error = JSON.parse(text).error ?? error;
  } catch {
    // not from the server itself but from something before it
  }
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-wanted"));
  throw new ApiError(response.status, error.message, error.code, Number(response.headers.get("retry-after")) || 1);
}

export async function json(path, options) {
  return (await ask(path, options)).json();
}

/** Yields the events of a stream, decoded. Ends with it; throws if it breaks. onComment: is told
 * the comments between them. */
export async function* events(path, { onComment, ...options } = {}) {
  const response = await ask(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const parts = pending.split("\n\n");
      pending = parts.pop();
      for (const part of parts) {
        if (part.startsWith(": ")) onComment?.(part.slice(2));
        if (!part.startsWith("data: ")) continue;
        const content = part.slice(6);
        if (content === "[DONE]") return;
        const event = JSON.parse(content);
        if (event.error) throw new ApiError(500, event.error.message, event.error.code, 1);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
