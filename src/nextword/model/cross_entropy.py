"""Cross-entropy of hidden states against token ids, without ever holding all logits [N, V].

Shapes: N positions, D model width, V vocabulary. Targets are token ids; -100 (PyTorch's `ignore_index`) has no loss.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]  # untyped in torch

from nextword.model import ops

IGNORE_INDEX = -100
MAX_LOGITS = 2**26  # logits made at once: 256 MB of float32


def nll_sum(hidden: Tensor, unembedding: Tensor, targets: Tensor, kernels: bool = False) -> Tensor:
    """Σ −log softmax(hidden · unembeddingᵀ)[target] over the positions that have a target.

    Args:
        hidden: Hidden states, [N, D].
        unembedding: [V, D].
        targets: [N].
        kernels: Use the compiled operator, as in `GPT.forward`.

    Returns:
        A scalar, in nats.
    """
    if kernels:
        return ops.linear_cross_entropy(hidden, unembedding, targets)
    return token_nll(hidden, unembedding, targets).sum()


def token_nll(hidden: Tensor, unembedding: Tensor, targets: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """−log softmax(hidden · unembeddingᵀ)[target] of each position, in nats.

    More than `max_logits` logits are made in chunks of positions, and once more in the backward pass.

    Args:
        hidden: Hidden states, [N, D].
        unembedding: [V, D]; may be a DTensor that is split by rows (tensor parallelism).
        targets: [N].
        max_logits: Logits that are held at once.

    Returns:
        [N] in float32, 0 where the target is `IGNORE_INDEX`.
    """
    rows = max(1, max_logits // unembedding.shape[0])
    if len(hidden) <= rows:
        return _token_nll(hidden, unembedding, targets)
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat([checkpoint(_token_nll, h, unembedding, t, use_reentrant=False) for h, t in chunks])


def _token_nll(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    if hasattr(unembedding, "placements"):
        return vocab_parallel_cross_entropy(hidden, unembedding, targets)
    logits = F.linear(hidden, unembedding).float()
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)


def vocab_parallel_cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """`token_nll` with an unembedding that is split by rows between processes; none makes more than its own logits.

    Shoeybi et al. 2019, section 3. The log-sum-exp of the vocabulary is that of the processes' log-sum-exps, and the logit of
    the target comes from the one process that has its row.

    Args:
        hidden: Hidden states [N, D], the same in every process. Their gradient is a partial sum in each of them.
        unembedding: A DTensor [V, D].
        targets: [N].

    Returns:
        [N] in every process.
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    assert isinstance(unembedding, DTensor)
    mesh, local_unembedding = unembedding.device_mesh, unembedding.to_local()
    logits = F.linear(hidden, local_unembedding).float()  # [N, V / processes]
    shard_logsumexp = DTensor.from_local(logits.logsumexp(1)[None], mesh, [Shard(0)], run_check=False).full_tensor()
    first_row = mesh.get_local_rank() * -(-len(unembedding) // mesh.size())  # rows are split as by torch.chunk
    local_targets = targets - first_row
    is_local = (local_targets >= 0) & (local_targets < len(local_unembedding))
    indices = local_targets.clamp(0, len(local_unembedding) - 1)
    target_logits = logits.gather(1, indices[:, None])[:, 0].where(is_local, 0.0)
    target_logits = DTensor.from_local(target_logits, mesh, [Partial()], run_check=False).full_tensor()
    return (shard_logsumexp.logsumexp(0) - target_logits).where(targets != IGNORE_INDEX, 0.0)
