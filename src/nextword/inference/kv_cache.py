"""KV cache: the keys and values of processed positions, for several sequences at once.

Shapes: B batch, T new positions, S cached positions, G key-value heads, K width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nextword.model.config import ModelConfig

INITIAL_CAPACITY = 256  # positions a cache first has memory for; the capacity doubles when it is exceeded


class KeyValueCache:
    """A `model.gpt.Cache` of several slots, each with one sequence of its own length.

    `prepare` says which positions the next forward pass computes. A slot with many tokens (prefill) and many slots with one
    token each (decoding) are handled alike. Memory grows with use: two numbers in the model's precision for each layer, slot,
    key-value head, position and element of a head.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        # [n_layers, slots, G, capacity, K]
        self.keys = torch.empty(config.n_layers, 0, config.n_kv_heads, 0, config.head_dim)
        self.values = self.keys
        self.prepare([0], [0], 1)

    def prepare(
        self, slots: Sequence[int], starts: Sequence[int], num_tokens: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Select the positions of the next forward pass. What a slot holds from there on is overwritten.

        Args:
            slots: The slot of each row of the batch, [B].
            starts: The first new position of each row, [B].
            num_tokens: New positions of each row, T.
            device: Device of the model.

        Returns:
            The positions, [B, T].

        Raises:
            ValueError: A position is beyond the context length.
        """
        end = max(starts) + num_tokens
        if end > self.config.context_length:
            raise ValueError(f"{end} positions are more than the context length of {self.config.context_length}")
        self.num_slots, self.cached_length = max(slots) + 1, end
        self.slots = torch.tensor(slots, device=device)  # [B]
        # [B, T]
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(num_tokens, device=device)
        # Adjacent slots are a view of the cache; others are copied out of it.
        is_adjacent = list(slots) == list(range(slots[0], slots[-1] + 1))
        self.slot_index = slice(slots[0], slots[-1] + 1) if is_adjacent else self.slots
        # [B, 1, T, S]; also hides unwritten positions
        self.mask = (torch.arange(end, device=device) <= self.positions[:, :, None])[:, None]
        return self.positions

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store a layer's new keys and values [B, G, T, K]; return all of the selected slots, [B, G, S, K], and the mask."""
        self.reserve(self.num_slots, self.cached_length, keys)
        selected: list[Tensor] = []
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):  # [slots, G, capacity, K]
            cached.transpose(1, 2)[self.slots[:, None], self.positions] = new.transpose(1, 2)  # [B, T, G, K]
            selected.append(cached[self.slot_index, :, : self.cached_length])  # [B, G, S, K]
        return selected[0], selected[1], self.mask

    def copy_prefix(self, source_slot: int, slot: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        self.reserve(slot + 1, length)
        for cached in (self.keys, self.values):
            cached[:, slot, :, :length] = cached[:, source_slot, :, :length]

    @torch.inference_mode()
    def clear_slot(self, slot: int) -> None:
        """Set a slot to zero. A mask does not hide what is not finite: 0 · ∞ is NaN."""
        self.keys[:, slot : slot + 1] = 0
        self.values[:, slot : slot + 1] = 0

    def reserve(self, num_slots: int, length: int, like: Tensor | None = None) -> None:
        """Allocate memory for slots and positions.

        Args:
            num_slots: Number of slots.
            length: Number of positions.
            like: A tensor whose precision and device to use. Default: those of the cache.
        """
        like = self.keys if like is None else like
        _, old_slots, _, old_length, _ = self.keys.shape
        if num_slots <= old_slots and length <= old_length:
            return
        if length > old_length:
            length = min(self.config.context_length, max(length, 2 * old_length, INITIAL_CAPACITY))
        padding = (0, 0, 0, max(0, length - old_length), 0, 0, 0, max(0, num_slots - old_slots))
        self.keys, self.values = (F.pad(cached.to(like), padding) for cached in (self.keys, self.values))


def common_prefix_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Number of tokens or characters at the beginning of two sequences that are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next((i for i in range(length) if a[i] != b[i]), length)
