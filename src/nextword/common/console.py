"""What a person sees while something runs: live on a terminal, plain lines elsewhere, nothing when asked to be quiet.

Everything goes to standard error, so that standard output holds results alone.
"""

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_UPDATE_SECONDS = 10.0  # between two plain lines where there is no terminal


def format_duration(seconds: float) -> str:
    """4.2 s, 3:05, 2:00:05."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """Says things, and shows how far a long job is. Use it as a context, so that the live display ends cleanly."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.rich_console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.is_live = self.rich_console.is_terminal and not quiet
        self.progress_bar: Progress | None = None
        self.task_id: TaskID | None = None
        self.stage = ""
        self.last_printed_at = -math.inf

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def info(self, text: str, style: str | None = None) -> None:
        """A line of its own. Text is shown as it is: no markup is read from it."""
        if not self.quiet:
            self.rich_console.print(Text(text, style=style or ""))

    def warn(self, text: str) -> None:
        """A line that even `quiet` does not hide."""
        self.rich_console.print(Text(text, style="yellow"))

    def progress(self, stage: str, done: float, total: float) -> None:
        """How far a stage is; a new name begins a new bar."""
        self._update_progress(stage, done, total, "")

    def training_progress(
        self, metrics: Any, *, bits_per_byte: float | None, tokens_per_second: float, seconds_left: float
    ) -> None:
        """The live line of a training run."""
        bits = "" if bits_per_byte is None else f"{bits_per_byte:.3f} bits/byte · "
        text = (
            f"step {metrics.step:,} · loss {metrics.loss:.3f} · {bits}"
            f"{tokens_per_second:,.0f} tokens/s · {format_duration(seconds_left)} left"
        )
        self._update_progress("training", metrics.progress, 1.0, text)

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """What the model writes by now."""
        if self.quiet:
            return
        self.rich_console.print(
            Text.assemble((f"  step {step:,} writes: ", "dim"), (prompt, "dim italic"), (text, "italic"))
        )

    def close(self) -> None:
        if self.progress_bar is not None:
            self.progress_bar.stop()
            self.progress_bar = None
        self.stage = ""

    def _update_progress(self, stage: str, done: float, total: float, text: str) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if not self.is_live:
            if stage != self.stage or now - self.last_printed_at >= PLAIN_UPDATE_SECONDS or done >= total:
                if stage != self.stage or done < total or text:
                    self.rich_console.print(Text(f"{stage} {100 * done / max(total, 1e-9):3.0f} %  {text}".rstrip()))
                self.last_printed_at, self.stage = now, stage
            return
        if stage != self.stage:
            self.close()
            self._start_progress_bar(stage, total, text)
        assert self.progress_bar is not None and self.task_id is not None
        self.progress_bar.update(self.task_id, completed=done, total=total, text=text)

    def _start_progress_bar(self, stage: str, total: float, text: str) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()]
        # A training run says its own time left; the other stages leave that to the bar.
        columns.append(TextColumn("{task.fields[text]}") if text else TimeRemainingColumn())
        self.progress_bar = Progress(*columns, console=self.rich_console, transient=True)
        self.task_id = self.progress_bar.add_task(stage, total=total, text=text)
        self.progress_bar.start()
        self.stage = stage


class NullConsole(Console):
    """Says nothing at all, not even a warning: another process speaks for this one."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        pass
