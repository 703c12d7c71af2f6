"""Evaluation of a model: benchmarks, text, label efficiency, and lm-eval tasks, with confidence intervals."""
