/** The server: its requests, its errors in its own words, and the events of its streams. */

import { Failure } from "./failure.js";

const KEY = "gossamer-api-key";
let keyOfPage = "";

// Some browsers refuse storage altogether; then the key lives as long as the page.
const session = (use) => { try { return use(sessionStorage); } catch { return null; } };

export const apiKey = () => session((storage) => storage.getItem(KEY)) ?? keyOfPage;

export function setApiKey(key) {
  keyOfPage = key;
  session((storage) => storage.setItem(KEY, key));
}

/**
 * The response of the server, if it is a good one.
 * Throws a Failure with what the server said, or an AbortError if the signal says so.
 */
export async function call(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const key = apiKey();
  if (key) headers.authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`; // headers are bytes
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("the server cannot be reached");
  }
  if (response.ok) return response;
  const { status } = response;
  if (status === 401) throw new Failure(key ? "the server does not know this API key" : "the server needs an API key", { status });
  const answer = await response.json().catch(() => null); // what stands between us and the server may not speak JSON
  throw new Failure(answer?.error?.message ?? `the server answered with status ${status}`, { status });
}

/** The events of a streamed answer, decoded. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Failure("the connection to the server was lost");
    });
    if (done) throw new Failure("the server ended the answer too early");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message);
      yield event;
    }
  }
}
