"""Console output: messages, progress that fits into the terminal, and numbers for people."""

import io

import pytest
from rich.console import Console as RichConsole

from nextword.common.console import Console, TrainingProgress
from nextword.common.format import format_bytes, format_clock, format_count, format_duration

PROGRESS = TrainingProgress(
    step=123_456,
    total_steps=250_000,
    loss=3.2144,
    elapsed=35_999.0,
    total=72_000.0,
    tokens_per_second=12_345.6,
    bits_per_byte=1.2345,
)


@pytest.mark.parametrize(
    ("seconds", "words", "clock"),
    [
        (0, "0.0 s", "0:00"),
        (4.24, "4.2 s", "0:04"),
        (59.97, "1 min", "1:00"),
        (259, "4 min 19 s", "4:19"),
        (960, "16 min", "16:00"),
        (7_500, "2 h 5 min", "2:05:00"),
        (273_600, "3 d 4 h", "76:00:00"),
    ],
)
def test_durations(seconds, words, clock):
    assert (format_duration(seconds), format_clock(seconds)) == (words, clock)


def test_bytes_and_counts():
    assert [format_bytes(n) for n in (0, 812, 14_000, 2.1e9, 9.96e9, 1.4e15)] == [
        "0 B",
        "812 B",
        "14 kB",
        "2.1 GB",
        "10 GB",
        "1,400 TB",
    ]
    assert [format_count(n) for n in (812, 1_234_567, 7e9)] == ["812", "1.23 M", "7 B"]


def test_the_training_line_fits_into_80_columns():
    line = PROGRESS.line(80)
    assert line == "step 123,456 of 250,000 · 9:59:59 of 20:00:00 · loss 3.214" and len(line) <= 80
    assert PROGRESS.line(200) == line + " · 1.234 bits/byte · 12,346 tokens/s"


@pytest.mark.parametrize("width", [80, 200])
def test_the_training_line_is_complete_on_a_terminal(width):
    console, output = Console(), io.StringIO()
    console.rich_console = RichConsole(file=output, force_terminal=True, width=width, highlight=False)
    console.is_live = True
    with console:
        console.training_progress(PROGRESS)
    assert PROGRESS.line(width) in output.getvalue() and "…" not in output.getvalue()


def test_quiet_hides_everything_but_warnings(capsys):
    for quiet in (False, True):
        with Console(quiet) as console:
            console.info("[bold]as it is[/]")
            console.progress("reading", 1, 2)
            console.log_sample(7, "Once", " upon a time")
            console.warn("careful")
        output = capsys.readouterr()
        expected = "[bold]as it is[/]\nreading  50 %\n  sample at step 7: Once upon a time\ncareful\n"
        assert (output.out, output.err) == ("", "careful\n" if quiet else expected)
