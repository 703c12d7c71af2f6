"""A conversation with a model in the terminal: a line in, an answer as it is made, and a few commands.

    chat(model, tokenizer, Sampling(), read=terminal_reader(), write=lambda text: print(text, end="", flush=True))

What is kept of a conversation is text. Each answer is asked for with the whole of it encoded anew, content apart from
markers, so neither side can speak in the other's name.
"""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import append_durably
from nextword.data.chat_format import can_chat, encode_conversation, fit, turn_ends
from nextword.data.decoding import without_surrogates
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.model_runner import Reader, reader_of
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT

GREETING = "Say something. /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves."
HELP = """\
/new          begin a new conversation; the system turn stays
/system TEXT  what the model is told before the conversation; without TEXT, nothing
/undo         take back your last message and its answer
/save FILE    add this conversation to a JSONL file, as `nextword finetune --task chat` reads it
/help         this
/quit         leave; so does Ctrl-D

A line that ends with \\ goes on in the next one. A message that begins with / is written with two: //.
Ctrl-C stops an answer; what was written of it stays in the conversation."""

# What a model writes may move a terminal's cursor or worse, so control characters are shown by their pictures.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}

Read = Callable[[], str | None]
Write = Callable[[str], None]


def chat(
    model: GPT,
    tokenizer: Tokenizer,
    sampling: Sampling | None = None,
    *,
    read: Read,
    write: Write,
    system: str | None = None,
    greeting: str | None = GREETING,
    reader: Reader | None = None,
) -> list[dict[str, Any]]:
    """Talk until `/quit` or the end of the input; the messages of the last conversation.

    Every answer is drawn with a seed of its own, made of the sampling's and the number of the answer. Where the context
    is full, the oldest turns are no longer shown to the model, which is said; `/save` has them still.

    Args:
        read: gives a line without its newline, or None at the end; may raise KeyboardInterrupt (Ctrl-C).
        write: shows a piece of text; newlines are in it.
        system: what the model is told before the conversation.
        greeting: the first line; None says nothing.

    Raises:
        UsageError: the tokenizer has no markers for turns.
        NextwordError: the model's logits are not finite numbers.
    """
    if not can_chat(tokenizer):
        raise UsageError(
            "this model has not learned to converse: its tokenizer has no markers for turns. Teach it by: "
            "nextword finetune MODEL chats.jsonl --task chat --out RUN"
        )
    conversation = _Conversation(model, tokenizer, sampling or Sampling(), read, write, system, reader)
    if greeting is not None:
        conversation.say(greeting)
    conversation.run()
    return conversation.messages


