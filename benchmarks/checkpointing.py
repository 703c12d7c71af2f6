"""The cost of a checkpoint: `python -m benchmarks.checkpointing [ROUNDS]` prints a Markdown table.

Interleaved measurements on the CPU: a save with and without hashing, and training steps with and without a concurrent save. The
interval between saves is `checkpoint.SAVE_INTERVAL_SECONDS`, or `MIN_INTERVAL_PER_SAVE_COST` times the cost of a save.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training import checkpoint
from nextword.training.config import TrainingConfig
from nextword.training.losses import DeviceBatch, LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer

SIZES = {
    "small": {"n_layers": 5, "n_heads": 6, "d_model": 384, "context_length": 256, "vocab_size": 4096},
    "medium": {"n_layers": 8, "n_heads": 8, "d_model": 512, "context_length": 256, "vocab_size": 8192},
}
ROWS = 4
HASH_BUFFERS = checkpoint.hash_buffers


class TrainingFixture:
    """A model and an optimizer with its state, fixture on random tokens."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        config = build_config("gpt2", **SIZES[name])  # pyright: ignore[reportArgumentType]
        self.model = GPT(config)
        self.module = LossModule(self.model, causal_lm_loss)
        self.optimizer = Optimizer(self.model, TrainingConfig(optimizer="muon", lr=1e-4))
        tokens = torch.randint(config.vocab_size, (2, ROWS, config.context_length))
        self.inputs = DeviceBatch(tokens[0], tokens[1], None, None, None, None)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.step()

    def step(self) -> None:
        sum(loss.total for loss in self.module(self.inputs).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step(1.0)
        self.model.zero_grad(set_to_none=True)

    def start_save(self, saver: checkpoint.AsyncCheckpointer) -> None:
        saver.save_async(1, dict(self.model.named_parameters()), self.optimizer.state_tensors(), {"step": 1})


def save_seconds(fixture: TrainingFixture, run: Path, hashed: bool) -> float:
    """Seconds of a save without concurrent training."""
    checkpoint.hash_buffers = HASH_BUFFERS if hashed else lambda blocks: ({"bytes": 0, "sha256": ""}, 0.0)
    begin = time.perf_counter()
    with checkpoint.AsyncCheckpointer(run) as saver:
        fixture.start_save(saver)
        saver.wait()
    checkpoint.hash_buffers = HASH_BUFFERS
    return time.perf_counter() - begin


def step_seconds(fixture: TrainingFixture, run: Path, steps: int, saving: bool) -> tuple[float, float, float]:
    """Seconds of training steps with or without a concurrent save, of the copy that blocks training, and of a save's cost."""
    with checkpoint.AsyncCheckpointer(run) as saver:
        begin = time.perf_counter()
        if saving:
            fixture.start_save(saver)
        copied = time.perf_counter() - begin
        for _ in range(steps):
            fixture.step()
        saver.wait()
        return time.perf_counter() - begin, copied, saver.overhead_seconds


def row(name: str, rounds: int) -> str:
    fixture = TrainingFixture(name)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Path(folder)
        save_seconds(fixture, run, True)
        pairs = []
        for number in range(6 * rounds):  # in alternating order
            order = (True, False) if number % 2 else (False, True)
            pairs.append({hashed: save_seconds(fixture, run, hashed) for hashed in order})
        with_hash = statistics.median(pair[True] for pair in pairs)
        hashing = statistics.median(1 - pair[False] / pair[True] for pair in pairs)
        begin = time.perf_counter()
        fixture.step()
        steps = max(4, int(3 * with_hash / (time.perf_counter() - begin)))
        measurements = [[step_seconds(fixture, run, steps, saving) for saving in (True, False)] for _ in range(rounds)]
    lost = statistics.median(saving[0] - training[0] for saving, training in measurements)
    copied = statistics.median(saving[1] for saving, _ in measurements)
    interval = max(
        checkpoint.SAVE_INTERVAL_SECONDS,
        checkpoint.MIN_INTERVAL_PER_SAVE_COST * statistics.median(saving[2] for saving, _ in measurements),
    )
    return (
        f"| {fixture.parameters / 1e6:.1f} M | {with_hash:.2f} | {100 * hashing:.0f} % "
        f"| {copied:.3f} | {lost:.2f} | {interval:.0f} | {100 * lost / interval:.2f} % |"
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("\n| parameters | save, s | share of hashing | wait, s | time lost, s | interval, s | mean slowdown |")
    print("|---|---|---|---|---|---|---|")
    for name in SIZES:
        print(row(name, rounds), flush=True)


if __name__ == "__main__":
    main()
