"""The demo: the whole life of a small GPT, on text that every Python has."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nextword.commands.api import finetune, pretrain
from nextword.common.console import Console
from nextword.data.demo_data import write_demo_data
from nextword.pipeline.language_model import load
from nextword.training.config import parse_duration

# The demo's time: for its pre-training, for each of its two fine-tunings; what is left over, it spends on what it shows.
BUDGET_SHARES = {"pretrain": 0.55, "packages": 0.17, "assistant": 0.25}


def demo(
    out: str | Path = "nextword-demo", *, budget: str | float = 180.0, console: Console | None = None,
    started: float | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """The whole life of a small GPT on the documentation inside your own Python, in so much time: prepared, trained, sampled,
    reported, and fine-tuned twice: to tell which package speaks, and to answer what something does."""
    stage_seconds = {name: share * parse_duration(budget) for name, share in BUDGET_SHARES.items()}
    with console or Console(quiet=True) as console:
        console.info(
            "This trains a GPT on the documentation inside your Python, and then on two tasks.\n", style="bold"
        )
        result = pretrain(
            "python-docs",
            out,
            budget=stage_seconds["pretrain"],
            resume=True,
            console=console,
            started=started,
            **settings,
        )
        loaded = load(out)
        prompts = ["Return a new", "The following example", "Raises ValueError if"]
        completions = loaded.generate(prompts, max_tokens=60, temperature=0.6, top_p=0.9, seed=1)
        result = {**result, "completions": [asdict(c) for c in completions]}
        folder = Path(out) / "tasks"
        folder.mkdir(exist_ok=True)
        for name, data in zip(("packages", "assistant"), write_demo_data(folder), strict=True):
            console.info(f"\n{name}: fine-tuning the same model, {stage_seconds[name]:.0f} s", style="bold")
            result[name] = finetune(
                out, data, folder / name, budget=stage_seconds[name], resume=True, console=console, started=time.time(), **settings
            )  # fmt: skip
        texts = ["Run a coroutine in the event loop until it is done.", "Draw a line on the canvas."]
        questions = ["What does get_event_loop in asyncio.events do?", "What does set_title in tkinter.Window do?"]
        answers = [
            {"asked": text, "answered": load(folder / name).predict(text)}
            for name, several in (("packages", texts), ("assistant", questions))
            for text in several
        ]
        return {**result, "answers": answers}
