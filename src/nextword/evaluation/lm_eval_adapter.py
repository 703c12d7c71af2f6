"""Tasks of lm-eval on a model in this process (https://github.com/EleutherAI/lm-evaluation-harness)."""

import functools
import itertools
import math
import types
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from nextword.common.console import Console
from nextword.common.errors import NextwordError, UsageError, import_optional
from nextword.common.statistics import ScoreWithCI, mean, proportion
from nextword.evaluation.evaluate import against_chance, to_dict
from nextword.inference.engine import Engine
from nextword.inference.loglikelihood import LoglikelihoodScorer, ScoredSequence
from nextword.inference.sampling import Sampling
from nextword.pipeline.item_scores import GENERATION_BATCH_SIZE
from nextword.pipeline.language_model import LanguageModel

DEFAULT_MAX_TOKENS = 256  # lm-eval's default for tasks that do not set it
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class LMEvalAdapter:
    """The methods of `lm_eval.api.model.LM` for a nextword model. The `args` of a request are its texts."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model
        self.scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer, check_greedy=True)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding generates it."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        # The answers to one question are adjacent; grouped, their common prefix is computed once.
        groups = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[0])]
        return [(score.logprob, score.is_greedy) for scores in self.scorer.score_pairs(groups) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-likelihood of each text, in windows that together predict each token once."""
        windows = [list(self._rolling_windows(str(request.args[0]))) for request in requests]
        scores = iter(self.scorer.score_sequences([[window] for entry in windows for window in entry]))
        return [sum(next(scores)[0].logprob for _ in entry) for entry in windows]

    def _rolling_windows(self, text: str) -> Iterator[ScoredSequence]:
        """The windows of lm-eval's `get_rolling_token_windows` with context_len 1.

        The first window starts with the prefix token. All others have the maximum length, so that the last one has more context
        than targets.
        """
        tokenizer = self.model.tokenizer
        ids = [self.scorer.prefix_token_id, *tokenizer.bos_ids, *tokenizer.encode(text)]
        length = self.model.gpt.config.context_length
        for start in range(1, len(ids), length):
            end = min(start + length, len(ids))
            yield ScoredSequence(ids[max(0, end - length - 1) : end], end - start)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The text generated after each context, up to a stop string."""
        model = self.model
        engine = Engine(model.gpt, model.tokenizer, max_batch=GENERATION_BATCH_SIZE, seed=0, runner=model.runner)
        texts: dict[int, str] = {}
        for request in requests:
            sampling = _sampling_from_generation_kwargs(dict(request.args[1]))
            max_prompt_tokens = max(1, model.gpt.config.context_length - sampling.max_tokens)
            prompt = [*model.tokenizer.bos_ids, *model.tokenizer.encode(str(request.args[0]))][-max_prompt_tokens:]
            texts[engine.add_request(prompt, sampling)] = ""
        while engine.has_unfinished_requests:
            for event in engine.step():
                if event.error:
                    raise NextwordError(event.error)
                texts[event.request_id] += event.text
        return list(texts.values())

    @property
    def tokenizer_name(self) -> str:
        """Names the model in the caches of lm-eval."""
        return str(self.model.path)


def _sampling_from_generation_kwargs(generation_kwargs: dict[str, Any]) -> Sampling:
    """The sampling of lm-eval's `generation_kwargs`: greedy unless they set do_sample or a temperature."""
    settings = {name: value for name, value in generation_kwargs.items() if value is not None}
    until: str | list[str] = settings.get("until") or []
    drawn: dict[str, Any] = {"temperature": 0.0}
    if settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
        drawn = {"temperature": 1.0} | {key: settings[key] for key in SAMPLING_KEYS if key in settings}
    return Sampling(
        max_tokens=int(next((settings[key] for key in MAX_TOKENS_KEYS if key in settings), DEFAULT_MAX_TOKENS)),
        stop=tuple([until] if isinstance(until, str) else [text for text in until if text]),
        **drawn,
    )


