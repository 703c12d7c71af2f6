"""A stand-in for the server, without a model: the page and scripted answers. `python tests/page_server.py PORT`.

The message decides the reply: see `REPLIES`, and the words "slow", "busy", "refuse", "fail" and "break" in a message.
POST /control {"away": true} makes it go away, {"away": false} brings it back; the other fields of `Script` likewise.
"""

import contextlib
import json
import math
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE_DIR = Path(__file__).resolve().parents[1] / "src" / "nextword" / "serving" / "page"
MIME_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# As the real server's: nothing may ever be put into the page as HTML.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
CONTEXT_LENGTH = 256


def split_words(text: str) -> list[bytes]:
    """Tokens of a text: words with the space before them."""
    return [word.encode() for word in re.split("(?= )", text)]


def split_bytes(text: str, size: int = 2) -> list[bytes]:
    """Tokens that cut characters in the middle, as those of bytes do."""
    data = text.encode()
    return [data[i : i + size] for i in range(0, len(data), size)]


STORY = split_words(
    "Once there was a small lighthouse keeper who counted the waves . Every evening she wrote the number into a book , "
    "and every morning the sea had changed its mind ."
)
HTML = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> <b>bold</b> &amp;\x00\x1b[31m"
EMOJI = "family 👩‍👩‍👧 and flag 🇲🇳 naïve 語"
RTL = "שלום עולם — سلام دنیا"
REPLIES: dict[str, list[bytes]] = {
    "html": split_words(HTML),
    "emoji": split_bytes(EMOJI),
    "rtl": split_bytes(RTL, 3),
    "lines": [b"one", b"\n", b"\n", b"  two", b"\n", b"\tthree"],
    "nothing": [],
    "long": split_words(" ".join(f"word{i}" for i in range(400))),
    "slow": split_words(" ".join(f"tick{i}" for i in range(200))),
    "unsure": split_words(
        "The capital of Mongolia is Ulaanbaatar , and its people are fond of wrestling , horses and poetry ."
    ),
}
PROBABILITIES = (0.93, 0.62, 0.31, 0.12, 0.97, 0.02, 0.55, 0.83)
ALTERNATIVE_TOKENS = (b" the", b" a", b" an", b"\n", b" one", "é".encode()[:1])


@dataclass
class ServerScript:
    """How the server behaves; `asked` and `left` are what it has seen: requests, and clients that left in the middle."""

    chat: bool = True
    key: str | None = None
    is_offline: bool = False
    loading: bool = False
    busy: int = 2  # how often it says so, once it was asked something with "busy" in it
    delay: float = 0.003  # seconds from token to token; a "slow" one takes ten times that, at least 50 ms
    may_write: threading.Event = field(default_factory=threading.Event)  # an answer's first token waits for it
    requests: list[tuple[str, Any]] = field(default_factory=list)
    client_disconnects: int = 0

    def __post_init__(self) -> None:
        self.may_write.set()


def token_candidates(token: bytes, index: int) -> tuple[float, list[tuple[bytes, float]]]:
    """How likely a token was, and the five likeliest; sometimes it is none of them."""
    p = PROBABILITIES[index % len(PROBABILITIES)]
    rest = [other for other in ALTERNATIVE_TOKENS if other != token][:5]
    shares = [(1 - p) * 0.5 ** (i + 1) for i in range(len(rest))]
    if p >= 0.1:
        rest, shares = [token, *rest[:4]], [p, *shares[:4]]
    return math.log(p), sorted(((t, math.log(s)) for t, s in zip(rest, shares, strict=True)), key=lambda x: -x[1])


def token_text(token: bytes) -> str:
    """A token as a text; one that is no whole characters is spelt in bytes, as the real server does it."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def logprob_entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}


def chat_choice(text: str, tokens: list[bytes], start_index: int) -> dict[str, Any]:
    content = []
    for i, token in enumerate(tokens, start=start_index):
        logprob, top = token_candidates(token, i)
        content.append({**logprob_entry(token, logprob), "top_logprobs": [logprob_entry(*other) for other in top]})
    return {"index": 0, "delta": {"content": text}, "logprobs": {"content": content}, "finish_reason": None}


def text_choice(text: str, tokens: list[bytes], start_index: int) -> dict[str, Any]:
    token_logprobs = [token_candidates(token, i) for i, token in enumerate(tokens, start=start_index)]
    logprobs = {
        "tokens": [token_text(token) for token in tokens],
        "token_logprobs": [logprob for logprob, _ in token_logprobs],
        "top_logprobs": [{token_text(token): p for token, p in top} for _, top in token_logprobs],
        "text_offset": [0] * len(tokens),
    }
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}


class Handler(BaseHTTPRequestHandler):
    @property
    def script(self) -> ServerScript:
        assert isinstance(self.server, PageServer)
        return self.server.script

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_content(self, status: int, body: bytes, content_type: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send_content(status, json.dumps(value).encode(), **headers)

    def send_api_error(self, status: int, message: str, **headers: str) -> None:
        self.send_json({"error": {"message": message, "type": "invalid_request_error"}}, status, **headers)

    def do_GET(self) -> None:
        script = self.script
        file = PAGE_DIR / ("index.html" if self.path == "/" else Path(self.path).name)
        if script.is_offline:
            return  # the connection is closed without a word
        if self.path == "/health":
            if script.loading:
                self.send_json({"status": "loading", "model": "lighthouse-mini"}, 503)
            else:
                self.send_json({"status": "ok"})
        elif self.path == "/v1/models":
            if not self.reject_unauthorized():
                model_info = {"chat": script.chat, "task": None, "context_length": CONTEXT_LENGTH, "precision": "fp32"}
                self.send_json(
                    {"object": "list", "data": [{"id": "lighthouse-mini", "object": "model", "nextword": model_info}]}
                )
        elif file.is_file():
            self.send_content(200, file.read_bytes(), MIME_TYPES[file.suffix])
        else:
            self.send_api_error(404, f"{self.path}: there is nothing here")

    def reject_unauthorized(self) -> bool:
        key = self.script.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.send_api_error(401, "This server asks for a key.")
        return True

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        if self.path == "/control":
            for name, value in body.items():
                setattr(script, name, value)
            self.send_json({})
            return
        if script.is_offline or self.reject_unauthorized():
            return
        if self.path == "/tokenize":
            prompt = body.get("prompt") or " ".join(message["content"] for message in body["messages"])
            ids = list(range(len(prompt.split())))
            self.send_json({"tokens": ids, "count": len(ids), "max_model_len": CONTEXT_LENGTH})
            return
        script.requests.append((self.path, body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.generate(body)
            return
        script.client_disconnects += 1

    def generate(self, body: dict[str, Any]) -> None:
        script = self.script
        chat = self.path == "/v1/chat/completions"
        message: str = body["messages"][-1]["content"] if chat else body["prompt"]
        if "refuse" in message:
            self.send_api_error(400, "The conversation has 300 tokens, and this model reads 256.")
            return
        if "busy" in message and script.busy:
            script.busy -= 1
            self.send_api_error(429, "Eight others are being answered.", Retry_After="0.3")
            return
        slow = any(word in message for word in ("slow", "break", "fail"))
        tokens = next(
            (reply for word, reply in REPLIES.items() if word in message.split()), REPLIES["slow"] if slow else STORY
        )
        limit = body.get("max_tokens", len(tokens))
        self.send_content(200, b"", "text/event-stream")
        script.may_write.wait(15)
        pending_bytes = b""
        for i, token in enumerate(tokens[:limit]):
            time.sleep(max(0.05, 10 * script.delay) if slow else script.delay)
            pending_bytes += token
            try:
                text, pending_bytes = pending_bytes.decode(), b""
            except UnicodeDecodeError:
                text = ""  # a character is never cut: its tokens come first, its text with the last of them
            self.send_event({"choices": [(chat_choice if chat else text_choice)(text, [token], i)]})
            if script.is_offline or ("break" in message and i == 4):
                return
            if "fail" in message and i == 4:
                self.send_event({"error": {"message": "The model's numbers are not finite any more."}})
                return
        if not chat and len(tokens) <= limit:  # completions include the stop token; chat responses do not
            self.send_event({"choices": [text_choice("", [b"<|end|>"], 0)]})
        reason = "length" if len(tokens) > limit else "stop"
        last: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        self.send_event({"choices": [{**last, **({"delta": {}} if chat else {"text": ""})}]})
        written = min(len(tokens), limit)
        usage = {"prompt_tokens": 9, "completion_tokens": written, "total_tokens": 9 + written}
        self.send_event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, value: Any) -> None:
        """In two pieces, the first of which ends in the middle of a character where there is one of several bytes."""
        data = b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n\n"
        split_at = next((i for i, byte in enumerate(data) if byte >= 0x80), len(data) // 2) + 1
        for part in (data[:split_at], data[split_at:]):
            self.wfile.write(part)
            self.wfile.flush()


class PageServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.script = ServerScript()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


if __name__ == "__main__":
    server = PageServer(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
    print(f"The page, without a model: {server.url}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
