"""LoRA: its formula, the trainable parameters, merging, and PEFT opening a saved adapter."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from nextword.model.config import PRESETS
from nextword.model.gpt import GPT, with_classification_head, with_resized_vocabulary
from nextword.model.hf import save_model
from nextword.model.lora import (
    LoraConfig,
    LoraLinear,
    TrainableRowsEmbedding,
    add_lora,
    merge_lora,
    save_adapter,
)
from tiny_models import random_model, small

OLD, NEW = 61, 64  # tokens before and after a task has added its markers


def adapted(
    preset: str, *, rows: int = NEW - OLD, n_labels: int = 0, config: LoraConfig | None = None, **overrides
) -> GPT:
    """A model with a new adapter, and a classification head if there are labels."""
    model = with_resized_vocabulary(random_model(small(preset, **overrides)), OLD + rows, seed=1)
    model = with_classification_head(model, n_labels, seed=2) if n_labels else model
    return add_lora(model, config or LoraConfig(rank=3, alpha=12), seed=3, num_trainable_rows=rows)


def shake(model: GPT) -> GPT:
    """Change every trainable parameter, as training does."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def some_tokens(vocab_size: int = NEW) -> torch.Tensor:
    tokens = torch.randint(2, OLD, (2, 24), generator=torch.Generator().manual_seed(5))
    tokens[:, 3::5] = vocab_size - 1  # the markers are among them
    return tokens


def logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.unembed(model(tokens))


# ---------------------------------------------------------------- the formula


def test_a_lora_layer_equals_its_formula():
    model = shake(adapted("gpt2"))
    layer = model.get_submodule("blocks.0.feed_forward.up")
    assert isinstance(layer, LoraLinear)
    x = torch.randn(5, 32)
    w, b, lora_a, lora_b = (t.double() for t in (layer.weight, layer.bias, layer.lora_a, layer.lora_b))
    expected = x.double() @ w.T + b + 12 / 3 * (x.double() @ lora_a.T @ lora_b.T)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.merged_weight().double(), w + 4 * lora_b @ lora_a, atol=1e-5, rtol=1e-5)


def test_a_new_adapter_is_initialized_as_in_the_paper():
    """A uniform within ±1/√in (a = √5), B zero; the seed decides, and so does nothing else."""
    model = random_model(small("modern", d_model=64))
    add_lora(model, LoraConfig(rank=16), seed=3)
    drawn = {name: p for name, p in model.named_parameters() if name.endswith("lora_a")}
    assert len(drawn) == 2 * 7
    for name, p in drawn.items():
        bound = 1 / math.sqrt(p.shape[1])
        assert p.abs().max().item() <= bound, name
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06), name
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("lora_b"))
    torch.manual_seed(99)
    again = add_lora(random_model(small("modern", d_model=64)), LoraConfig(rank=16), seed=3)
    other = add_lora(random_model(small("modern", d_model=64)), LoraConfig(rank=16), seed=4)
    for name, p in drawn.items():
        assert torch.equal(again.get_parameter(name), p)
        assert not torch.equal(other.get_parameter(name), p)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_adapter_has_no_effect(preset):
    plain = with_resized_vocabulary(random_model(small(preset)), NEW, seed=1)
    assert torch.equal(logits(adapted(preset), some_tokens()), logits(plain, some_tokens()))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("preset", PRESETS)