@functools.cache
def lm_eval_model_class() -> Any:
    """The class `LMEval(model)`: an `lm_eval.api.model.LM` for a `nextword.LanguageModel`.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    return types.new_class("LMEval", (LMEvalAdapter, _import_lm_eval("lm_eval.api.model").LM))


def _import_lm_eval(module: str) -> Any:
    return import_optional(module, "an lm-eval task", "lm-eval")


def run_lm_eval_task(
    model: LanguageModel, task: str, limit: int | None, console: Console | None = None, **settings: Any
) -> dict[str, Any]:
    """Evaluate a model on a task, or a group of tasks, of lm-eval. Metrics are lm-eval's, confidence intervals nextword's.

    Args:
        model: The model.
        task: Name of the task or group.
        limit: Number of items of each task, from the start; None: all.
        console: Where messages go.
        settings: Further arguments of `lm_eval.simple_evaluate`.

    Returns:
        The result as in `nextword evaluate --json`.

    Raises:
        UsageError: lm-eval has no such task.
        MissingDependencyError: lm-eval is not installed.
    """
    lm, evaluator = lm_eval_model_class()(model), _import_lm_eval("lm_eval.evaluator")
    task_manager = settings.pop("task_manager", None) or _import_lm_eval("lm_eval.tasks").TaskManager()
    if task not in task_manager.all_tasks:
        raise UsageError(f"lm-eval has no task {task!r}; list its tasks with: lm_eval ls tasks")
    (console or Console(quiet=True)).info(f"lm-eval: {task}")
    with redirect_stdout(StringIO()):  # lm-eval prints to standard output, which is reserved for the result
        results = evaluator.simple_evaluate(
            lm, tasks=[task], limit=limit, task_manager=task_manager, bootstrap_iters=0, **settings
        )
    task_results = {
        name: _summarize_task(samples, results["configs"].get(name, {}).get("output_type"), results["results"][name])
        for name, samples in results["samples"].items()
    }
    if list(task_results) == [task]:
        return task_results[task]
    scores = [result["score"] for result in task_results.values()]
    reported = next(iter(_reported_metrics(results["results"].get(task, {})).values()), None)
    score = float(reported if isinstance(reported, int | float) else np.mean(scores))
    return {
        "metric": "tasks",
        **to_dict(ScoreWithCI(score, n=sum(result["n"] for result in task_results.values()))),
        "chance": None,
        "above_chance": None,
        "scrambled": None,
        "groups": task_results,
    }


def _reported_metrics(results: dict[str, Any]) -> dict[str, Any]:
    """The metrics that lm-eval reports for a task or a group, by name, without their standard errors."""
    return {key.partition(",")[0]: value for key, value in results.items() if "," in key and "stderr" not in key}


def _summarize_task(
    samples: Sequence[dict[str, Any]], output_type: str | None, results: dict[str, Any]
) -> dict[str, Any]:
    """The result of a task. A metric that is not a mean over items, such as perplexity, has no confidence interval."""
    scores: dict[str, ScoreWithCI] = {}
    for name, value in _reported_metrics(results).items():
        values: list[Any] = [sample.get(name) for sample in samples]
        is_mean = all(isinstance(entry, int | float | np.number) for entry in values) and math.isclose(
            float(np.mean(values)), value, rel_tol=1e-6, abs_tol=1e-9
        )
        score = ScoreWithCI(value, n=len(samples))
        if is_mean:
            numbers = list(map(float, values))
            score = proportion(numbers) if min(numbers) >= 0 and max(numbers) <= 1 else mean(numbers)
        scores[name] = score
    means = [name for name, score in scores.items() if score.low is not None]
    metric = next(iter([*(name for name in ("acc_norm", "acc", "exact_match") if name in means), *means, *scores]))
    is_choice = output_type == "multiple_choice" and metric.startswith("acc")
    chance = float(np.mean([1 / len(sample["resps"]) for sample in samples])) if is_choice else None
    return {
        "metric": metric,
        **against_chance(scores.pop(metric), chance),
        "scrambled": None,
        "groups": {},
        "others": {name: to_dict(score) for name, score in scores.items()},
    }
