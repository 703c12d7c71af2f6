"""One pre-training of a recipe under trial: `python -m benchmarks.pretraining_worker SHARDS JSON`; prints one JSON object.

The program's own model, dropout, data order, step and measure, in a loop of its own, so that what is only tried needs no
setting in the program: projections that begin at zero, an average of the weights, a batch that grows, an order that stays the
same.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
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
    "preset": "modern", "size": "tiny", "model": {}, "seed": 0, "tokens": 1_000_000, "batch_tokens": 8192,
    "optimizer": "muon", "lr": None, "matrix_lr": None, "weight_decay": 0.1, "beta2": 0.95, "momentum": 0.95, "clip": 1.0,
    "schedule": "wsd", "warmup": 0.02, "final_lr": 0.0,
    # What the program has no setting for:
    "zero_projections": False, "average": 0.0, "ramp": 0.0, "same_order": False, "embedding_lr": None,
}  # fmt: skip

LOOKED_AT = 4.0  # times over the text, from which on the weights are kept that were best; before, they are the last
HELD_OUT = 2**17  # tokens of held-out text that a run is measured on at most, the same for all on one text


class SameOrder(TokenDataset):
    """Every epoch in the order of the first."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return super().batch(step % max(1, self.num_windows // self.batch_size), rank, world_size)


def batches(data: TokenDataset, total: int, ramp: float) -> Iterator[tuple[Batch, float]]:
    """Each step's batch and the share of the run that is done once it is; with a ramp, the first share of the run in steps
    of a quarter, then of a half of the batch."""
    rows, done, step = data.batch_size, 0, 0
    while done < total:
        share = done / total
        data.batch_size = max(1, rows // 4) if share < ramp / 2 else max(1, rows // 2) if share < ramp else rows
        batch = data.batch(step)
        done += data.batch_size * data.context_length
        step += 1
        yield batch, min(1.0, done / total)


class Best:
    """The weights that were best on a part of the held-out text, looked at as often as the program does: what it keeps."""

    def __init__(self, corpus: Corpus, context_length: int):
        self.corpus, self.num_windows = corpus, HELD_OUT // 4 // context_length
        self.num_validations, self.loss = 0, math.inf
        self.model: GPT | None = None

    def look(self, model: GPT, progress: float) -> None:
        if math.floor(20 * progress + 1e-9) == self.num_validations:
            return
        self.num_validations = math.floor(20 * progress + 1e-9)
        corpus = self.corpus
        found = evaluate_perplexity(
            model, corpus.tokens("validation"), corpus.validation.bytes, max_windows=self.num_windows
        )
        if found.loss < self.loss:
            self.loss, self.model = found.loss, copy.deepcopy(model)


def run(corpus: Corpus, s: dict[str, Any]) -> dict[str, Any]:
    epochs = s["tokens"] / corpus.train.tokens
    shape = {"dropout": default_dropout(epochs), **s["model"]}
    config = build_config(s["preset"], s["size"], vocab_size=corpus.tokenizer.vocab_size, **shape)
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
    kind = SameOrder if s["same_order"] else TokenDataset
    data = kind(corpus.tokens("train"), config.context_length, rows, s["seed"])
    settings = StepSettings(training, s["seed"], micro_batch_rows=max(1, 8192 // config.context_length))
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()} if s["average"] else {}
    begin, losses = time.process_time(), []
    best = Best(corpus, config.context_length) if epochs >= LOOKED_AT else None
    for batch, progress in batches(data, s["tokens"], s["ramp"]):
        metrics = train_step(state, step_module, batch, settings, progress)
        losses.append(metrics.loss)
        if not math.isfinite(metrics.loss):
            return {"bits_per_byte": math.nan, "steps": state.step}
        for name, p in model.named_parameters():
            if averaged:  # over about this share of the run, and of what is there at its beginning
                averaged[name].lerp_(
                    p.detach(), 1 / min(state.step, max(1.0, s["average"] * s["tokens"] / s["batch_tokens"]))
                )
        if best is not None:
            best.look(model, progress)
    seconds = time.process_time() - begin  # of one thread, whatever else the machine does
    if best is not None and best.model is not None:
        model = best.model
    if averaged:
        model = copy.deepcopy(model)
        model.load_state_dict(averaged, strict=False)
    windows = HELD_OUT // config.context_length
    found = evaluate_perplexity(model, corpus.tokens("validation"), corpus.validation.bytes, max_windows=windows)
    return {
        "bits_per_byte": found.bits_per_byte, "loss": found.loss, "steps": state.step, "tokens": state.tokens,
        "seconds": seconds, "parameters": config.parameters, "unique": corpus.train.tokens,
        "last_losses": sum(losses[-20:]) / len(losses[-20:]), "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    corpus, settings = Corpus.open(Path(sys.argv[1])), json.loads(sys.argv[2])
    if unknown := set(settings) - set(DEFAULTS):
        raise SystemExit(f"no such settings: {', '.join(sorted(unknown))}")
    print(json.dumps(run(corpus, {**DEFAULTS, **settings})))


if __name__ == "__main__":
    main()
