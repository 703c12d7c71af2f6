// Requests to the server of this page.

/** An error with a message for the user. */
export class UserError extends Error {}
export const UNREACHABLE = "The server cannot be reached. Your text is kept, and the page reconnects automatically.";
export const CONNECTION_LOST = "The connection was lost before the answer was complete.";

/** The API key, and the callbacks of the page. */
export const connection = { key: "", requestKey: async () => false, onUnreachable: () => {} };

/** The error message of a response, in OpenAI's form or another, or a message for its status. */
export async function errorMessage(response) {
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? said?.detail ?? said?.message;
  if (typeof message === "string" && message) return message;
  if (said?.status === "loading") return "The server is still loading the model.";
  if (response.status === 503) return "The server does not accept requests: it is stopping or not ready yet.";
  if (response.status === 429) return "The server is busy.";
  return `The server returned the status ${response.status}.`;
}

const sleep = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

/** Sends a request. Asks for an API key if one is needed; with `onWait`, retries while the server is busy. */
export async function request(path, { body, signal, onWait } = {}) {
  for (let tries = 1; ; ) {
    const headers = { "Content-Type": "application/json", ...(connection.key && { Authorization: `Bearer ${connection.key}` }) };
    const post = body && { method: "POST", body: JSON.stringify(body) };
    let response;
    try {
      response = await fetch(path, { ...post, headers, signal, cache: "no-store" });
    } catch (error) {
      if (signal?.aborted) throw error;
      connection.onUnreachable(UNREACHABLE);
      throw new UserError("The server could not be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (await connection.requestKey()) continue;
      throw Object.assign(new UserError("The server requires an API key."), { key: true });
    }
    const words = await errorMessage(response);
    if (response.status === 429 && onWait && tries++ < 5) {
      const seconds = Math.min(Math.max(Number(response.headers.get("Retry-After")) || 1, 0.2), 30);
      onWait(`${words} Trying again in ${Math.ceil(seconds)} s …`);
      await sleep(seconds, signal);
      continue;
    }
    if (response.status === 503) connection.onUnreachable(words);
    throw new UserError(words);
  }
}

/** The events of a stream. Lines and characters may be split between chunks. */
export async function* streamEvents(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  for (let pending = "", ended = false; !ended; ) {
    const { value, done } = await reader.read();
    ended = done;
    const lines = (pending + decoder.decode(value, { stream: !done })).split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // a comment, which keeps the connection alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new UserError(event.error.message ?? "The server stopped with an error.");
      yield event;
    }
  }
  throw new UserError(CONNECTION_LOST);
}
