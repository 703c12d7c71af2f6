"""Keys and values of the positions that were already computed, for several texts at once.

Letters as in `model/gpt.py`: B batch, T new positions, S positions that can be looked at, G key-value heads, K width of
a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nextword.model.config import ModelConfig

INITIAL_CAPACITY = 256  # positions that a cache first has room for; the room doubles as it is needed


class KeyValueCache:
    """A `Cache` of many slots, each one text of its own length.

    `select` says where the next forward pass carries on. One slot with many tokens (a prompt) and many slots with one
    token each (decoding) take the same path. Memory is two numbers of the model's precision per layer, slot, key-value
    head, position and head width, and grows with what is used.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        # [n_layers, slots, G, room, K]
        self.keys = torch.empty(config.n_layers, 0, config.n_kv_heads, 0, config.head_dim)
        self.values = self.keys
        self.prepare([0], [0], 1)

    def prepare(
        self, slots: Sequence[int], starts: Sequence[int], num_tokens: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Make row i of the next forward pass the `count` tokens of slot `slots[i]` from position `starts[i]` on.

        Returns their positions [B, T]. What a slot holds from there on is written over.

        Raises:
            ValueError: the last of them is past the context length.
        """
        end = max(starts) + num_tokens
        if end > self.config.context_length:
            raise ValueError(f"{end} positions are more than the context length of {self.config.context_length}")
        self.num_slots, self.cached_length = max(slots) + 1, end
        self.slots = torch.tensor(slots, device=device)  # [B]
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(
            num_tokens, device=device
        )  # [B, T]
        # Neighbouring slots are a view of the cache; any others have to be copied out of it.
        adjacent = list(slots) == list(range(slots[0], slots[-1] + 1))
        self.slot_index = slice(slots[0], slots[-1] + 1) if adjacent else self.slots
        key_positions = torch.arange(end, device=device)
        self.mask = (key_positions <= self.positions[:, :, None])[
            :, None
        ]  # [B, 1, T, S]; hides what is not written, too
        return self.positions

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a layer's new keys and values [B, G, T, K]; give all that the selected slots have, and the mask."""
        self.reserve(self.num_slots, self.cached_length, keys)
        cached_states = []
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):  # [slots, G, room, K]
            cached.transpose(1, 2)[self.slots[:, None], self.positions] = new.transpose(1, 2)  # [B, T, G, K]
            cached_states.append(cached[self.slot_index, :, : self.cached_length])  # [B, G, S, K]
        return cached_states[0], cached_states[1], self.mask

    def copy_prefix(self, source_slot: int, slot: int, length: int) -> None:
        """Let a slot begin with the first positions of another."""
        self.reserve(slot + 1, length)
        for held in (self.keys, self.values):
            held[:, slot, :, :length] = held[:, source_slot, :, :length]

    @torch.inference_mode()
    def clear_slot(self, slot: int) -> None:
        """Clear a slot for another text. Zeros, since a mask does not hide what is not finite: 0 · ∞ is no number."""
        self.keys[:, slot : slot + 1] = 0
        self.values[:, slot : slot + 1] = 0

    def reserve(self, num_slots: int, length: int, like: Tensor | None = None) -> None:
        """Room for so many slots and positions, in the precision and on the device of a tensor (the cache's own at first)."""
        like = self.keys if like is None else like
        _, had_slots, _, had_length, _ = self.keys.shape
        if num_slots <= had_slots and length <= had_length:
            return
        if length > had_length:
            length = min(self.config.context_length, max(length, 2 * had_length, INITIAL_CAPACITY))
        num_slots, length = max(num_slots, had_slots), max(length, had_length)
        shape = (self.config.n_layers, num_slots, self.config.n_kv_heads, length, self.config.head_dim)
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        keys[:, :had_slots, :, :had_length] = self.keys
        values[:, :had_slots, :, :had_length] = self.values
        self.keys, self.values = keys, values
