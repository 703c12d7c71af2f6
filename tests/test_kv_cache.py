"""KV cache: cached equals uncached, for every preset, rows of different lengths, reused slots and any chunks."""

import pytest
import torch

from nextword.inference.kv_cache import KeyValueCache
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT

CONTEXT = 24


def tiny(preset: str, **overrides: object) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": CONTEXT, **overrides}
    torch.manual_seed(0)
    return GPT(build_config(preset, vocab_size=61, **sizes))


MODELS = [
    *((preset, {}) for preset in PRESETS),
    ("modern", {"n_kv_heads": 1}),
    ("modern", {"n_kv_heads": 4, "head_dim": 6}),
    ("modern", {"qk_norm": False}),  # Llama
]


@pytest.fixture(params=MODELS, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
def model(request: pytest.FixtureRequest) -> GPT:
    preset, overrides = request.param
    return tiny(preset, **overrides)


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(seed))


def read(model: GPT, cache: KeyValueCache, tokens: torch.Tensor, slots: list[int], starts: list[int]) -> torch.Tensor:
    positions = cache.prepare(slots, starts, tokens.shape[1])
    return model.unembed(model(tokens, positions=positions, cache=cache))


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [10] + [1] * 14, [3, 7, 1, 13]])
def test_cached_equals_uncached(model: GPT, cuts: list[int]) -> None:
    tokens, cache, parts = text(CONTEXT), KeyValueCache(model.config), []
    for part in tokens.split(cuts, dim=1):
        parts.append(read(model, cache, part, [0], [sum(p.shape[1] for p in parts)]))
    assert torch.allclose(torch.cat(parts, dim=1), model.unembed(model(tokens)), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 5]])
def test_rows_of_different_lengths_are_independent(model: GPT, slots: list[int]) -> None:
    cache, lengths = KeyValueCache(model.config), [3, 17, 9]
    texts = [text(length + 4, seed) for seed, length in enumerate(lengths)]
    for slot, length, tokens in zip(slots, lengths, texts, strict=True):
        read(model, cache, tokens[:, :length], [slot], [0])
    for _ in range(4):
        new = torch.cat([tokens[:, at : at + 1] for tokens, at in zip(texts, lengths, strict=True)])
        together = read(model, cache, new, slots, lengths)
        lengths = [length + 1 for length in lengths]
        for row, (tokens, length) in enumerate(zip(texts, lengths, strict=True)):
            alone = model.unembed(model(tokens[:, :length]))[0, -1]
            assert torch.allclose(together[row, 0], alone, atol=1e-5)


@torch.inference_mode()
def test_earlier_sequences_of_a_slot_are_hidden(model: GPT) -> None:
    cache, tokens = KeyValueCache(model.config), text(6)
    read(model, cache, text(20, seed=1), [0], [0])
    assert torch.allclose(read(model, cache, tokens, [0], [0]), model.unembed(model(tokens)), atol=1e-5)


@torch.inference_mode()
def test_nonfinite_values_are_cleared_with_their_slot() -> None:
    model, cache = tiny("modern"), KeyValueCache(tiny("modern").config)
    read(model, cache, text(9), [0], [0])
    cache.values[:, 0, :, :9] = torch.nan
    cache.clear_slot(0)
    read(model, cache, text(9), [1], [0])
    assert torch.isfinite(read(model, cache, text(1).expand(2, 1), [0, 1], [0, 9])).all()


@torch.inference_mode()
def test_memory_grows_with_use_up_to_the_context() -> None:
    model = tiny("gpt2", context_length=700)
    cache, tokens = KeyValueCache(model.config), text(700)
    rooms, parts, start = [], [], 0
    for part in tokens.split([5, 300, 290, 105], dim=1):
        parts.append(read(model, cache, part, [0], [start]))
        rooms.append(tuple(cache.keys.shape[1:4:2]))
        start += part.shape[1]
    assert rooms == [(1, 256), (1, 512), (1, 700), (1, 700)]
    assert torch.allclose(torch.cat(parts, dim=1), model.unembed(model(tokens)), atol=1e-5)
    read(model, cache, text(2), [3], [0])
    assert cache.keys.shape[1] == 4
    with pytest.raises(ValueError, match="context length of 700"):
        cache.prepare([0], [700], 1)


def test_the_cache_has_the_precision_of_the_model() -> None:
    model = tiny("modern").to(torch.bfloat16)
    cache = KeyValueCache(model.config)
    with torch.inference_mode():
        read(model, cache, text(3), [0], [0])
    assert cache.keys.dtype == torch.bfloat16
