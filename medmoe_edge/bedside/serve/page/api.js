// Talks to the service: sends the token, waits while it is busy, reads its errors and events.

import { words } from "./language.js";

let token = ""; // in memory only
let asking = null; // the one dialog that is open, a promise
let askForToken = async () => null;

/** What went wrong in the service's words: what, and what to do about it. */
export class Problem extends Error {
  constructor(message, remedy, code = "") {
    super(message);
    Object.assign(this, { remedy, code });
  }
}

/** Have `ask(why)` called where a token is needed; it gives one, or null. */
export function onToken(ask) {
  askForToken = ask;
}

export const get = (path) => request(path, {});

/** Send a form; `busy(seconds)` is told each second for how long the service wants us to wait. */
export function post(path, fields, { signal, busy = () => {} } = {}) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value instanceof Blob) body.append(name, value, "image"); // a file's own name may tell whose it is
    else body.append(name, value);
  }
  return request(path, { method: "POST", body, signal }, busy);
}

async function request(path, options, busy = () => {}) {
  for (;;) {
    const used = token;
    const response = await reached(path, options);
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status === 429) {
      await wait(Number(response.headers.get("Retry-After")) || 1, options.signal, busy);
    } else if (response.status !== 401 || !(await renewed(used, problem))) {
      throw problem;
    }
  }
}

async function reached(path, options) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  try {
    return await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(words("no.service"), words("no.service.do"));
  }
}

async function problemOf(response) {
  try {
    const { message, remedy, code } = (await response.json()).error;
    return new Problem(message, remedy, code);
  } catch {
    return new Problem(words("status", { status: response.status }), words("status.do"));
  }
}

/** Whether there is another token than the one that was refused. */
async function renewed(used, problem) {
  if (token === used) {
    asking ??= askForToken(used ? problem.message : "").finally(() => (asking = null));
    token = (await asking) ?? token;
  }
  return token !== used;
}

async function wait(seconds, signal, busy) {
  for (let left = seconds; left > 0; left -= 1) {
    busy(left);
    await new Promise((resolve, reject) => {
      const stop = () => reject(signal.reason);
      if (signal?.aborted) return stop();
      const timer = setTimeout(() => (signal?.removeEventListener("abort", stop), resolve()), 1000);
      signal?.addEventListener("abort", () => (clearTimeout(timer), stop()), { once: true });
    });
  }
}

/** The server-sent events of a response: their name, and their data from JSON. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    if (!(rest.slice(-1) + value).includes("\n\n")) {
      rest += value; // a picture comes in many pieces, none of which is worth splitting
      continue;
    }
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

/** Bytes of base64. */
export function bytes(text) {
  return Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}
