"""AdamW, Muon and learning rate schedules.

Muon updates the matrices inside the blocks. AdamW updates everything else (embeddings, head, norms, biases), or all of it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nextword.training.config import DEFAULT_WEIGHT_DECAY, LRSchedule, TrainingConfig
from nextword.training.distributed import SINGLE_PROCESS, DistContext
from nextword.training.parallel import run_on_owner_rank, to_local

WSD_DECAY_FRACTION = 0.4  # of the run, in which the "wsd" schedule decays
NEWTON_SCHULZ_ITERATIONS = 5


def lr_multiplier(progress: float, schedule: LRSchedule, warmup_fraction: float, final_lr_ratio: float) -> float:
    """The learning rate at a point of the run, as a fraction of the peak.

    Args:
        progress: the fraction of the run that is done after this step, 0 to 1.
        schedule: what follows the linear warmup: "cosine", half a cosine (Loshchilov and Hutter 2017); "linear"; "wsd",
            constant, then linear (warmup, stable, decay: Hu et al. 2024); or "constant".
        warmup_fraction: the fraction of the run that warms up.
        final_lr_ratio: the learning rate at the end, as a fraction of the peak.
    """
    if progress < warmup_fraction or warmup_fraction == 1:
        return progress / warmup_fraction
    remaining = (1 - progress) / (1 - warmup_fraction)  # 1 after the warmup, 0 at the end
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * (1 - remaining)))
    elif schedule == "linear":
        decay = remaining
    else:
        decay = min(1.0, (1 - progress) / min(WSD_DECAY_FRACTION, 1 - warmup_fraction))
    return final_lr_ratio + (1 - final_lr_ratio) * decay


# ---------------------------------------------------------------- Muon


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace each matrix U S Vᵀ of a stack by approximately U Vᵀ.

    Newton–Schulz iteration with the quintic polynomial of Jordan et al. 2024, "Muon: an optimizer for hidden layers", section
    "Newton-Schulz". It brings the singular values to between about 0.7 and 1.2. Computed in bfloat16 on a GPU, and in float32
    on a CPU, where bfloat16 is slow.

    Args:
        matrices: a stack [N, R, C].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    is_wide = x.shape[-2] <= x.shape[-1]
    x = x if is_wide else x.mT  # so that the Gram matrix has the shorter side
    norms = cast(Tensor, x.norm(dim=(-2, -1), keepdim=True))  # pyright: ignore[reportUnknownMemberType]  (untyped)
    x = x / (norms + 1e-7)
    for _ in range(NEWTON_SCHULZ_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if is_wide else x.mT).to(matrices.dtype)


def orthogonalize_batched(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalize` for matrices of any shapes. Those of equal shapes, up to a transposition, go through it as one stack."""
    stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        stacks[min(matrix.shape), max(matrix.shape)].append(i)
    results = list(matrices)
    for indices in stacks.values():
        is_tall = {i: matrices[i].shape[0] > matrices[i].shape[1] for i in indices}
        stack = torch.stack([matrices[i].mT if is_tall[i] else matrices[i] for i in indices])
        for i, result in zip(indices, orthogonalize(stack), strict=True):
            results[i] = result.mT if is_tall[i] else result
    return results


class Muon:
    """Nesterov momentum, orthogonalised, for matrices [out, in] (Jordan et al. 2024).

    Updates are scaled by 0.2·√max(out, in), which gives them the size of AdamW's, so that both share a learning rate (Liu et
    al. 2025, "Muon is scalable for LLM training", equation 4). Weight decay is decoupled.

    Args:
        parameters: the matrices, sharded or not.
        momentum: the decay of the moving average of gradients.
        weight_decay: decoupled weight decay.
        ctx: the processes; each matrix is orthogonalised on one of them.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, momentum: float, weight_decay: float, ctx: DistContext = SINGLE_PROCESS
    ):
        self.momentum, self.weight_decay, self.ctx = momentum, weight_decay, ctx
        self.state = {p: {"momentum": torch.zeros_like(p)} for p in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients with learning rate `lr`."""
        directions: dict[Tensor, Tensor] = {}
        for p, state in self.state.items():
            if p.grad is not None:
                gradient, average = to_local(p.grad), to_local(state["momentum"])
                average.lerp_(gradient, 1 - self.momentum)
                directions[p] = torch.lerp(gradient, average, self.momentum)  # Nesterov
        if self.ctx.world_size == 1:
            updates = orthogonalize_batched(list(directions.values()))
        else:
            updates = run_on_owner_rank(directions, orthogonalize_batched, self.ctx)
        for p, update in zip(directions, updates, strict=True):
            local = to_local(p)
            local.mul_(1 - lr * self.weight_decay)
            local.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


