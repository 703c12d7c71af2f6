"""Deprecated: `LMEval` is in `nextword.evaluation`."""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LMEval":
        from nextword.evaluation.lm_eval_adapter import lm_eval_model_class

        warnings.warn("nextword.judging is deprecated: import LMEval from nextword.evaluation", DeprecationWarning, 2)
        return lm_eval_model_class()
    raise AttributeError(f"module 'nextword.judging' has no attribute {name!r}")
