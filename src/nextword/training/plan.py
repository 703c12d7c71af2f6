"""From the time there is and the text there is to the size of a model. Coarse on purpose: a size out of the table."""

import math
import time
from dataclasses import dataclass

import torch

from nextword.model.config import SIZES, build_config


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why, in words for the person."""

    size: str
    batch_tokens: int
    dropout: float
    why: str


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second that this device does in a matrix product of the kind that training is made of."""
    n = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):  # the best of five, since others may use the machine as well
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - start))
    return best


def choose(
    preset: str,
    vocab_size: int,
    unique_tokens: int,
    *,
    operations: float | None = None,
    tokens: int | None = None,
    size: str | None = None,
) -> Choice:
    """The largest size that the run can feed, and the dropout that suits how often it reads the text.

    Args:
        size: taken as it is where it is given.
        operations: floating-point operations that the run can do in all, where its length is a time.
        tokens: how many tokens it will see, where that is what is known.

    A run of C operations sees D = C / 6N tokens with a model of N parameters (Kaplan et al. 2020, section 2.1) and is best
    near D = 20 N (Hoffmann et al. 2022, table 3). A text that is read over and over stops teaching: past about 16 epochs
    little is left (Muennighoff et al. 2023, section 6), and then a smaller model and dropout serve better.
    """
    chosen, parameters, seen = "tiny", 0.0, 0.0
    for name in [size] if size else SIZES:
        layers, _, width, context = SIZES[name]
        n = build_config(preset, name, vocab_size=vocab_size).parameters
        per_token = 6 * n + 6 * layers * width * context  # and attention's own products over half a window
        budget = operations / per_token if operations is not None else float(tokens or 0)
        if parameters and (budget < 20 * n or unique_tokens * 16 < 20 * n):
            break
        chosen, parameters, seen = name, n, budget
    epochs = seen / max(1, unique_tokens)
    dropout = 0.0 if epochs < 4 else 0.1 if epochs < 16 else 0.2
    why = (
        f"size {chosen}: {parameters / 1e6:.2g} million parameters for about {seen / 1e6:.2g} million tokens, "
        f"{epochs:.1f} times over the text"
    )
    if dropout:
        why += f", so with dropout {dropout}"
    return Choice(chosen, batch_tokens(seen), dropout, why)


def batch_tokens(tokens: float) -> int:
    """Tokens of a step: some 1,500 steps, as far as the batch stays between what uses a machine and what still helps."""
    return 2 ** max(11, min(19, round(math.log2(max(1.0, tokens / 1500)))))
