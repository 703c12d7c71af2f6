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
from nextword.common.fs import append_line_durably
from nextword.data.chat_format import encode_conversation, stop_token_ids, supports_chat, truncate_conversation
from nextword.data.decoding import replace_surrogates
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.model_runner import ModelRunner, build_runner
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
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROL_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}

ReadLine = Callable[[], str | None]
WriteText = Callable[[str], None]


def chat(
    model: GPT,
    tokenizer: Tokenizer,
    sampling: Sampling | None = None,
    *,
    read_line: ReadLine,
    write_text: WriteText,
    system: str | None = None,
    greeting: str | None = GREETING,
    runner: ModelRunner | None = None,
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
    if not supports_chat(tokenizer):
        raise UsageError(
            "this model has not learned to converse: its tokenizer has no markers for turns. Teach it by: "
            "nextword finetune MODEL chats.jsonl --task chat --out RUN"
        )
    conversation = _ChatSession(model, tokenizer, sampling or Sampling(), read_line, write_text, system, runner)
    if greeting is not None:
        conversation.print_line(greeting)
    conversation.run()
    return conversation.messages


def make_terminal_reader(prompt: str = "> ") -> ReadLine:
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


class _ChatSession:
    """What was said so far, and what each line does."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, read_line: ReadLine, write_text: WriteText, system: str | None,
        runner: ModelRunner | None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.runner = runner or build_runner(model)
        self.read_line, self.write_text = read_line, write_text
        self.system = replace_surrogates(system or "").strip()
        self.turns: list[dict[str, Any]] = []
        self.num_answers = 0
        self.num_unseen_turns = 0  # how many of the oldest turns the last answer was made without
        self.commands: dict[str, Callable[[str], None]] = {
            "/new": self._start_new, "/system": self._set_system, "/undo": self._undo_turn, "/save": self._save_conversation,
            "/help": lambda rest: self.print_line(HELP),
        }  # fmt: skip

    @property
    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def print_line(self, text: str) -> None:
        """A line of the program's own."""
        self.write_text(f"{text}\n")

    def run(self) -> None:
        """Read and answer until the end."""
        interrupted = False
        while True:
            try:
                line = self._read_message()
            except KeyboardInterrupt:
                if interrupted:
                    return
                self.print_line("\n(Ctrl-C again or Ctrl-D leaves)")
                interrupted = True
                continue
            interrupted = False
            if line is None or line.split()[:1] == ["/quit"]:
                return
            if line.startswith("/") and not line.startswith("//"):
                self._run_command(line)
            elif line:
                self._respond(line[1:] if line.startswith("//") else line)

    def _read_message(self) -> str | None:
        """A message or a command: a line, and those that it goes on in. None at the end of the input."""
        lines: list[str] = []
        while (line := self.read_line()) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return replace_surrogates("\n".join(lines)).strip() if lines else None

    def _run_command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            self.print_line(
                f"(there is no command {name}; /help shows those there are, and // sends a message that begins so)"
            )
            return
        self.commands[name](rest.strip())

    # ---------------------------------------------------------------- commands

    def _start_new(self, argument: str) -> None:
        self.turns, self.num_unseen_turns = [], 0
        self.print_line("(a new conversation)")

    def _set_system(self, argument: str) -> None:
        self.system = argument
        self.print_line("(the system turn is set)" if argument else "(no system turn)")

    def _undo_turn(self, argument: str) -> None:
        removed = self.turns[-2:]
        del self.turns[-2:]
        self.print_line(f"(taken back: {removed[0]['content']})" if removed else "(there is nothing to take back)")

    def _save_conversation(self, argument: str) -> None:
        if not argument or not self.turns:
            self.print_line(
                "(say where: /save FILE)" if not argument else "(nothing was said yet, so there is nothing to save)"
            )
            return
        path = Path(argument)
        try:
            path = path.expanduser()
            # A file by another hand may lack its last newline; two conversations on one line would be none.
            joined = path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n")
            append_line_durably(path, "\n" * bool(joined) + json.dumps({"messages": self.messages}, ensure_ascii=False))
        except (NextwordError, OSError, ValueError, RuntimeError) as error:  # the last two of a path that is none
            self.print_line(f"(not saved: {error})")
            return
        self.print_line(f"(saved to {path})")

    # ---------------------------------------------------------------- answers

    def _respond(self, text: str) -> None:
        """Answer a message; both become part of the conversation, unless nothing was answered."""
        user_message = {"role": "user", "content": text}
        length = self.model.config.context_length
        try:
            visible_messages, num_unseen, num_truncated_tokens = truncate_conversation(
                self.tokenizer, [*self.messages, user_message], length - min(self.sampling.max_tokens, length // 2)
            )
        except UsageError as error:
            self.print_line(f"({error})")
            return
        if num_unseen > self.num_unseen_turns:
            self.print_line(f"(the context is full: the {num_unseen:,} oldest turns are no longer seen)")
        if num_truncated_tokens:
            self.print_line(
                f"(the message is longer than the context: its first {num_truncated_tokens:,} tokens are not seen)"
            )
        self.num_unseen_turns = num_unseen
        ids, _ = encode_conversation(self.tokenizer, visible_messages, add_generation_prompt=True)
        answer = self._stream_answer(ids, min(self.sampling.max_tokens, length - len(ids)))
        if not answer.strip():
            self.print_line("(no answer; the message is not kept)")
            return
        self.turns += [user_message, {"role": "assistant", "content": answer}]

    def _stream_answer(self, ids: list[int], max_tokens: int) -> str:
        """Show what the model goes on with, piece by piece; what was shown, also where Ctrl-C has stopped it."""
        seed = None if self.sampling.seed is None else self.sampling.seed + self.num_answers
        self.num_answers += 1
        # An engine for each answer: one that was stopped in the middle of a step is of no more use.
        stop_token_ids = stop_token_ids(self.tokenizer)
        engine = Engine(self.model, self.tokenizer, max_batch=1, ends=stop_token_ids, runner=self.runner)
        stream = engine.stream(ids, replace(self.sampling, max_tokens=max_tokens, seed=seed))
        answer, end_note = "", ""
        try:
            while True:
                text_chunk = next(stream)
                answer += text_chunk
                self.write_text(text_chunk.translate(CONTROL_PICTURES))
        except StopIteration as end:
            if end.value == "length":
                end_note = f"\n(stopped at {max_tokens:,} tokens)"
        except KeyboardInterrupt:
            end_note = "\n(stopped)"
        self.print_line(end_note)
        return answer