def terminal_reader(prompt: str = "> ") -> Read:
    """Lines from standard input, with the arrow keys where the system has readline. Bytes that are no text are replaced."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    shown = prompt if sys.stdin.isatty() else ""

    def read() -> str | None:
        try:
            return input(shown)
        except EOFError:
            print(end="\n" if shown else "")  # Ctrl-D leaves the cursor behind the prompt
            return None

    return read


class _Conversation:
    """What was said so far, and what each line does."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, read: Read, write: Write, system: str | None,
        reader: Reader | None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.reader = reader or reader_of(model)
        self.read, self.write = read, write
        self.system = without_surrogates(system or "").strip()
        self.turns: list[dict[str, Any]] = []
        self.answers = 0
        self.unseen = 0  # how many of the oldest turns the last answer was made without
        self.commands: dict[str, Callable[[str], None]] = {
            "/new": self._new, "/system": self._system, "/undo": self._undo, "/save": self._save,
            "/help": lambda rest: self.say(HELP),
        }  # fmt: skip

    @property
    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def say(self, text: str) -> None:
        """A line of the program's own."""
        self.write(f"{text}\n")

    def run(self) -> None:
        """Read and answer until the end."""
        interrupted = False
        while True:
            try:
                line = self._line()
            except KeyboardInterrupt:
                if interrupted:
                    return
                self.say("\n(Ctrl-C again or Ctrl-D leaves)")
                interrupted = True
                continue
            interrupted = False
            if line is None or line.split()[:1] == ["/quit"]:
                return
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line:
                self._answer(line[1:] if line.startswith("//") else line)

    def _line(self) -> str | None:
        """A message or a command: a line, and those that it goes on in. None at the end of the input."""
        lines: list[str] = []
        while (line := self.read()) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return without_surrogates("\n".join(lines)).strip() if lines else None

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            self.say(
                f"(there is no command {name}; /help shows those there are, and // sends a message that begins so)"
            )
            return
        self.commands[name](rest.strip())

    # ---------------------------------------------------------------- commands

    def _new(self, rest: str) -> None:
        self.turns, self.unseen = [], 0
        self.say("(a new conversation)")

    def _system(self, rest: str) -> None:
        self.system = rest
        self.say("(the system turn is set)" if rest else "(no system turn)")

    def _undo(self, rest: str) -> None:
        taken = self.turns[-2:]
        del self.turns[-2:]
        self.say(f"(taken back: {taken[0]['content']})" if taken else "(there is nothing to take back)")

    def _save(self, rest: str) -> None:
        if not rest or not self.turns:
            self.say("(say where: /save FILE)" if not rest else "(nothing was said yet, so there is nothing to save)")
            return
        path = Path(rest)
        try:
            path = path.expanduser()
            # A file by another hand may lack its last newline; two conversations on one line would be none.
            joined = path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n")
            append_durably(path, "\n" * bool(joined) + json.dumps({"messages": self.messages}, ensure_ascii=False))
        except (NextwordError, OSError, ValueError, RuntimeError) as error:  # the last two of a path that is none
            self.say(f"(not saved: {error})")
            return
        self.say(f"(saved to {path})")

    # ---------------------------------------------------------------- answers

    def _answer(self, text: str) -> None:
        """Answer a message; both become part of the conversation, unless nothing was answered."""
        asked = {"role": "user", "content": text}
        length = self.model.config.context_length
        try:
            fitted, unseen, cut = fit(
                self.tokenizer, [*self.messages, asked], length - min(self.sampling.max_tokens, length // 2)
            )
        except UsageError as error:
            self.say(f"({error})")
            return
        if unseen > self.unseen:
            self.say(f"(the context is full: the {unseen:,} oldest turns are no longer seen)")
        if cut:
            self.say(f"(the message is longer than the context: its first {cut:,} tokens are not seen)")
        self.unseen = unseen
        ids, _ = encode_conversation(self.tokenizer, fitted, answer=True)
        answer = self._write_answer(ids, min(self.sampling.max_tokens, length - len(ids)))
        if not answer.strip():
            self.say("(no answer; the message is not kept)")
            return
        self.turns += [asked, {"role": "assistant", "content": answer}]

    def _write_answer(self, ids: list[int], max_tokens: int) -> str:
        """Show what the model goes on with, piece by piece; what was shown, also where Ctrl-C has stopped it."""
        seed = None if self.sampling.seed is None else self.sampling.seed + self.answers
        self.answers += 1
        # An engine for each answer: one that was stopped in the middle of a step is of no more use.
        ends = turn_ends(self.tokenizer)
        engine = Engine(self.model, self.tokenizer, max_batch=1, ends=ends, reader=self.reader)
        stream = engine.stream(ids, replace(self.sampling, max_tokens=max_tokens, seed=seed))
        answer, ending = "", ""
        try:
            while True:
                piece = next(stream)
                answer += piece
                self.write(piece.translate(PICTURES))
        except StopIteration as end:
            if end.value == "length":
                ending = f"\n(stopped at {max_tokens:,} tokens)"
        except KeyboardInterrupt:
            ending = "\n(stopped)"
        self.say(ending)
        return answer
