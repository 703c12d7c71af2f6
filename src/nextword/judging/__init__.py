"""A model judged: suites of questions, texts, and lm-eval's tasks, each score beside what it is worth.

`LMEval` is a class of lm-eval's, made where that package is installed: `lm_eval.simple_evaluate(LMEval(model), tasks=[…])`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LMEval":
        from nextword.judging.harness import adapter

        return adapter()
    raise AttributeError(f"module 'nextword.judging' has no attribute {name!r}")
