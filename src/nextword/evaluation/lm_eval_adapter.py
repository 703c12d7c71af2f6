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
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.evaluation.significance import to_dict
from nextword.inference.engine import Engine
from nextword.inference.loglikelihood import ContinuationScore, LoglikelihoodScorer, ScoredSequence
from nextword.inference.sampling import Sampling
from nextword.pipeline.item_scores import GENERATION_BATCH_SIZE
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics

DEFAULT_MAX_TOKENS = 256  # what lm-eval lets a model write where a task does not say
SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class LMEvalAdapter:
    """What lm-eval asks of a model: the methods of its `LM`. A request's `args` are its texts."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer, check_greedy=True)

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
        return [(one.logprob, one.is_greedy) for found in self.scorer.score_pairs(groups) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log P of each whole text, in windows of which each predicts what the one before has not."""
        questions = [[text] for request in requests for text in self._rolling_windows(str(request.args[0]))]
        counts = [sum(1 for _ in self._rolling_windows(str(request.args[0]))) for request in requests]
        found: Iterator[list[ContinuationScore]] = iter(self.scorer.score_sequences(questions))
        return [sum(next(found)[0].logprob for _ in range(count)) for count in counts]

    def _rolling_windows(self, text: str) -> Iterator[ScoredSequence]:
        """A text as lm-eval cuts it (`get_rolling_token_windows`, context_len 1): the first window begins with the prefix
        token, and any other is as long as can be, so that the last one predicts less than it sees."""
        begin = self.model.tokenizer.bos_id
        ids = [self.scorer.prefix_token_id, *([] if begin is None else [begin]), *self.model.tokenizer.encode(text)]
        length = self.model.gpt.config.context_length
        for start in range(1, len(ids), length):
            end = min(start + length, len(ids))
            yield ScoredSequence(ids[max(0, end - length - 1) : end], end - start)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """What the model writes after each context, up to a stop string."""
        engine = Engine(
            self.model.gpt, self.model.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=0, runner=self.model.runner
        )  # fmt: skip
        texts = []
        for request in requests:
            context, settings = str(request.args[0]), dict(request.args[1])
            sampling = _sampling_from_generation_kwargs(settings)
            begin = [] if self.model.tokenizer.bos_id is None else [self.model.tokenizer.bos_id]
            room = max(1, self.model.gpt.config.context_length - sampling.max_tokens)
            texts.append(([*begin, *self.model.tokenizer.encode(context)][-room:], sampling))
        ids = [engine.add_request(prompt, sampling) for prompt, sampling in texts]
        texts_by_id = dict.fromkeys(ids, "")
        while engine.has_unfinished_requests:
            for event in engine.step():
                if event.error:
                    raise NextwordError(event.error)
                texts_by_id[event.request_id] += event.text
        return [texts_by_id[id] for id in ids]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path)


def _sampling_from_generation_kwargs(generation_kwargs: dict[str, Any]) -> Sampling:
    """lm-eval's `generation_kwargs`: the likeliest token unless it says do_sample."""
    until = generation_kwargs.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    max_tokens = next(
        (generation_kwargs[name] for name in names if generation_kwargs.get(name) is not None), DEFAULT_MAX_TOKENS
    )
    stop = tuple([until] if isinstance(until, str) else [one for one in until if one])
    sampling = Sampling(temperature=0.0, max_tokens=int(max_tokens), stop=stop)
    if not generation_kwargs.get("do_sample", float(generation_kwargs.get("temperature") or 0) > 0):
        return sampling
    return replace(
        sampling,
        **{"temperature": 1.0}
        | {name: generation_kwargs[name] for name in SAMPLING_KEYS if generation_kwargs.get(name) is not None},
    )


@functools.cache
def lm_eval_model_class() -> Any:
    """The class `LMEval(model)`: an `lm_eval.api.model.LM` that answers with a `nextword.Model`.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    return types.new_class("LMEval", (LMEvalAdapter, _import_lm_eval("lm_eval.api.model").LM))


def _import_lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError("lm-eval's tasks", "lm-eval") from error


def run_lm_eval_task(
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
    lm, evaluator = lm_eval_model_class()(model), _import_lm_eval("lm_eval.evaluator")
    task_manager = settings.pop("task_manager", None) or _import_lm_eval("lm_eval.tasks").TaskManager()
    if task not in task_manager.all_tasks:
        raise UsageError(f"lm-eval has no task {task!r}; its own list is: lm_eval ls tasks")
    (console or Console(quiet=True)).info(f"lm-eval: {task}")
    with redirect_stdout(StringIO()):  # it prints among what a program may read
        results = evaluator.simple_evaluate(
            lm, tasks=[task], limit=limit, task_manager=task_manager, bootstrap_iters=0, **settings
        )
    output_types = {name: config.get("output_type") for name, config in results["configs"].items()}
    task_results = {
        name: _summarize_task(samples, output_types.get(name), results["results"][name])
        for name, samples in results["samples"].items()
    }
    if list(task_results) == [task]:
        return task_results[task]
    return {
        "metric": "tasks", "groups": task_results, "n": sum(one["n"] for one in task_results.values()),
        **_group_score([one["score"] for one in task_results.values()], results["results"].get(task, {})),
    }  # fmt: skip


def _summarize_task(
    samples: Sequence[dict[str, Any]], output_type: str | None, results: dict[str, Any]
) -> dict[str, Any]:
    """One task's result: the mean of each score over its items, with our interval; what is no mean, as lm-eval has it."""
    metric_names = [name.partition(",")[0] for name in results if "," in name and "stderr" not in name]
    values: dict[str, list[Any]] = {name: [one.get(name) for one in samples] for name in metric_names}
    # A score that is no mean (perplexity) is as lm-eval has it, without an interval.
    reported = {
        name: value for key, value in results.items() if "stderr" not in key for name in [key.partition(",")[0]]
    }
    means = {
        name: to_dict(metrics.proportion(list(map(float, of))))
        for name, of in values.items()
        if _is_all_numeric(of) and math.isclose(float(np.mean(of)), reported[name], rel_tol=1e-6, abs_tol=1e-9)
    }
    rest = {
        name: {"score": reported[name], "low": None, "high": None, "n": len(samples)}
        for name in metric_names
        if name not in means
    }
    metric = next(iter([*(name for name in ("acc_norm", "acc", "exact_match") if name in means), *means, *rest]))
    chance = _chance_accuracy(samples) if output_type == "multiple_choice" and metric.startswith("acc") else None
    first = (means | rest)[metric]
    return {
        "metric": metric, **first, "chance": chance,
        "above_chance": None if chance is None else first["low"] > chance,
        "scrambled": None, "groups": {},
        "others": {name: one for name, one in (means | rest).items() if name != metric},
    }  # fmt: skip


def _is_all_numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(one, int | float | np.number) for one in values)


def _chance_accuracy(samples: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([1 / len(one["resps"]) for one in samples]))


def _group_score(task_scores: Sequence[float], results: dict[str, Any]) -> dict[str, Any]:
    """A group's own score where lm-eval makes one, else none."""
    found = next((value for key, value in results.items() if "," in key and "stderr" not in key), None)
    score = float(found) if isinstance(found, int | float) else float(np.mean(task_scores))
    return {"score": score, "low": None, "high": None, "chance": None, "above_chance": None, "scrambled": None}
