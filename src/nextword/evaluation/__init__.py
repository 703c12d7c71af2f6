"""Evaluation of a model: benchmarks, text, and lm-eval tasks, with confidence intervals.

`LMEval` is a subclass of lm-eval's `LM`, created when that package is installed:
`lm_eval.simple_evaluate(LMEval(model), tasks=[…])`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LMEval":
        from nextword.evaluation.lm_eval_adapter import lm_eval_model_class

        return lm_eval_model_class()
    raise AttributeError(f"module 'nextword.evaluation' has no attribute {name!r}")
