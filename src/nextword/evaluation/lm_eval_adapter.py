"""lm-eval's tasks, put to a model in this process (https://github.com/EleutherAI/lm-evaluation-harness)."""

import functools
import importlib
import math
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np

from nextword.common.console import Console
from nextword.common.errors import MissingExtra, NextwordError, UsageError
from nextword.evaluation.significance import told
from nextword.inference.engine import Engine
from nextword.inference.loglikelihood import Likely, Scorer, Text
from nextword.inference.sampling import Sampling
from nextword.pipeline.item_scores import AT_ONCE
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics

MAX_TOKENS = 256  # what lm-eval lets a model write where a task does not say
SETTINGS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class Answers:
    """What lm-eval asks of a model: the methods of its `LM`. A request's `args` are its texts."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.scorer = Scorer(model.weights, model.tokenizer, greedy=True)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """log P of each continuation after its context, and whether the model would write it itself."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        # The answers to one question come one after the other; what they begin with alike is read once.
        groups: list[list[tuple[str, str]]] = []
        for pair in pairs:
            if groups and groups[-1][0][0] == pair[0]:
                groups[-1].append(pair)
            else:
                groups.append([pair])
        return [(one.nats, one.greedy) for found in self.scorer.ask(groups) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log P of each whole text, in windows of which each predicts what the one before has not."""
        questions = [[text] for request in requests for text in self._windows(str(request.args[0]))]
        counts = [sum(1 for _ in self._windows(str(request.args[0]))) for request in requests]
        found: Iterator[list[Likely]] = iter(self.scorer.score(questions))
        return [sum(next(found)[0].nats for _ in range(count)) for count in counts]

    def _windows(self, text: str) -> Iterator[Text]:
        """A text as lm-eval cuts it (`get_rolling_token_windows`, context_len 1): the first window begins with the prefix
        token, and any other is as long as can be, so that the last one predicts less than it sees."""
        begin = self.model.tokenizer.begin_of_text
        ids = [self.scorer.prefix, *([] if begin is None else [begin]), *self.model.tokenizer.encode(text)]
        length = self.model.gpt.config.context_length
        for start in range(1, len(ids), length):
            end = min(start + length, len(ids))
            yield Text(ids[max(0, end - length - 1) : end], end - start)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """What the model writes after each context, up to a stop string."""
        engine = Engine(
            self.model.gpt, self.model.tokenizer, max_batch=AT_ONCE, seed=0, reader=self.model.reader
        )  # fmt: skip
        texts = []
        for request in requests:
            context, settings = str(request.args[0]), dict(request.args[1])
            sampling = _sampling(settings)
            begin = [] if self.model.tokenizer.begin_of_text is None else [self.model.tokenizer.begin_of_text]
            room = max(1, self.model.gpt.config.context_length - sampling.max_tokens)
            texts.append(([*begin, *self.model.tokenizer.encode(context)][-room:], sampling))
        ids = [engine.add(prompt, sampling) for prompt, sampling in texts]
        written = dict.fromkeys(ids, "")
        while engine.busy:
            for event in engine.step():
                if event.error:
                    raise NextwordError(event.error)
                written[event.id] += event.text
        return [written[id] for id in ids]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """lm-eval's `generation_kwargs`: the likeliest token unless it says do_sample."""
    until = settings.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = next((settings[name] for name in names if settings.get(name) is not None), MAX_TOKENS)
    stop = tuple([until] if isinstance(until, str) else [one for one in until if one])
    sampling = Sampling(temperature=0.0, max_tokens=int(most), stop=stop)
    if not settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
        return sampling
    return replace(
        sampling, **{"temperature": 1.0} | {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    )


@functools.cache
def adapter() -> Any:
    """The class `LMEval(model)`: an `lm_eval.api.model.LM` that answers with a `nextword.Model`.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    return types.new_class("LMEval", (Answers, _package("lm_eval.api.model").LM))


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra("lm-eval's tasks", "lm-eval") from error


def run_task(
    model: Model, task: str, limit: int | None, console: Console | None = None, **settings: Any
) -> dict[str, Any]:
    """The results of one of lm-eval's tasks, or of a group's tasks, by its own numbers; intervals are our bootstrap's.

    Args:
        limit: judge by the first so many items of each task; None: by all.
        settings: `lm_eval.simple_evaluate`'s.

    Raises:
        UsageError: lm-eval knows no such task.
        MissingExtra: lm-eval is not installed.
    """
    made, evaluator = adapter()(model), _package("lm_eval.evaluator")
    manager = settings.pop("task_manager", None) or _package("lm_eval.tasks").TaskManager()
    if task not in manager.all_tasks:
        raise UsageError(f"lm-eval has no task {task!r}; its own list is: lm_eval ls tasks")
    (console or Console(quiet=True)).say(f"lm-eval: {task}")
    with redirect_stdout(StringIO()):  # it prints among what a program may read
        found = evaluator.simple_evaluate(
            made, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0, **settings
        )
    kinds = {name: config.get("output_type") for name, config in found["configs"].items()}
    each = {name: _task(samples, kinds.get(name), found["results"][name]) for name, samples in found["samples"].items()}
    if list(each) == [task]:
        return each[task]
    return {
        "metric": "tasks", "groups": each, "n": sum(one["n"] for one in each.values()),
        **_together([one["score"] for one in each.values()], found["results"].get(task, {})),
    }  # fmt: skip


def _task(samples: Sequence[dict[str, Any]], kind: str | None, results: dict[str, Any]) -> dict[str, Any]:
    """One task's result: the mean of each score over its items, with our interval; what is no mean, as lm-eval has it."""
    named = [name.partition(",")[0] for name in results if "," in name and "stderr" not in name]
    values: dict[str, list[Any]] = {name: [one.get(name) for one in samples] for name in named}
    # A score that is no mean (perplexity) is as lm-eval has it, without an interval.
    whole = {name: value for key, value in results.items() if "stderr" not in key for name in [key.partition(",")[0]]}
    means = {
        name: told(metrics.share(list(map(float, of))))
        for name, of in values.items()
        if _numbers(of) and math.isclose(float(np.mean(of)), whole[name], rel_tol=1e-6, abs_tol=1e-9)
    }
    rest = {
        name: {"score": whole[name], "low": None, "high": None, "n": len(samples)}
        for name in named
        if name not in means
    }
    metric = next(iter([*(name for name in ("acc_norm", "acc", "exact_match") if name in means), *means, *rest]))
    chance = _chance(samples) if kind == "multiple_choice" and metric.startswith("acc") else None
    first = (means | rest)[metric]
    return {
        "metric": metric, **first, "chance": chance,
        "above_chance": None if chance is None else first["low"] > chance,
        "scrambled": None, "groups": {},
        "others": {name: one for name, one in (means | rest).items() if name != metric},
    }  # fmt: skip


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(one, int | float | np.number) for one in values)


def _chance(samples: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([1 / len(one["resps"]) for one in samples]))


def _together(each: Sequence[float], results: dict[str, Any]) -> dict[str, Any]:
    """A group's own score where lm-eval makes one, else none."""
    found = next((value for key, value in results.items() if "," in key and "stderr" not in key), None)
    score = float(found) if isinstance(found, int | float) else float(np.mean(each))
    return {"score": score, "low": None, "high": None, "chance": None, "above_chance": None, "scrambled": None}