def test_only_the_adapter_head_and_new_rows_are_trained(preset):
    """After steps of AdamW with weight decay everything else is the same bit for bit, and the loss has fallen."""
    model = adapted(preset, n_labels=4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b", "rows", "weight"}
    assert [name for name in trained if name.endswith("weight")] == ["score.weight"]
    assert sum(p.numel() for p in trained.values()) < 0.5 * model.config.parameters
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embedding = model.token_embedding.weight.detach().clone()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    tokens, losses = some_tokens(), []
    for _ in range(8):
        hidden = model(tokens)
        next_word = torch.nn.functional.cross_entropy(
            model.unembed(hidden[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        label = torch.nn.functional.cross_entropy(model.classify(hidden[:, -1]), torch.tensor([1, 3]))
        optimizer.zero_grad()
        (next_word + label).backward()
        optimizer.step()
        losses.append((next_word + label).item())
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    assert torch.equal(model.token_embedding.weight[:OLD], embedding[:OLD])
    assert not torch.isclose(model.token_embedding.weight[OLD:], embedding[OLD:]).all(dim=1).any()


@pytest.mark.parametrize("tied", [True, False])
def test_trainable_rows_get_the_gradient_of_the_full_matrix(tied):
    """Both uses of a tied matrix, the look-up and the head, reach the new rows."""
    model, plain = (
        adapted("gpt2", tied=tied),
        with_resized_vocabulary(random_model(small("gpt2", tied=tied)), NEW, seed=1),
    )
    for each in (model, plain):
        each.unembed(each(some_tokens())).logsumexp(-1).sum().backward()
    for name in ("token_embedding",) if tied else ("token_embedding", "head"):
        part = model.get_submodule(name)
        assert isinstance(part, TrainableRowsEmbedding)
        whole = plain.get_parameter(f"{name}.weight").grad
        assert part.rows.grad is not None and whole is not None
        assert part.base.grad is None
        torch.testing.assert_close(part.rows.grad, whole[OLD:], atol=1e-4, rtol=1e-4)


def test_the_state_dict_of_an_adapter_can_be_resumed():
    model = shake(adapted("modern"))
    base = with_resized_vocabulary(random_model(small("modern")), NEW, seed=77)
    again = add_lora(base, LoraConfig(rank=3, alpha=12), seed=78, num_trainable_rows=NEW - OLD)
    assert not torch.equal(logits(again, some_tokens()), logits(model, some_tokens()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, some_tokens()), logits(model, some_tokens()))


# ---------------------------------------------------------------- without the adapter


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_has_the_same_logits(preset, tied):
    model = shake(adapted(preset, tied=tied, n_labels=2)).double()
    merged = merge_lora(model)
    assert list(merged.state_dict()) == list(GPT(model.config).state_dict())
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(merged, some_tokens()), logits(model, some_tokens()), atol=1e-11, rtol=1e-9)
    hidden = torch.randn(3, 32, dtype=torch.float64)
    assert torch.equal(merged.classify(hidden), model.classify(hidden))
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert logits(model, some_tokens()).any(), "a copy, not a view"


# ---------------------------------------------------------------- PEFT

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("tutorial", {}),
    ("gpt1", {}),
    ("gpt2", {}),
    ("gpt2", {"tied": False, "attention_bias": False}),
    ("modern", {"n_kv_heads": 2}),
    ("modern", {"tied": False, "head_dim": 10}),
    ("modern", {"qk_norm": False}),  # Llama
]
SHAPES = [LoraConfig(rank=3, alpha=12), LoraConfig(rank=2, alpha=1.5)]


def with_peft(stock_class: str, base: Path, adapter: Path, vocab_size: int, **arguments) -> Any:
    """The resized base model of transformers with the adapter read by `peft`; any warning of a missing weight is an error."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that transformers has given another name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = getattr(transformers, stock_class).from_pretrained(base, **arguments)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def stock_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, attention_mask=torch.ones_like(tokens)).logits


@pytest.mark.parametrize("shape", SHAPES, ids=["rank 3", "rank 2"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(("preset", "overrides"), FAMILIES)
def test_peft_opens_the_adapter_of_a_language_model(tmp_path, preset, overrides, rows, shape):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_model(random_model(small(preset, **overrides)), base, end_of_text_id=0, pad_token_id=1)
    model = shake(adapted(preset, rows=rows, config=shape, **overrides))
    save_adapter(model, shape, adapter, base_model_name=str(base))
    tokens = some_tokens(OLD + rows)
    theirs = with_peft("AutoModelForCausalLM", base, adapter, OLD + rows)
    expected = stock_logits(theirs, tokens)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(merge_lora(model), tokens), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stock_logits(theirs.merge_and_unload(), tokens), expected, atol=1e-4, rtol=1e-4)
    mode = (adapter / "adapter_model.safetensors").stat().st_mode
    assert mode == (adapter / "adapter_config.json").stat().st_mode, "whoever may read one may read the other"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(("preset", "overrides"), FAMILIES)
def test_peft_opens_the_adapter_of_a_classifier(tmp_path, preset, overrides):
    """The base is the language model, as pre-training left it: head and markers come with the adapter."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_model(random_model(small(preset, **overrides)), base, end_of_text_id=0, pad_token_id=1)
    model = shake(adapted(preset, n_labels=4, **overrides))
    save_adapter(model, LoraConfig(rank=3, alpha=12), adapter, base_model_name=str(base))
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert (described["task_type"], described["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert list(described["trainable_token_indices"].values()) == [[61, 62, 63]]
    tokens = some_tokens()
    theirs = with_peft("AutoModelForSequenceClassification", base, adapter, NEW, num_labels=4)
    expected = stock_logits(theirs, tokens)
    for ours in (model, merge_lora(model)):
        with torch.no_grad():
            torch.testing.assert_close(ours.classify(ours(tokens)[:, -1]), expected, atol=1e-4, rtol=1e-4)
