"""One run of an ablation: `python -m benchmarks.pretraining_worker SHARDS JSON` prints one JSON object.

The model, dropout, data order, training step and evaluation are those of nextword. The training loop is separate, so that
choices under test need no setting in nextword: projections initialized to zero, averaged weights, a growing batch size, and the
same order in every epoch.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nextword.data.corpus import Corpus
from nextword.data.dataset import Batch, TokenDataset, derive_seed
from nextword.inference.perplexity import evaluate_perplexity
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.planning.size_selection import default_dropout, default_peak_lr
from nextword.training.config import TrainingConfig
from nextword.training.losses import LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer
from nextword.training.step import StepSettings, TrainState, train_step

DEFAULTS: dict[str, Any] = {
    "preset": "modern",
    "size": "tiny",
    "model": {},
    "seed": 0,
    "tokens": 1_000_000,
    "batch_tokens": 8192,
    "optimizer": "muon",
    "lr": None,
    "matrix_lr": None,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "momentum": 0.95,
    "clip": 1.0,
    "schedule": "wsd",
    "warmup": 0.02,
    "final_lr": 0.0,
    # Choices without a setting in nextword:
    "zero_projections": False,
    "average": 0.0,
    "ramp": 0.0,
    "same_order": False,
    "embedding_lr": None,
}

MIN_EPOCHS_FOR_BEST = 4.0  # from this number of epochs, the best weights are kept instead of the last
VALIDATION_TOKENS = 2**17  # maximum, the same for all runs on a text


class SameOrder(TokenDataset):
    """The same order in every epoch."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return super().batch(step % max(1, self.num_windows // self.batch_size), rank, world_size)


def batches(data: TokenDataset, total: int, ramp: float) -> Iterator[tuple[Batch, float]]:
    """The batch of each step, and the fraction of the run that is complete after it.

    With a ramp, the first fraction of the run uses a quarter, then a half of the batch size.
    """
    rows, done, step = data.batch_size, 0, 0
    while done < total:
        share = done / total
        data.batch_size = max(1, rows // 4) if share < ramp / 2 else max(1, rows // 2) if share < ramp else rows
        batch = data.batch(step)
        done += data.batch_size * data.context_length
        step += 1
        yield batch, min(1.0, done / total)


class BestWeights:
    """The weights with the lowest loss on a part of the validation set, evaluated as often as by nextword."""

    def __init__(self, corpus: Corpus, context_length: int):
        self.corpus, self.num_windows = corpus, VALIDATION_TOKENS // 4 // context_length
        self.num_validations, self.loss = 0, math.inf
        self.model: GPT | None = None

    def evaluate(self, model: GPT, progress: float) -> None:
        if math.floor(20 * progress + 1e-9) == self.num_validations:
            return
        self.num_validations = math.floor(20 * progress + 1e-9)
        corpus = self.corpus
        result = evaluate_perplexity(
            model, corpus.tokens("validation"), corpus.validation.bytes, max_windows=self.num_windows
        )
        if result.loss < self.loss:
            self.loss, self.model = result.loss, copy.deepcopy(model)


def run(corpus: Corpus, s: dict[str, Any]) -> dict[str, Any]:
    epochs = s["tokens"] / corpus.train.tokens
    config = build_config(s["preset"], s["size"], vocab_size=corpus.tokenizer.vocab_size, **s["model"])
    dropout = default_dropout(epochs, corpus.train.bytes / config.parameters)
    config = replace(config, dropout=s["model"].get("dropout", dropout))
    torch.manual_seed(derive_seed(s["seed"], 3))
    model = GPT(config)
    if s["zero_projections"]:
        with torch.no_grad():
            for block in model.blocks:
                block.attention.output.weight.zero_()
                block.feed_forward.down.weight.zero_()
    lr = s["lr"] or default_peak_lr(config.d_model, s["batch_tokens"], s["optimizer"])
    names = ("optimizer", "matrix_lr", "beta2", "weight_decay", "momentum", "schedule", "warmup", "final_lr", "clip")
    training = TrainingConfig(lr=lr, **{name: s[name] for name in names})
    state = TrainState(model, Optimizer(model, training))
    step_module = LossModule(model, causal_lm_loss, kernels=model.supports_kernels())
    rows = max(1, round(s["batch_tokens"] / config.context_length))
    dataset_class = SameOrder if s["same_order"] else TokenDataset
    data = dataset_class(corpus.tokens("train"), config.context_length, rows, s["seed"])
    settings = StepSettings(training, s["seed"], micro_batch_rows=max(1, 8192 // config.context_length))
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()} if s["average"] else {}
    begin, losses = time.process_time(), []
    best = BestWeights(corpus, config.context_length) if epochs >= MIN_EPOCHS_FOR_BEST else None
    for batch, progress in batches(data, s["tokens"], s["ramp"]):
        metrics = train_step(state, step_module, batch, settings, progress)
        losses.append(metrics.loss)
        if not math.isfinite(metrics.loss):
            return {"bits_per_byte": math.nan, "steps": state.step}
        for name, p in model.named_parameters():
            if averaged:  # over about this fraction of the run, or all steps so far
                averaged[name].lerp_(
                    p.detach(), 1 / min(state.step, max(1.0, s["average"] * s["tokens"] / s["batch_tokens"]))
                )
        if best is not None:
            best.evaluate(model, progress)
    seconds = time.process_time() - begin  # CPU time of one thread
    if best is not None and best.model is not None:
        model = best.model
    if averaged:
        model = copy.deepcopy(model)
        model.load_state_dict(averaged, strict=False)
    windows = VALIDATION_TOKENS // config.context_length
    result = evaluate_perplexity(model, corpus.tokens("validation"), corpus.validation.bytes, max_windows=windows)
    return {
        "bits_per_byte": result.bits_per_byte,
        "loss": result.loss,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": seconds,
        "parameters": config.parameters,
        "unique": corpus.train.tokens,
        "last_losses": sum(losses[-20:]) / len(losses[-20:]),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    corpus, settings = Corpus.open(Path(sys.argv[1])), json.loads(sys.argv[2])
    if unknown := set(settings) - set(DEFAULTS):
        raise SystemExit(f"unknown settings: {', '.join(sorted(unknown))}")
    print(json.dumps(run(corpus, {**DEFAULTS, **settings})))


if __name__ == "__main__":
    main()
