// What somebody has written: a text, and where it was a model, the tokens that it is made of and what they could have been.

const utf8 = new TextEncoder();
export const asText = (bytes) => new TextDecoder().decode(new Uint8Array(bytes));

/** Part of a character may be told as `bytes:\xe2\x80` where the API has no room for bytes. */
function bytesOf(token) {
  const told = /^bytes:((?:\\x[0-9a-f]{2})+)$/i.exec(token);
  return told ? told[1].split("\\x").slice(1).map((hex) => parseInt(hex, 16)) : [...utf8.encode(token)];
}

/** A token as this page knows it: {name, bytes, p, others}; p is null where it was not told. */
const asToken = ({ token, logprob, bytes, top_logprobs }) => ({
  name: token,
  bytes: bytes ?? bytesOf(token),
  p: typeof logprob === "number" ? Math.exp(logprob) : null,
  others: (top_logprobs ?? []).map(asToken),
});

/** The tokens of a choice, from either form of the API: that of conversations or that of completions. */
export function tokensOf({ logprobs }) {
  if (logprobs?.content) return logprobs.content.map(asToken);
  return (logprobs?.tokens ?? []).map((token, i) => {
    const top = Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([name, logprob]) => ({ token: name, logprob }));
    return asToken({ token, logprob: logprobs.token_logprobs[i], top_logprobs: top });
  });
}

/** Whether bytes end where a character does. A token may be any part of one: an emoji is often three or four tokens. */
function endsWhole(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes.at(-back);
    if (byte < 0x80) return true;
    if (byte >= 0xc0) return back >= (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
  }
  return true;
}

export class Writing {
  text = "";
  pieces = []; // [{text, tokens}]: whole characters, each piece of as few tokens as that allows; never changed again
  tokens = 0;
  finish = null; // why the model ended: "stop", "length"
  usage = null;
  status = "waiting"; // then "writing", and "done", "stopped" or "failed"
  note = ""; // what went wrong, or what is waited for
  #open = []; // tokens that are not in a piece yet
  #at = 0; // how much of the text the pieces have

  /** A text of which no tokens are known: what people wrote, or what was loaded. */
  static plain(text, own = false) {
    return Object.assign(new Writing(), { text, own, status: "done" });
  }

  add(text, tokens) {
    if (this.status === "waiting") Object.assign(this, { status: "writing", began: performance.now() });
    this.text += text;
    this.tokens += tokens.length;
    this.#open.push(...tokens);
    this.#cut();
  }

  end(status, note = "") {
    // Tokens that are left are those that ended the text: a marker, or a stop string that was cut off.
    if (this.#open.length) this.#take(this.rest, this.#open.length);
    this.seconds = (performance.now() - (this.began ?? performance.now())) / 1000;
    Object.assign(this, { status, note });
  }

  /** Take the open tokens into pieces, as far as the text goes, which may lag behind its tokens. */
  #cut() {
    for (let n = 1; n <= this.#open.length; n++) {
      const bytes = this.#open.slice(0, n).flatMap((token) => token.bytes);
      if (!endsWhole(bytes)) continue;
      let piece = asText(bytes);
      // Some tokenizers have a space before the first word that the text has not.
      if (this.#at === 0 && !this.text.startsWith(piece)) piece = piece.trimStart();
      // Where a token's bytes were not told, the text of the token after it shows where it ends.
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

  /** The text that has no tokens of its own: all that a server without probabilities sends, or the very end for a moment. */
  get rest() {
    return this.text.slice(this.#at);
  }

  /** The first `length` characters, with as many of the pieces as are whole in them. */
  upTo(length) {
    const part = Writing.plain(this.text.slice(0, length), this.own);
    for (const piece of this.pieces) {
      if (part.#at + piece.text.length > length) break;
      part.pieces.push(piece);
      part.#at += piece.text.length;
    }
    return part;
  }

  /** A line about how it went. */
  get summary() {
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    return [
      tokens && `${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`,
      tokens > 4 && this.seconds > 0.2 && `${Math.round(tokens / this.seconds)} a second`,
      this.status === "stopped" && "stopped",
      this.finish === "length" && "cut off at the limit (max tokens, or a full context)",
      this.status === "done" && !this.text.trim() && "the model said nothing",
    ].filter(Boolean).join(" · ");
  }
}