# ---------------------------------------------------------------- AdamW


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) by PyTorch's function.

    `torch.optim.AdamW` takes the same steps, but its import of torch.compile costs more time than a small run's preparation.

    Args:
        groups: lists of parameters, each with its decoupled weight decay.
        betas: the decays of the moving averages of gradients and squared gradients.
        eps: added to the denominator.
        fused: use the fused kernel.
    """

    def __init__(
        self, groups: Iterable[tuple[Sequence[Tensor], float]], *, betas: tuple[float, float], eps: float, fused: bool
    ):
        self.groups = [(parameters, decay) for parameters, decay in groups if parameters]
        self.betas, self.eps, self.fused = betas, eps, fused
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients with learning rate `lr`."""
        for group, weight_decay in self.groups:
            gradients = {p: to_local(p.grad) for p in group if p.grad is not None}
            for p in gradients:
                if p in self.state:
                    continue
                # The fused kernel wants the step count as a tensor on the parameter's device.
                step = torch.zeros((), device=p.device if self.fused else "cpu")
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            states = [self.state[p] for p in gradients]
            adamw(
                [to_local(p) for p in gradients],
                list(gradients.values()),
                [to_local(state["exp_avg"]) for state in states],
                [to_local(state["exp_avg_sq"]) for state in states],
                [],  # for AMSGrad
                [state["step"] for state in states],
                fused=self.fused,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=weight_decay,
                eps=self.eps,
                maximize=False,
            )


# ---------------------------------------------------------------- both


class Optimizer:
    """The optimizer of a whole model. Its state is a dictionary of named tensors, so that it is saved without pickle.

    "muon" updates the matrices inside the blocks (without LoRA's) with Muon, and everything else with AdamW. Matrices have
    weight decay, embeddings included; norms and biases have none. Frozen parameters are left out.

    Args:
        model: the model.
        config: the settings; `lr` must be set.
        ctx: the processes.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, ctx: DistContext = SINGLE_PROCESS):
        assert config.lr is not None, "the learning rate is chosen before the run starts"
        self.lr, self.matrix_lr = config.lr, config.matrix_lr or config.lr
        self.parameter_names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        matrices = [
            p
            for p, name in self.parameter_names.items()
            if config.optimizer == "muon" and p.ndim == 2 and "blocks." in name and "lora_" not in name
        ]
        rest = [p for p in self.parameter_names if p not in set(matrices)]
        weight_decay = DEFAULT_WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
        groups = [([p for p in rest if p.ndim >= 2], weight_decay), ([p for p in rest if p.ndim < 2], 0.0)]
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        self.adamw = AdamW(groups, betas=(config.beta1, config.beta2), eps=1e-8, fused=fused)
        self.muon = Muon(matrices, momentum=config.momentum, weight_decay=weight_decay, ctx=ctx)
        self._states = {"adamw": self.adamw.state, "muon": self.muon.state}

    def step(self, lr_scale: float) -> None:
        """Apply the gradients with `lr_scale` times the peak learning rate."""
        self.adamw.step(self.lr * lr_scale)
        if self.muon.state:
            self.muon.step(self.matrix_lr * lr_scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by name ("adamw.exp_avg.NAME", "muon.momentum.NAME"), sharded like the parameters."""
        return {
            f"{kind}.{key}.{self.parameter_names[p]}": value
            for kind, states in self._states.items()
            for p, state in states.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from `state_tensors()`: whole tensors, or sharded like the parameters now are."""
        parameters = {name: p for p, name in self.parameter_names.items()}
        for key, value in tensors.items():
            kind, state_name, name = key.split(".", 2)
            p = parameters[name]
            self._states[kind].setdefault(p, {})[state_name] = value.to(p.device)
