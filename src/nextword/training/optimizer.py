"""How gradients become new weights: AdamW, Muon, and the learning rate of a step.

Muon takes the matrices inside the blocks; AdamW takes everything else (embeddings, head, norms, biases), or everything.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.parallel import run_on_owner_rank, to_local

LRSchedule = Literal["cosine", "wsd", "linear", "constant"]


def lr_multiplier(
    progress: float, schedule: LRSchedule, warmup_fraction: float, final_lr_ratio: float, decay_fraction: float = 0.4
) -> float:
    """The learning rate's factor at `progress` (0 to 1, the share of the run that is done once this step is).

    A linear rise over the share `warmup`, then by `schedule` down to the share `final` of the peak: half a cosine
    (Loshchilov and Hutter 2017), a straight line, or flat and then a straight line over the last `decay` of the run
    (warm-up, stable, decay: Hu et al. 2024).
    """
    if progress < warmup_fraction or warmup_fraction == 1:
        return progress / warmup_fraction
    left = (1 - progress) / (1 - warmup_fraction)  # 1 after the warm-up, 0 at the end
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    elif schedule == "linear":
        shape = left
    else:
        shape = min(1.0, (1 - progress) / min(decay_fraction, 1 - warmup_fraction))
    return final_lr_ratio + (1 - final_lr_ratio) * shape


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Replace each matrix U S Vᵀ of a stack [N, R, C] by about U Vᵀ: all of its directions, each equally strong.

    Newton and Schulz's iteration with the quintic polynomial of Jordan et al. 2024 ("Muon", the Newton-Schulz section),
    which brings singular values to between about 0.7 and 1.2. In float32 on a CPU, where bfloat16 is slow; in bfloat16
    on a GPU, where it suffices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the products below have the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon:
    """Momentum, made orthogonal, for matrices [out, in] (Jordan et al. 2024).

    The step is scaled by 0.2·√max(out, in), so that its size is AdamW's and one learning rate serves both
    (Liu et al. 2025, "Muon is scalable", equation 4). Weight decay is decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        world: DistContext = SINGLE_PROCESS,
    ):
        self.parameters, self.world = list(parameters), world
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.momentum_buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        updated_parameters = [p for p in self.parameters if p.grad is not None]
        directions = []
        for p, buffer in zip(self.parameters, self.momentum_buffers, strict=True):
            if p.grad is not None:
                gradient, mean = to_local(p.grad), to_local(buffer)
                mean.lerp_(gradient, 1 - self.momentum)
                directions.append(torch.lerp(gradient, mean, self.momentum))  # Nesterov's look ahead
        is_single_process = self.world.world_size == 1
        updates = (
            orthogonalize_batched(directions)
            if is_single_process
            else run_on_owner_rank(updated_parameters, directions, orthogonalize_batched, self.world)
        )
        for p, update in zip(updated_parameters, updates, strict=True):
            local = to_local(p)
            local.mul_(1 - lr * self.weight_decay)
            local.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize_batched(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix made orthogonal. Equal shapes go through the iteration as one stack; a [out, in] and an [in, out] matrix are
    equal once one is turned."""
    stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, direction in enumerate(matrices):
        stacks[min(direction.shape), max(direction.shape)].append(i)
    updates = list(matrices)
    for members in stacks.values():
        tall = {i for i in members if matrices[i].shape[0] > matrices[i].shape[1]}
        steps = orthogonalize(torch.stack([matrices[i].mT if i in tall else matrices[i] for i in members]))
        for i, update in zip(members, steps, strict=True):
            updates[i] = update.mT if i in tall else update
    return updates


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), by PyTorch's own function. Its class does the same, and imports a
    compiler first, which takes longer than many a small run's preparation.

    Args:
        groups: parameters, and the decoupled weight decay of each group of them.
    """

    def __init__(
        self, groups: Iterable[tuple[list[nn.Parameter], float]], *, betas: tuple[float, float], eps: float, fused: bool
    ):
        self.groups = [(parameters, decay) for parameters, decay in groups if parameters]
        self.betas, self.eps, self.fused = betas, eps, fused
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameters, decay in self.groups:
            gradients = {p: p.grad for p in parameters if p.grad is not None}
            for p in gradients:
                if p not in self.state:
                    self.state[p] = self._init_state(p)
            states = [self.state[p] for p in gradients]
            counts, means, squares = (
                [to_local(one[name]) for one in states] for name in ("step", "exp_avg", "exp_avg_sq")
            )
            weights, slopes = ([to_local(one) for one in some] for some in (gradients, gradients.values()))
            adamw(
                weights, slopes, means, squares, [], counts, fused=self.fused, amsgrad=False,
                beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=decay, eps=self.eps, maximize=False,
            )  # fmt: skip

    def _init_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        """How many steps, in a tensor where the fused kernel wants it, and the two averages."""
        count = torch.zeros((), device=p.device if self.fused else "cpu")
        return {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Optimizer:
    """One step for a whole model; its state as named tensors, so that it can be saved without a pickle.

    Args:
        kind: "adamw" for everything, or "muon" for the matrices inside the blocks (never an adapter's) and AdamW for the
            rest. What is frozen is left out.
        lr: the peak learning rate; `matrix_lr` is Muon's, and `lr` where it is None.
        weight_decay: decoupled, on matrices (embeddings included), not on norms and biases.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: Literal["adamw", "muon"],
        lr: float,
        matrix_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        momentum: float = 0.9,
        world: DistContext = SINGLE_PROCESS,
    ):
        self.lr, self.matrix_lr = lr, lr if matrix_lr is None else matrix_lr
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameter_names: dict[Tensor, str] = {p: name for name, p in trained.items()}
        block_parameters = {name for name in trained if "blocks." in name and "lora_" not in name}
        matrices = [p for name, p in trained.items() if kind == "muon" and p.ndim == 2 and name in block_parameters]
        rest = [p for p in trained.values() if not any(p is m for m in matrices)]
        groups = [([p for p in rest if p.ndim >= 2], weight_decay), ([p for p in rest if p.ndim < 2], 0.0)]
        device = next(model.parameters()).device.type
        self.adamw = AdamW(groups, betas=betas, eps=1e-8, fused=device in ("cpu", "cuda"))
        self.muon = Muon(matrices, momentum=momentum, weight_decay=weight_decay, world=world) if matrices else None

    def step(self, lr_scale: float) -> None:
        """Apply the gradients at `factor` times the peak learning rate."""
        self.adamw.step(self.lr * lr_scale)
        if self.muon is not None:
            self.muon.step(self.matrix_lr * lr_scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, by name: AdamW's step count and two averages, Muon's momentum; shared as weights are."""
        tensors = {
            f"adamw.{key}.{self.parameter_names[p]}": value
            for p, state in self.adamw.state.items()
            for key, value in state.items()
        }
        if self.muon is not None:
            for p, buffer in zip(self.muon.parameters, self.muon.momentum_buffers, strict=True):
                tensors[f"muon.momentum.{self.parameter_names[p]}"] = buffer
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state_tensors` gave, each tensor whole or shared as its weight now is."""
        by_name = {name: p for p, name in self.parameter_names.items()}
        momentum = {}
        for key, value in tensors.items():
            kind, state_name, name = key.split(".", 2)
            parameter = by_name[name]
            if kind == "adamw":
                # The count of steps stays a scalar tensor where the fused kernel wants it: with its parameter.
                self.adamw.state.setdefault(parameter, {})[state_name] = value.to(parameter.device)
            else:
                momentum[parameter] = value.to(parameter.device)
        if self.muon is not None and momentum:
            self.muon.momentum_buffers = [momentum[p] for p in self.muon.parameters]
