"""Messages and progress: a live display on a terminal, plain lines elsewhere, nothing with `--quiet`.

Everything goes to standard error, so that standard output holds results only.
"""

import errno
import json
import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.text import Text

from nextword.common.errors import NextwordError
from nextword.common.format import format_clock

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_UPDATE_SECONDS = 10.0  # between two progress lines where there is no terminal
BAR_COLUMNS, DETAIL_COLUMNS = 110, 150  # widths from which the training line has a bar, and all its numbers


# ---------------------------------------------------------------- the streams of the process


def prepare_streams() -> None:
    """Replace characters that a standard stream cannot encode, and open the null device in place of closed streams.

    A closed standard stream stays None, except standard error, whose messages are dropped.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # a file that is opened later would get the number, and receive what is written to the stream
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115  (lasts as long as the process)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=errors)


def read_standard_input() -> str:
    """All text of standard input. Raises `NextwordError` if it is closed."""
    if sys.stdin is None:
        raise NextwordError("standard input is closed: there is nothing to read")
    return sys.stdin.read()


# Control characters from a model or a corpus could move the cursor of a terminal or worse: they are shown as symbols.
CONTROL_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """Text for a terminal: all its control characters, except newlines and tabs, are replaced by symbols."""
    return text.translate(CONTROL_PICTURES)


def write_result(text: str) -> None:
    """Write text to standard output and flush it: on a terminal without control characters, elsewhere as it is.

    Raises:
        NextwordError: Standard output is closed.
    """
    if sys.stdout is None:
        raise NextwordError("standard output is closed: the result cannot be printed")
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def to_json_line(value: Any) -> str:
    """JSON on one line, with escapes where the encoding of standard output lacks a character."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    return line + "\n"


def discard_unwritten_output() -> int:
    """Flush the standard streams before the process exits. Returns the `errno` with which standard output was lost, or 0."""
    lost = 0
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout:
                lost = error.errno or errno.EIO
    return lost


class StandardError:
    """Standard error for messages. What cannot be written is dropped: a reader that has left must not end a run."""

    def write(self, text: str) -> None:
        """Write, if possible."""
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush, if possible."""
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


# ---------------------------------------------------------------- messages and progress


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a training run as the progress line shows it. Durations are in seconds.

    Attributes:
        loss: training loss in nats per token.
        elapsed: time since the start of the run, earlier sessions included.
        total: expected time of the whole run, or its budget.
        bits_per_byte: the loss in bits per byte of text, where the ratio of tokens to bytes is known.
    """

    step: int
    total_steps: int
    loss: float
    elapsed: float
    total: float
    tokens_per_second: float
    bits_per_byte: float | None = None

    def line(self, width: int) -> str:
        """The progress line for a terminal of `width` columns: at most 80 characters below `DETAIL_COLUMNS`."""
        parts = [
            f"step {self.step:,} of {self.total_steps:,}",
            f"{format_clock(self.elapsed)} of {format_clock(self.total)}",
            f"loss {self.loss:.3f}",
        ]
        if width >= DETAIL_COLUMNS:
            parts += [] if self.bits_per_byte is None else [f"{self.bits_per_byte:.3f} bits/byte"]
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        return " · ".join(parts)


class Console:
    """Prints messages and shows the progress of long operations.

    Use it as a context manager, so that the live display is always closed.

    Args:
        quiet: print warnings only.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.rich_console = RichConsole(file=cast(TextIO, StandardError()), highlight=False, soft_wrap=True)
        self.is_live = self.rich_console.is_terminal and not quiet
        self._stage = ""
        self._last_printed_at = -math.inf
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self, text: str, style: str | None = None) -> None:
        """Print a line, unless quiet. The text is printed as it is, without reading markup."""
        if not self.quiet:
            self.rich_console.print(Text(printable(text), style=style or ""))

    def warn(self, text: str) -> None:
        """Print a warning, also when quiet."""
        self.rich_console.print(Text(printable(text), style="yellow"))

    def progress(self, stage: str, done: float, total: float, text: str = "") -> None:
        """Show the progress of a stage, and a text. A new stage name starts a new bar."""
        if self.quiet:
            return
        if self.is_live:
            if stage != self._stage:
                self.close()
                self._start_bar(stage, total, text)
            assert self._bar is not None and self._task is not None
            self._bar.update(self._task, completed=done, total=total, text=text)
            return
        now, is_new, is_done = time.monotonic(), stage != self._stage, done >= total
        if is_new or is_done or now - self._last_printed_at >= PLAIN_UPDATE_SECONDS:
            if is_new or not is_done or text:
                self.rich_console.print(Text(f"{stage} {100 * done / max(total, 1e-9):3.0f} %  {text}".rstrip()))
            self._last_printed_at, self._stage = now, stage

    def training_progress(self, progress: TrainingProgress) -> None:
        """Show the progress of a training run: step, time, loss, and more on a wide terminal."""
        width = self.rich_console.width if self.is_live else DETAIL_COLUMNS
        self.progress("training", progress.step, progress.total_steps, progress.line(width))

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Print a text that the model has generated during training."""
        if not self.quiet:
            parts = (printable(prompt), "dim italic"), (printable(text), "italic")
            sample = Text.assemble((f"  sample at step {step:,}: ", "dim"), *parts)
            self.rich_console.print(sample)

    def close(self) -> None:
        """Remove the live display. The next call of `progress` starts a new one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stage = ""

    def _start_bar(self, stage: str, total: float, text: str) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        bar = [TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()]
        end = TextColumn("{task.fields[text]}") if text else TimeRemainingColumn()
        columns = [end] if text and self.rich_console.width < BAR_COLUMNS else [*bar, end]
        self._bar = Progress(*columns, console=self.rich_console, transient=True)
        self._task = self._bar.add_task(stage, total=total, text=text)
        self._bar.start()
        self._stage = stage
