"""The model equals the equations of the papers, computed directly in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nextword.model.config import PRESETS, SIZES, ConfigError, ModelConfig, build_config
from nextword.model.gpt import (
    GPT,
    FeedForward,
    ForwardContext,
    Norm,
    apply_rotary_embedding,
    attention,
    compute_rotary_cos_sin,
    sample_dropout_masks,
    sinusoidal_table,
)
from nextword.model.gpt import Attention as MultiHead
from tiny_models import random_model, small


def softmax(x: Tensor) -> Tensor:
    e = (x - x.max(dim=-1, keepdim=True).values).exp()
    return e / e.sum(dim=-1, keepdim=True)


def attention_by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d_k) V for one head [T, K], scores of later positions set to minus infinity."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape, dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(later, -math.inf)) @ v


@pytest.mark.parametrize("shared", [4, 2, 1])
def test_attention_equals_its_formula(shared):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, shared, 9, 8), torch.randn(2, shared, 9, 8)
    out = attention(q, k, v)
    for b in range(2):
        for h in range(4):
            g = h * shared // 4  # the key-value head that this query head shares
            expected = attention_by_formula(q[b, h].double(), k[b, g].double(), v[b, g].double())
            torch.testing.assert_close(out[b, h].double(), expected, atol=1e-6, rtol=1e-5)


def test_multi_head_attention_equals_its_formula():
    config = small("tutorial")
    torch.manual_seed(2)
    layer = MultiHead(config, 0)
    x = torch.randn(1, 7, config.d_model)
    out = layer(x, ForwardContext())[0].double()
    # MultiHead = Concat(head_1 … head_h) W_O with head_i = Attention(x W_Qi, x W_Ki, x W_Vi); our matrices are [out, in].
    heads = []
    x64, width = x[0].double(), config.head_dim
    for i in range(config.n_heads):
        rows = slice(i * width, (i + 1) * width)
        q, k, v = (x64 @ m.weight[rows].double().T for m in (layer.query, layer.key, layer.value))
        heads.append(attention_by_formula(q, k, v))
    expected = torch.cat(heads, dim=-1) @ layer.output.weight.double().T
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    assert layer.query.bias is None, "the formula has no bias"


def test_feed_forward_equals_its_formula():
    torch.manual_seed(3)
    layer = FeedForward(small("tutorial"))
    torch.nn.init.normal_(layer.up.bias)
    torch.nn.init.normal_(layer.down.bias)
    x = torch.randn(5, 32)
    w1, b1, w2, b2 = (t.double() for t in (layer.up.weight.T, layer.up.bias, layer.down.weight.T, layer.down.bias))
    expected = torch.maximum(torch.zeros(()), x.double() @ w1 + b1) @ w2 + b2
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-5)


def test_swiglu_equals_its_formula():
    torch.manual_seed(4)
    layer = FeedForward(small("modern"))
    x = torch.randn(5, 32).double()
    gate, up, down = (m.weight.double() for m in (layer.gate, layer.up, layer.down))
    z = x @ gate.T
    expected = (z / (1 + (-z).exp()) * (x @ up.T)) @ down.T
    torch.testing.assert_close(layer(x.float()).double(), expected, atol=1e-6, rtol=1e-5)


def test_gelu_has_the_tanh_form():
    torch.manual_seed(5)
    layer = FeedForward(small("gpt2"))
    x = torch.randn(5, 32).double()
    z = x @ layer.up.weight.double().T + layer.up.bias.double()
    gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    expected = gelu @ layer.down.weight.double().T + layer.down.bias.double()
    torch.testing.assert_close(layer(x.float()).double(), expected, atol=1e-6, rtol=1e-5)


def test_sinusoidal_positions_equal_their_formula():
    table = sinusoidal_table(50, 16)
    for pos in range(50):
        for i in range(8):
            angle = pos / 10000 ** (2 * i / 16)
            assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_equal_their_formula(kind):
    torch.manual_seed(6)
    norm = Norm(12, kind, 1e-5)
    torch.nn.init.normal_(norm.weight)
    if norm.bias is not None:
        torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(4, 12) + 1
    x64 = x.double()
    if kind == "layernorm":
        mean = x64.mean(-1, keepdim=True)
        variance = ((x64 - mean) ** 2).mean(-1, keepdim=True)
        assert norm.bias is not None
        expected = (x64 - mean) / (variance + 1e-5).sqrt() * norm.weight.double() + norm.bias.double()
    else:
        expected = x64 / ((x64**2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_rotary_products_depend_on_the_distance_alone():
    """Su et al. 2021, section 3.1: the product of a turned query and a turned key depends on m − n alone."""
    torch.manual_seed(7)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(m: int, n: int) -> float:
        turned = [
            apply_rotary_embedding(x, *compute_rotary_cos_sin(torch.tensor([p]), 16, 10_000.0))
            for x, p in ((q, m), (k, n))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)
    assert product(3, 3) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_loss_equals_its_formula():
    """L(θ) = −Σ log P(x_t | x_<t; θ), by the softmax written out."""
    from nextword.training.losses import DeviceBatch, causal_lm_loss

    model = random_model(small("tutorial"))
    row = torch.randint(0, 61, (1, 11))
    total = causal_lm_loss(model, DeviceBatch(row[:, :-1], row[:, 1:], None))["next_word"]
    logits = model.unembed(model(row[:, :-1])).double()[0]
    expected = -sum(math.log(softmax(logits[t])[row[0, t + 1]].item()) for t in range(10))
    assert total.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_model_equals_its_definition(preset):
    """The blocks composed by hand, in float64."""
    config = small(preset)
    model: Any = random_model(config).double()
    tokens = torch.randint(0, 61, (1, 13))
    x = model.token_embedding.weight[tokens[0]]
    if config.positions == "learned":
        x = x + model.position_embedding.weight[:13]
    elif config.positions == "sinusoidal":
        x = x + sinusoidal_table(13, config.d_model)
    rotary = compute_rotary_cos_sin(torch.arange(13), config.head_dim, config.rope_theta)
    context = ForwardContext((rotary[0][None], rotary[1][None]) if config.positions == "rope" else None)
    for block in model.blocks:
        if config.norm_position == "post":
            x = block.attention_norm(x + block.attention(x[None], context)[0])
            x = block.feed_forward_norm(x + block.feed_forward(x))
        else:
            x = x + block.attention(block.attention_norm(x)[None], context)[0]
            x = x + block.feed_forward(block.feed_forward_norm(x))
    if config.norm_position == "pre":
        x = model.final_norm(x)
    head = model.token_embedding.weight if config.tied else model.head.weight
    torch.testing.assert_close(model.unembed(model(tokens))[0], x @ head.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_position_attends_to_a_later_one(preset):
    """Change later tokens: nothing before them moves. Change an earlier one: everything after it does."""
    model = random_model(small(preset))
    tokens = torch.randint(0, 60, (1, 24))
    before = model.unembed(model(tokens))
    for t in (1, 7, 23):
        other = tokens.clone()
        other[0, t:] = (other[0, t:] + 1) % 61
        after = model.unembed(model(other))
        assert torch.equal(before[0, :t], after[0, :t])
        assert not torch.isclose(before[0, t:], after[0, t:]).all(dim=-1).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_segments_hide_other_documents(preset):
    model = random_model(small(preset))
    first, second = torch.randint(0, 61, (1, 9)), torch.randint(0, 61, (1, 6))
    together = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 9 + [1] * 6])
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    hidden = model(together, segments=segments, positions=positions)
    torch.testing.assert_close(hidden[:, :9], model(first), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(hidden[:, 9:], model(second), atol=2e-5, rtol=1e-4)


def test_a_window_longer_than_the_context_is_rejected():
    with pytest.raises(ValueError, match="25 tokens are more than the context length of 24"):
        GPT(small("modern"))(torch.zeros(1, 25, dtype=torch.long))


def test_segments_cannot_be_combined_with_a_cache():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot be combined"):
        GPT(small("modern"))(tokens, segments=tokens, cache=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_labels", [0, 5])
def test_the_number_of_parameters_is_right(preset, tied, n_labels):
    config = small(preset, tied=tied, n_labels=n_labels)
    assert sum(p.numel() for p in GPT(config).parameters()) == config.parameters


def test_sizes_equal_the_published_ones():
    """GPT-2's 124 million and GPT-3's 175 billion, from the table alone."""
    assert build_config("gpt2", "125m", vocab_size=50257).parameters == 124_439_808
    assert build_config("gpt2", "175b", vocab_size=50257).parameters == pytest.approx(175e9, rel=0.01)
    for size in SIZES:
        for preset in PRESETS:
            build_config(preset, size, vocab_size=300)


# ---------------------------------------------------------------- initialization


@pytest.mark.parametrize("preset", ["gpt1", "gpt2", "modern"])
def test_initialization_follows_the_source(preset):
    """N(0, 0.02); from GPT-2 on, what is added to the residual stream is smaller by √(2 · layers). Biases are zero."""
    torch.manual_seed(0)
    config = small(preset, d_model=128, n_layers=4, vocab_size=500)
    residual = 0.02 / math.sqrt(8) if preset != "gpt1" else 0.02
    for name, p in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            expected = residual if name.endswith(("output.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel()), name


def test_tutorial_embeddings_are_initialized_as_large_as_positions():
    torch.manual_seed(0)
    config = small("tutorial", d_model=128, vocab_size=500, context_length=256)
    model: Any = GPT(config)
    words = model.token_embedding.weight.pow(2).mean().sqrt().item()
    places = model.position_table.pow(2).mean().sqrt().item()
    assert places == pytest.approx(math.sqrt(0.5), rel=0.01)
    assert words == pytest.approx(places, rel=0.05)
    w = model.blocks[0].feed_forward.up.weight  # Glorot's uniform: ±√(6 / (in + out))
    bound = math.sqrt(6 / (w.shape[0] + w.shape[1]))
    assert w.abs().max().item() <= bound
    assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_untrained_model_has_the_loss_of_guessing(preset):
    """The first loss is that of guessing: ln V."""
    torch.manual_seed(0)
    model = GPT(small(preset, vocab_size=200, d_model=64))
    tokens = torch.randint(0, 200, (8, 24))
    loss = F.cross_entropy(model.unembed(model(tokens)).flatten(0, 1), torch.randint(0, 200, (8 * 24,)))
    assert loss.item() == pytest.approx(math.log(200), abs=0.1)


# ---------------------------------------------------------------- dropout


def test_dropout_masks_do_not_depend_on_the_micro_batch():
    config = small("gpt2", dropout=0.25)
    whole = sample_dropout_masks(config, [11, 12, 13], 24, "cpu")
    parts = [sample_dropout_masks(config, [seed], 24, "cpu") for seed in (11, 12, 13)]
    assert whole is not None
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None], dim=1))
    assert whole.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert sample_dropout_masks(small("gpt2"), [1], 24, "cpu") is None


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    config = small("gpt2", dropout=0.5, n_layers=1)
    model = random_model(config)
    tokens = torch.randint(0, 61, (1, 24))
    plain = model(tokens)
    assert torch.equal(plain, model(tokens))
    masks = sample_dropout_masks(config, [3], 24, "cpu")
    assert not torch.allclose(plain, model(tokens, dropout_masks=masks))
    embedded = model.token_embedding(tokens)
    from nextword.model.gpt import apply_dropout

    def dropped(seed: int) -> torch.Tensor:
        masks = sample_dropout_masks(config, [seed], 24, "cpu")
        assert masks is not None
        return apply_dropout(embedded, masks[0], 0.5)

    many = torch.stack([dropped(seed) for seed in range(400)])
    torch.testing.assert_close(many.mean(0), embedded, atol=0.25, rtol=0.25)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("gpt1", {"d_ff": 100}, "d_ff = 128"),
        ("gpt1", {"positions": "rope"}, "positions = learned or sinusoidal"),
        ("gpt2", {"n_kv_heads": 2}, "n_kv_heads = 4"),
        ("gpt2", {"head_dim": 16}, "d_model = n_heads × head_dim"),
        ("gpt2", {"qk_norm": True}, "qk_norm = False"),
        ("modern", {"norm_position": "post"}, "norm_position = pre"),
        ("modern", {"activation": "relu"}, "activation = swiglu"),
        ("modern", {"attention_bias": True}, "attention_bias = False"),
        ("modern", {"head_dim": 7}, "an even head_dim"),
        ("modern", {"n_heads": 3, "head_dim": 8, "n_kv_heads": 2}, "multiple of n_kv_heads"),
        ("modern", {"n_layers": 0}, "n_layers must be a whole number from 1"),
        ("modern", {"dropout": 1.0}, "dropout must be"),
        ("modern", {"n_labels": -1}, "n_labels must be a whole number from 0"),
        ("modern", {"n_labels": True}, "n_labels must be a whole number from 0"),
        ("modern", {"d_model": 33}, "d_model .33. must be a multiple"),
        ("nonsense", {}, "unknown preset"),
        ("modern", {"colour": 3}, "unknown model settings: colour"),
    ],
)
def test_configs_without_a_stock_class_are_rejected(preset, overrides, message):
    with pytest.raises(ConfigError, match=message):
        small(preset, **overrides)


choices = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "norm_position": st.sampled_from(["pre", "post"]),
        "positions": st.sampled_from(["learned", "sinusoidal", "rope"]),
        "activation": st.sampled_from(["relu", "gelu", "swiglu"]),
        "qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "feed_forward_bias": st.booleans(),
        "tied": st.booleans(),
    }
)


@given(choices, st.integers(1, 3), st.sampled_from([1, 2, 4]))
@settings(max_examples=200, deadline=None)
def test_every_valid_config_makes_a_working_model(values, n_layers, n_kv_heads):
    """Every configuration is either rejected when it is made, or makes a model that runs."""
    try:
        config = ModelConfig(
            vocab_size=11,
            context_length=6,
            n_layers=n_layers,
            n_heads=4,
            n_kv_heads=n_kv_heads,
            head_dim=4,
            d_model=16,
            d_ff=64,
            **values,
        )
    except ConfigError:
        return
    assert config.family in ("gpt1", "gpt2", "qwen3", "llama")
    model = GPT(config)
    logits = model.unembed(model(torch.zeros(1, 6, dtype=torch.long)))
    assert logits.shape == (1, 6, 11)
    assert logits.isfinite().all()
    assert ModelConfig.from_dict(config.to_dict()) == config
