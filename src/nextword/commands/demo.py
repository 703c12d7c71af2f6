"""``nextword demo``: the life of a small GPT on text that every Python has."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, command
from nextword.commands.finetune import FinetuneConfig, finetune
from nextword.commands.pretrain import PretrainConfig, format_run, pretrain
from nextword.commands.shared import RunResult, SeedOption, format_metric, format_score, run_path
from nextword.common.format import quote_command
from nextword.common.numbers import Duration, text_or_number
from nextword.common.options import DeviceOption, option, options

# Shares of the budget for pre-training and for each of the two fine-tunings. The rest is for the examples at the end.
BUDGET_SHARES = {"pretrain": 0.55, "packages": 0.17, "assistant": 0.25}
PROMPTS = ("Return a new", "The following example", "Raises ValueError if")
QUESTIONS = {
    "packages": ("Run a coroutine in the event loop until it is done.", "Draw a line on the canvas."),
    "assistant": ("What does get_event_loop in asyncio.events do?", "What does set_title in tkinter.Window do?"),
}


@options
class DemoConfig(SeedOption, DeviceOption):
    """Train and fine-tune a small GPT on your Python's documentation.

    The model is pre-trained on the docstrings, generates samples, and is then fine-tuned twice: to classify which package a
    text belongs to, and to answer questions about functions.

    Attributes:
        out: Run directory.
        budget: Wall-clock time of the whole demo, for example 3m.
    """

    out: Path = option(default=Path("nextword-demo"), converter=run_path, kw_only=False)
    budget: Duration = option(default="3m", converter=text_or_number, metavar="DURATION")


@dataclass(frozen=True)
class DemoResult(RunResult):
    """The result of the pre-training and what follows it.

    Attributes:
        completions: Samples of the pre-trained model.
        packages: Result of the classifier.
        assistant: Result of the assistant.
        answers: Questions (asked) and the predictions of both fine-tuned models (answered).
    """

    completions: list[dict[str, Any]] | None = None
    packages: dict[str, Any] | None = None
    assistant: dict[str, Any] | None = None
    answers: list[dict[str, Any]] | None = None

    def __str__(self) -> str:
        lines = [f"\n{completion['prompt']}{completion['text']}\n" for completion in self.completions or []]
        for answer in self.answers or []:
            lines.append(f"{answer['asked']}\n  → {answer['answered'].get('label') or answer['answered']['text']}")
        packages = self.packages or {}
        metric = packages["metric"]
        lines.append(
            f"\nclassifying packages: {format_metric(metric, packages['scores'][metric])}; "
            f"bag of words {format_score(packages['baselines']['bag of words'][metric])}"
        )
        tasks = f"{self.run}/tasks"
        predict = quote_command("nextword", "predict", f"{tasks}/packages", "a text")
        more = f"{predict}\n        {quote_command('nextword', 'chat', f'{tasks}/assistant')}"
        return "\n".join([*lines, format_run(self), f"        {more}"])


@command(DemoConfig, example="nextword demo --budget 3m")
def demo(config: DemoConfig, context: Context) -> DemoResult:
    """Pre-train on the docstrings, fine-tune twice, and ask both models."""
    from nextword.data.builtin_datasets import write_demo_data
    from nextword.pipeline.language_model import load

    console, seconds = context.console, {name: share * config.budget for name, share in BUDGET_SHARES.items()}
    console.info(
        "This trains a GPT on the documentation of your Python, and then fine-tunes it on two tasks.\n", style="bold"
    )
    run_options: dict[str, Any] = {"resume": True, "seed": config.seed, "device": config.device}
    result = pretrain.run(
        PretrainConfig("python-docs", config.out, budget=seconds["pretrain"], **run_options), context
    ).to_dict()
    completions = load(config.out).generate(PROMPTS, max_tokens=60, temperature=0.6, top_p=0.9, seed=1)
    result["completions"] = [asdict(completion) for completion in completions]
    tasks = config.out / "tasks"
    tasks.mkdir(exist_ok=True)
    for name, data in zip(QUESTIONS, write_demo_data(tasks), strict=True):
        console.info(f"\n{name}: fine-tuning the same model, {seconds[name]:.0f} s", style="bold")
        task_config = FinetuneConfig(config.out, data, tasks / name, budget=seconds[name], **run_options)
        result[name] = finetune.run(task_config, Context(console, time.time(), call=context.call)).to_dict()
    result["answers"] = [
        {"asked": question, "answered": load(tasks / name).predict(question)}
        for name, questions in QUESTIONS.items()
        for question in questions
    ]
    return DemoResult.from_dict(result)
