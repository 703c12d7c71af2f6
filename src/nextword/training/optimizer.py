"""AdamW, Muon and learning rate schedules.

Muon updates the matrices inside the blocks. AdamW updates everything else (embeddings, head, norms, biases), or all of it.
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
    """The learning rate at a point of the run, as a fraction of the peak.

    Args:
        progress: the fraction of the run that is done after this step, 0 to 1.
        schedule: what follows the linear warmup: "cosine", half a cosine (Loshchilov and Hutter 2017); "linear"; "wsd",
            constant, then linear (warmup, stable, decay: Hu et al. 2024); or "constant".
        warmup_fraction: the fraction of the run that warms up.
        final_lr_ratio: the learning rate at the end, as a fraction of the peak.
        decay_fraction: the fraction of the run in which "wsd" decays.
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
        decay = min(1.0, (1 - progress) / min(decay_fraction, 1 - warmup_fraction))
    return final_lr_ratio + (1 - final_lr_ratio) * decay


# ---------------------------------------------------------------- Muon


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Replace each matrix U S Vᵀ of a stack by approximately U Vᵀ.

    Newton–Schulz iteration with the quintic polynomial of Jordan et al. 2024, "Muon: an optimizer for hidden layers", section
    "Newton-Schulz". It brings the singular values to between about 0.7 and 1.2. Computed in bfloat16 on a GPU, and in float32
    on a CPU, where bfloat16 is slow.

    Args:
        matrices: a stack [N, R, C].
        iterations: the number of iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    is_wide = x.shape[-2] <= x.shape[-1]
    x = x if is_wide else x.mT  # so that the Gram matrix has the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
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
        self,
        parameters: Iterable[nn.Parameter],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ctx: DistContext = SINGLE_PROCESS,
    ):
        self.parameters, self.ctx = list(parameters), ctx
        self.momentum, self.weight_decay = momentum, weight_decay
        self.momentum_buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients with learning rate `lr`."""
        parameters, directions = [], []
        for p, buffer in zip(self.parameters, self.momentum_buffers, strict=True):
            if p.grad is not None:
                gradient, average = to_local(p.grad), to_local(buffer)
                average.lerp_(gradient, 1 - self.momentum)
                parameters.append(p)
                directions.append(torch.lerp(gradient, average, self.momentum))  # Nesterov
        if self.ctx.world_size == 1:
            updates = orthogonalize_batched(directions)
        else:
            updates = run_on_owner_rank(parameters, directions, orthogonalize_batched, self.ctx)
        for p, update in zip(parameters, updates, strict=True):
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
        self, groups: Iterable[tuple[list[nn.Parameter], float]], *, betas: tuple[float, float], eps: float, fused: bool
    ):
        self.groups = [(parameters, decay) for parameters, decay in groups if parameters]
        self.betas, self.eps, self.fused = betas, eps, fused
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients with learning rate `lr`."""
        for group, weight_decay in self.groups:
            parameters = [p for p in group if p.grad is not None]
            for p in parameters:
                if p not in self.state:
                    self.state[p] = self._init_state(p)
            states = [self.state[p] for p in parameters]
            adamw(
                [to_local(p) for p in parameters],
                [to_local(p.grad) for p in parameters if p.grad is not None],
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

    def _init_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        # The fused kernel wants the step count as a tensor on the parameter's device.
        step = torch.zeros((), device=p.device if self.fused else "cpu")
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


# ---------------------------------------------------------------- both


class Optimizer:
    """The optimizer of a whole model. Its state is a dictionary of named tensors, so that it is saved without pickle.

    Args:
        model: the model; frozen parameters are left out.
        kind: "adamw" for all parameters, or "muon" for the matrices inside the blocks (without LoRA's) and AdamW for the rest.
        lr: the peak learning rate.
        matrix_lr: the peak learning rate of Muon; None for `lr`.
        betas: see `AdamW`.
        weight_decay: decoupled weight decay of matrices, embeddings included; norms and biases have none.
        momentum: see `Muon`.
        ctx: the processes.
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
        ctx: DistContext = SINGLE_PROCESS,
    ):
        self.lr, self.matrix_lr = lr, lr if matrix_lr is None else matrix_lr
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameter_names: dict[Tensor, str] = {p: name for name, p in trainable.items()}
        matrices, rest = [], []
        for name, p in trainable.items():
            is_block_matrix = p.ndim == 2 and "blocks." in name and "lora_" not in name
            (matrices if kind == "muon" and is_block_matrix else rest).append(p)
        groups = [([p for p in rest if p.ndim >= 2], weight_decay), ([p for p in rest if p.ndim < 2], 0.0)]
        device = next(model.parameters()).device.type
        self.adamw = AdamW(groups, betas=betas, eps=1e-8, fused=device in ("cpu", "cuda"))
        self.muon = Muon(matrices, momentum=momentum, weight_decay=weight_decay, ctx=ctx) if matrices else None

    def step(self, lr_scale: float) -> None:
        """Apply the gradients with `lr_scale` times the peak learning rate."""
        self.adamw.step(self.lr * lr_scale)
        if self.muon is not None:
            self.muon.step(self.matrix_lr * lr_scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by name ("adamw.exp_avg.NAME", "muon.momentum.NAME"), sharded like the parameters."""
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
        """Restore the state from `state_tensors()`: whole tensors, or sharded like the parameters now are."""
        parameters = {name: p for p, name in self.parameter_names.items()}
        momentum_buffers: dict[Tensor, Tensor] = {}
        for key, value in tensors.items():
            kind, state_name, name = key.split(".", 2)
            parameter = parameters[name]
            if kind == "adamw":
                self.adamw.state.setdefault(parameter, {})[state_name] = value.to(parameter.device)
            else:
                momentum_buffers[parameter] = value.to(parameter.device)
        if self.muon is not None and momentum_buffers:
            self.muon.momentum_buffers = [momentum_buffers[p] for p in self.muon.parameters]
