"""What a save costs: `python -m benchmarks.checkpointing [TURNS]`, a Markdown table.

Saves and steps of real size, on this machine's processor, in turn: a save by itself with and without its hash, and some steps
with a save beside them and without. As often as a run saves by itself is `checkpoint.SECONDS`, or `REST` times a save's cost.
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
digest = checkpoint.hash_buffers


class Trained:
    """A model with an optimizer that has its averages, and one step after another on the same random tokens."""

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

    def begin(self, saver: checkpoint.AsyncCheckpointer) -> None:
        saver.save_async(1, dict(self.model.named_parameters()), self.optimizer.state_tensors(), {"step": 1})


def seconds_of_a_save(trained: Trained, run: Path, hashed: bool) -> float:
    """By itself, from its beginning to the end."""
    checkpoint.hash_buffers = digest if hashed else lambda blocks: ({"bytes": 0, "sha256": ""}, 0.0)
    begin = time.perf_counter()
    with checkpoint.AsyncCheckpointer(run) as saver:
        trained.begin(saver)
        saver.wait()
    checkpoint.hash_buffers = digest
    return time.perf_counter() - begin


def seconds_of_steps(trained: Trained, run: Path, steps: int, saving: bool) -> tuple[float, float, float]:
    """So many steps, with a save beside them or without; what of it the steps waited for the copy, and a save's cost."""
    with checkpoint.AsyncCheckpointer(run) as saver:
        begin = time.perf_counter()
        if saving:
            trained.begin(saver)
        copied = time.perf_counter() - begin
        for _ in range(steps):
            trained.step()
        saver.wait()
        return time.perf_counter() - begin, copied, saver.overhead_seconds


def row(name: str, turns: int) -> str:
    trained = Trained(name)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Path(folder)
        seconds_of_a_save(trained, run, True)
        pairs = []
        for turn in range(6 * turns):  # now the one first, now the other
            order = (True, False) if turn % 2 else (False, True)
            pairs.append({hashed: seconds_of_a_save(trained, run, hashed) for hashed in order})
        with_hash = statistics.median(pair[True] for pair in pairs)
        hashing = statistics.median(1 - pair[False] / pair[True] for pair in pairs)
        begin = time.perf_counter()
        trained.step()
        steps = max(4, int(3 * with_hash / (time.perf_counter() - begin)))
        found = [[seconds_of_steps(trained, run, steps, saving) for saving in (True, False)] for _ in range(turns)]
    lost = statistics.median(saving[0] - alone[0] for saving, alone in found)
    copied = statistics.median(saving[1] for saving, _ in found)
    rest = max(
        checkpoint.SAVE_INTERVAL_SECONDS,
        checkpoint.MIN_INTERVAL_PER_SAVE_COST * statistics.median(saving[2] for saving, _ in found),
    )
    return (
        f"| {trained.parameters / 1e6:.1f} M | {with_hash:.2f} | {100 * hashing:.0f} % "
        f"| {copied:.3f} | {lost:.2f} | {rest:.0f} | {100 * lost / rest:.2f} % |"
    )


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(
        "\n| parameters | a save, s | of it hashing | steps wait, s | steps lose, s | between saves, s | slower on average |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in SIZES:
        print(row(name, turns), flush=True)


if __name__ == "__main__":
    main()
