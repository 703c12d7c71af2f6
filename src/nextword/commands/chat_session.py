"""The loop of ``nextword chat``: read a line, stream the answer, run the commands.

A conversation is kept as text. For each answer all of it is encoded again, with the content apart from the special tokens, so
that neither side can forge a turn of the other.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextword.common.console import printable
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import append_line
from nextword.data.chat_format import encode_newest_turns, stop_token_ids, supports_chat
from nextword.data.issues import replace_surrogates
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.model_runner import ModelRunner, build_runner
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT

GREETING = "Type a message. /help lists the commands, Ctrl-C stops an answer, Ctrl-D quits."
HELP = """\
/new          start a new conversation with the same system prompt
/system TEXT  set the system prompt; without TEXT, remove it
/undo         remove your last message and its answer
/save FILE    append this conversation to a JSONL file for nextword finetune --task chat
/help         show this list
/quit         quit, like Ctrl-D

End a line with \\ to continue on the next one. Start a message with // if it starts with a slash.
Ctrl-C stops an answer; the part that was generated stays in the conversation."""


def terminal_reader(prompt: str = "> ") -> Callable[[], str | None]:
    """Lines from standard input, with line editing if the system has readline. Invalid bytes are replaced."""
    if sys.stdin is None or sys.stdout is None:
        raise NextwordError("standard input or output is closed: a conversation needs both")
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="replace")
    visible_prompt = prompt if sys.stdin.isatty() else ""

    def read_line() -> str | None:
        try:
            return input(visible_prompt)
        except EOFError:
            print(end="\n" if visible_prompt else "")  # Ctrl-D leaves the cursor behind the prompt
            return None

    return read_line


@dataclass
class ChatSession:
    """A conversation with a model.

    Each answer is sampled with its own seed, derived from the seed of `sampling` and the number of the answer. When the
    context is full, the oldest turns are no longer visible to the model, and a note says so; ``/save`` still writes them.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        sampling: How answers are sampled.
        read_line: Returns a line without its newline, or None at the end of the input. May raise KeyboardInterrupt.
        write_text: Shows a piece of text, newlines included.
        system: System prompt.
        runner: Runs the model. Default: float32.

    Raises:
        UsageError: The tokenizer has no special tokens for turns.
    """

    model: GPT
    tokenizer: Tokenizer
    sampling: Sampling
    read_line: Callable[[], str | None]
    write_text: Callable[[str], None]
    system: str | None = None
    runner: ModelRunner | None = None

    def __post_init__(self) -> None:
        if not supports_chat(self.tokenizer):
            raise UsageError(
                "this model was not fine-tuned on conversations: its tokenizer has no special tokens for turns. Fine-tune it "
                "with: nextword finetune MODEL chats.jsonl --task chat --out RUN"
            )
        self.runner = self.runner or build_runner(self.model)
        self.system = replace_surrogates(self.system or "").strip()
        self.turns: list[dict[str, Any]] = []
        self.num_answers = 0
        self.num_hidden_turns = 0  # of the oldest turns, at the last answer

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation with its system prompt."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def run(self, greeting: str | None = GREETING) -> None:
        """Read and answer until ``/quit`` or the end of the input."""
        if greeting is not None:
            self._print(greeting)
        interrupted = False
        while True:
            try:
                line = self._read_message()
            except KeyboardInterrupt:
                if interrupted:
                    return
                self._print("\n(Ctrl-C again or Ctrl-D quits)")
                interrupted = True
                continue
            interrupted = False
            if line is None or line.split()[:1] == ["/quit"]:
                return
            if line.startswith("/") and not line.startswith("//"):
                self._run_command(*line.partition(" ")[::2])
            elif line:
                self._respond(line[1:] if line.startswith("//") else line)

    def _print(self, text: str) -> None:
        self.write_text(f"{text}\n")

    def _read_message(self) -> str | None:
        """A message or command with its continuation lines; None at the end of the input."""
        lines: list[str] = []
        while (line := self.read_line()) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return replace_surrogates("\n".join(lines)).strip() if lines else None

    def _run_command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        match name:
            case "/new":
                self.turns, self.num_hidden_turns = [], 0
                note = "(new conversation)"
            case "/system":
                self.system = argument
                note = "(system prompt set)" if argument else "(no system prompt)"
            case "/undo":
                note = f"(removed: {printable(self.turns[-2]['content'])})" if self.turns else "(nothing to remove)"
                del self.turns[-2:]
            case "/save":
                note = self._save(argument)
            case "/help":
                note = HELP
            case _:
                note = f"(unknown command {name}; /help lists the commands, and // starts a message with a slash)"
        self._print(note)

    def _save(self, file: str) -> str:
        """Append the conversation to a file. Returns what happened."""
        if not file or not self.turns:
            return "(nothing to save yet)" if file else "(the file is missing: /save FILE)"
        try:
            path = Path(file).expanduser()
            # A file from elsewhere may lack its last newline.
            unfinished = path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n")
            line = json.dumps({"messages": self.messages}, ensure_ascii=False)
            append_line(path, "\n" * bool(unfinished) + line, durable=True)
        except (NextwordError, OSError, ValueError, RuntimeError) as error:  # the last two for an impossible path
            return f"(not saved: {error})"
        return f"(saved to {path})"

    # ---------------------------------------------------------------- answers

    def _respond(self, text: str) -> None:
        """Answer a message and keep both, unless the answer is empty."""
        message = {"role": "user", "content": text}
        length, max_tokens = self.model.config.context_length, self.sampling.max_tokens
        try:
            ids, num_hidden = encode_newest_turns(self.tokenizer, [*self.messages, message], length, max_tokens)
        except UsageError as error:
            self._print(f"({error})")
            return
        if num_hidden > self.num_hidden_turns:
            self._print(f"(the context is full: the {num_hidden:,} oldest turns are no longer visible to the model)")
        self.num_hidden_turns = num_hidden
        answer = self._stream_answer(ids, min(max_tokens, length - len(ids)))
        if answer.strip():
            self.turns += [message, {"role": "assistant", "content": answer}]
        else:
            self._print("(empty answer; the message is not kept)")

    def _stream_answer(self, ids: list[int], max_tokens: int) -> str:
        """Show the answer as it is generated, and return it; after Ctrl-C, the part that was shown."""
        seed = None if self.sampling.seed is None else self.sampling.seed + self.num_answers
        self.num_answers += 1
        # A new engine for each answer, since Ctrl-C may interrupt one in the middle of a step.
        ends = stop_token_ids(self.tokenizer)
        engine = Engine(self.model, self.tokenizer, max_batch=1, eos_ids=ends, runner=self.runner)
        stream = engine.stream(ids, replace(self.sampling, max_tokens=max_tokens, seed=seed))
        answer, note = "", ""
        try:
            while True:
                piece = next(stream)
                answer += piece
                self.write_text(printable(piece))
        except StopIteration as end:
            if end.value == "length":
                note = f"\n(stopped after {max_tokens:,} tokens)"
        except KeyboardInterrupt:
            note = "\n(stopped)"
        self._print(note)
        return answer
