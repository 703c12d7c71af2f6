// Speaking with the server that this page came from, and with no other.

/** Something that went wrong, in words for people. */
export class Problem extends Error {}
export const UNREACHABLE = "The server cannot be reached. What you have written is kept, and this page tries again by itself.";
export const BROKEN = "The connection broke off before the answer was finished.";

/** What the page does for this module, and the key that it was given. */
export const link = { key: "", askKey: async () => false, lost: () => {} };

/** What a server says of an error, in OpenAI's form or another's, or what its status means. */
export async function wordsOf(response) {
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? said?.detail ?? said?.message;
  if (typeof message === "string" && message) return message;
  if (said?.status === "loading") return "The server is there, and still loading the model.";
  if (response.status === 503) return "The server lets nobody in just now: it is about to stop, or not ready yet.";
  if (response.status === 429) return "The server is busy with other requests.";
  return `The server answered with the status ${response.status}.`;
}

const sleep = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

/** The answer to a request. Asks for a key where one is needed; with `onWait`, is patient with a server that is busy. */
export async function request(path, { body, signal, onWait } = {}) {
  for (let tries = 1; ; ) {
    const headers = { "Content-Type": "application/json", ...(link.key && { Authorization: `Bearer ${link.key}` }) };
    const post = body && { method: "POST", body: JSON.stringify(body) };
    let response;
    try {
      response = await fetch(path, { ...post, headers, signal, cache: "no-store" });
    } catch (error) {
      if (signal?.aborted) throw error;
      link.lost(UNREACHABLE);
      throw new Problem("The server could not be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (await link.askKey()) continue;
      throw Object.assign(new Problem("The server asks for a key, and none was given."), { key: true });
    }
    const words = await wordsOf(response);
    if (response.status === 429 && onWait && tries++ < 5) {
      const seconds = Math.min(Math.max(Number(response.headers.get("Retry-After")) || 1, 0.2), 30);
      onWait(`${words} Trying again in ${Math.ceil(seconds)} s …`);
      await sleep(seconds, signal);
      continue;
    }
    if (response.status === 503) link.lost(words);
    throw new Problem(words);
  }
}

/** The events of a stream. A line may be parted between two pieces of the stream, and so may a character. */
export async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  for (let rest = "", ended = false; !ended; ) {
    const { value, done } = await reader.read();
    ended = done;
    const lines = (rest + decoder.decode(value, { stream: !done })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // a comment, which keeps the connection alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(event.error.message ?? "The server could not go on.");
      yield event;
    }
  }
  throw new Problem(BROKEN);
}
