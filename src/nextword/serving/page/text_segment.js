// A text of the user or of the model; the model's has tokens with their probabilities and alternatives.

const utf8 = new TextEncoder();
export const asText = (bytes) => new TextDecoder().decode(new Uint8Array(bytes));

/** The API writes an incomplete character as `bytes:\xe2\x80` where it has no field for bytes. */
function tokenBytes(token) {
  const known = /^bytes:((?:\\x[0-9a-f]{2})+)$/i.exec(token);
  return known ? known[1].split("\\x").slice(1).map((hex) => parseInt(hex, 16)) : [...utf8.encode(token)];
}

/** A token as {name, bytes, p, others}; p is null if it is unknown. */
const asToken = ({ token, logprob, bytes, top_logprobs }) => ({
  name: token,
  bytes: bytes ?? tokenBytes(token),
  p: typeof logprob === "number" ? Math.exp(logprob) : null,
  others: (top_logprobs ?? []).map(asToken),
});

/** The tokens of a choice of a chat completion or of a completion. */
export function tokensOf({ logprobs }) {
  if (logprobs?.content) return logprobs.content.map(asToken);
  return (logprobs?.tokens ?? []).map((token, i) => {
    const top = Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([name, logprob]) => ({ token: name, logprob }));
    return asToken({ token, logprob: logprobs.token_logprobs[i], top_logprobs: top });
  });
}

/** Whether bytes end at a character boundary. An emoji is often three or four tokens. */
function endsAtCharacter(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes.at(-back);
    if (byte < 0x80) return true;
    if (byte >= 0xc0) return back >= (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
  }
  return true;
}

export class TextSegment {
  text = "";
  pieces = []; // [{text, tokens}]: the shortest runs of tokens that are whole characters; append-only
  tokens = 0;
  finish = null; // finish reason: "stop" or "length"
  usage = null;
  dropped = 0; // number of oldest messages that the model did not see
  status = "waiting"; // then "writing", and "done", "stopped" or "failed"
  note = ""; // error message, or the reason for waiting
  #open = []; // tokens that are not yet in a piece
  #at = 0; // length of the text of the pieces

  /** A text without tokens: of the user, or loaded. */
  static plain(text, isUser = false) {
    return Object.assign(new TextSegment(), { text, isUser, status: "done" });
  }

  add(text, tokens) {
    if (this.status === "waiting") Object.assign(this, { status: "writing", began: performance.now() });
    this.text += text;
    this.tokens += tokens.length;
    this.#open.push(...tokens);
    this.#cut();
  }

  end(status, note = "") {
    // The remaining tokens ended the text: a special token, or a stop string that was removed.
    if (this.#open.length) this.#take(this.pending, this.#open.length);
    this.seconds = (performance.now() - (this.began ?? performance.now())) / 1000;
    Object.assign(this, { status, note });
  }

  /** Groups open tokens into pieces, as far as the text goes, which may lag behind its tokens. */
  #cut() {
    for (let n = 1; n <= this.#open.length; n++) {
      const bytes = this.#open.slice(0, n).flatMap((token) => token.bytes);
      if (!endsAtCharacter(bytes)) continue;
      let piece = asText(bytes);
      // Some tokenizers add a space before the first word, which the text does not have.
      if (this.#at === 0 && !this.text.startsWith(piece)) piece = piece.trimStart();
      // If the bytes of a token are unknown, the text of the next token shows where it ends.
      const next = n > 1 ? this.text.indexOf(asText(this.#open[n - 1].bytes), this.#at) : -1;
      if (this.text.startsWith(piece, this.#at)) this.#take(piece, n);
      else if (next >= 0 && next - this.#at <= 2 * n) this.#take(this.text.slice(this.#at, next), n - 1);
      else continue;
      n = 0;
    }
  }

  #take(text, n) {
    this.pieces.push({ text, tokens: this.#open.splice(0, n) });
    this.#at += text.length;
  }

  /** The text that is not yet in a piece: the end for a moment, or all of it from a server without probabilities. */
  get pending() {
    return this.text.slice(this.#at);
  }

  /** The first `length` characters, with the pieces that lie within them. */
  prefix(length) {
    const part = TextSegment.plain(this.text.slice(0, length), this.isUser);
    for (const piece of this.pieces) {
      if (part.#at + piece.text.length > length) break;
      part.pieces.push(piece);
      part.#at += piece.text.length;
    }
    return part;
  }

  /** Number of tokens, speed and finish reason. */
  get summary() {
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    return [
      tokens && `${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`,
      tokens > 4 && this.seconds > 0.2 && `${Math.round(tokens / this.seconds)} tokens/s`,
      this.status === "stopped" && "stopped",
      this.finish === "length" && `cut off at the limit (${this.limit ?? "max tokens or a full context"})`,
      this.dropped && `the context is full: without the ${this.dropped.toLocaleString("en")} oldest messages`,
      this.status === "done" && !this.text.trim() && "empty answer",
    ].filter(Boolean).join(" · ");
  }
}
