"""Hugging Face model directories: `transformers` opens ours and we open its, with equal logits; hostile ones are rejected."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import read_json, write_manifest
from nextword.model import hf
from nextword.model.config import PRESETS
from nextword.model.gpt import GPT
from nextword.model.hf import load_model, save_model
from nextword.model.hf_config import KEYS, parse_labels, read_hf_config
from tiny_models import random_model, small

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def read_labels(directory: Path) -> list[str] | None:
    return parse_labels(read_json(directory / "config.json"), directory)


def logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.unembed(model(tokens))


def stock_logits(directory: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, nothing unexpected, nothing of another shape
    with torch.no_grad():
        return model.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits, type(model).__name__


CASES = [
    ("tutorial", {}, "OpenAIGPTLMHeadModel"),
    ("tutorial", {"tied": True}, "OpenAIGPTLMHeadModel"),
    ("tutorial", {"norm_position": "pre", "d_ff": 48}, "GPT2LMHeadModel"),
    ("gpt1", {}, "OpenAIGPTLMHeadModel"),
    ("gpt1", {"tied": False, "d_model": 36, "n_heads": 3}, "OpenAIGPTLMHeadModel"),
    ("gpt2", {}, "GPT2LMHeadModel"),
    ("gpt2", {"tied": False, "d_ff": 50, "d_model": 35, "n_heads": 5, "vocab_size": 67}, "GPT2LMHeadModel"),
    ("gpt2", {"attention_bias": False, "feed_forward_bias": False, "activation": "relu"}, "GPT2LMHeadModel"),
    ("modern", {}, "Qwen3ForCausalLM"),
    ("modern", {"tied": False, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "d_ff": 37}, "Qwen3ForCausalLM"),
    ("modern", {"n_kv_heads": 1, "rope_theta": 500.0, "norm_eps": 1e-5}, "Qwen3ForCausalLM"),
    ("modern", {"qk_norm": False}, "LlamaForCausalLM"),
    ("modern", {"qk_norm": False, "tied": False, "head_dim": 12, "n_kv_heads": 4}, "LlamaForCausalLM"),
]


@pytest.mark.parametrize(("preset", "overrides", "stock_class"), CASES)
def test_saved_models_open_in_transformers(tmp_path, preset, overrides, stock_class):
    model = random_model(small(preset, **overrides))
    save_model(model, tmp_path, end_of_text_id=0, pad_token_id=1)
    tokens = torch.randint(0, 61, (2, 24))
    theirs, name = stock_logits(tmp_path, tokens)
    assert name == stock_class
    torch.testing.assert_close(logits(model, tokens), theirs, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(load_model(tmp_path), tokens), theirs, atol=1e-4, rtol=1e-5)
    mode = (tmp_path / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "config.json").stat().st_mode, "whoever may read one may read the other"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_directory_loads_bit_for_bit(tmp_path, preset):
    """The sinusoids stay a formula, a bias that does not exist stays away, and every number is the same bit for bit."""
    model = random_model(small(preset))
    save_model(model, tmp_path)
    write_manifest(tmp_path, {"model": model.config.to_dict()})
    again = load_model(tmp_path)
    assert again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.randint(0, 61, (1, 24))
    assert torch.equal(logits(model, tokens), logits(again, tokens))


def stock_configs():
    t = transformers
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 24}
    rope = {"rope_type": "default", "rope_theta": 77_000.0}
    return {
        "gpt2": t.GPT2Config(
            vocab_size=61, n_positions=24, n_embd=36, n_layer=3, n_head=3, bos_token_id=0, eos_token_id=0
        ),
        "gpt2-untied": t.GPT2Config(
            vocab_size=61,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=50,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            layer_norm_epsilon=1e-3,
        ),
        "gpt1": t.OpenAIGPTConfig(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2),
        "qwen3": t.Qwen3Config(
            vocab_size=61,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            rope_parameters=rope,
            tie_word_embeddings=False,
            **sizes,
        ),
        "qwen3-tied": t.Qwen3Config(
            vocab_size=61, num_attention_heads=4, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True, **sizes
        ),
        "llama": t.LlamaConfig(
            vocab_size=61, num_attention_heads=4, num_key_value_heads=1, rope_parameters=rope, **sizes
        ),
        "llama-tied": t.LlamaConfig(vocab_size=61, num_attention_heads=2, tie_word_embeddings=True, **sizes),
    }


def random_stock(name: str, directory: Path, **save) -> Any:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(stock_configs()[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory, **save)
    return model


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt1", "qwen3", "qwen3-tied", "llama", "llama-tied"])
def test_transformers_directories_load(tmp_path, name):
    theirs = random_stock(name, tmp_path)
    tokens = torch.randint(0, 61, (2, 24))
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=torch.ones_like(tokens)).logits
    ours = load_model(tmp_path)
    torch.testing.assert_close(logits(ours, tokens), expected, atol=1e-4, rtol=1e-5)
    # And back: what we write of it is theirs again.
    back = tmp_path / "back"
    back.mkdir()
    save_model(ours, back)
    torch.testing.assert_close(stock_logits(back, tokens)[0], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied"])
def test_large_models_are_saved_in_shards(tmp_path, monkeypatch, name):
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 20_000)
    theirs = random_stock(name, tmp_path)
    tokens = torch.randint(0, 61, (2, 24))
    back = tmp_path / "back"
    back.mkdir()
    save_model(load_model(tmp_path), back)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((back / name).stat().st_size < 30_000 for name in files), "a header, and what is no larger than said"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(back / f).values())
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(stock_logits(back, tokens)[0], expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(load_model(back), tokens), expected, atol=1e-4, rtol=1e-5)


def test_shards_bf16_and_base_models_load(tmp_path):
    theirs = random_stock("qwen3", tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    tokens = torch.randint(0, 61, (1, 24))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits(load_model(tmp_path / "shards"), tokens), expected, atol=1e-4, rtol=1e-5)

    half = random_stock("gpt2", tmp_path / "half").bfloat16()
    half.save_pretrained(tmp_path / "half")
    with torch.no_grad():
        expected = half.float()(tokens).logits
    torch.testing.assert_close(logits(load_model(tmp_path / "half"), tokens), expected, atol=1e-4, rtol=1e-5)

    # The GPT-2 of the Hub: names without the prefix, and causal masks among the weights.
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "half", bare)
    tensors = load_file(bare / "model.safetensors")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(tensors, bare / "model.safetensors")
    torch.testing.assert_close(logits(load_model(bare), tokens), expected, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- a classification head

LABELS = ["no", "yes", "può darsi"]


def padded_rows(pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 24, 9 and 1 tokens with `pad` behind them [3, 24], and the place of the last token of each [3]."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(2, 61, (3, 24), generator=generator)
    lengths = torch.tensor([24, 9, 1])
    return tokens.masked_fill(torch.arange(24) >= lengths[:, None], pad), lengths - 1


def class_logits(model: GPT, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.classify(model(tokens)[torch.arange(len(last)), last])


def stock_class_logits(model: Any, tokens: torch.Tensor, pad: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens, attention_mask=(tokens != pad).long()).logits


@pytest.mark.parametrize(("preset", "overrides", "stock_class"), CASES)
def test_saved_classifiers_open_in_the_stock_class(tmp_path, preset, overrides, stock_class):
    model = random_model(small(preset, n_labels=3, **overrides))
    save_model(
        model, tmp_path, end_of_text_id=0, pad_token_id=1, labels=LABELS, problem_type="single_label_classification"
    )
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    family = stock_class.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    assert type(theirs).__name__ == family + "ForSequenceClassification"
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {name: i for i, name in enumerate(LABELS)}
    assert theirs.config.problem_type == "single_label_classification"
    assert read_labels(tmp_path) == LABELS
    tokens, last = padded_rows(pad=1)
    expected = stock_class_logits(theirs, tokens, 1)
    torch.testing.assert_close(class_logits(model, tokens, last), expected, atol=1e-4, rtol=1e-5)
    again = load_model(tmp_path)
    assert again.config.n_labels == 3
    torch.testing.assert_close(class_logits(again, tokens, last), expected, atol=1e-4, rtol=1e-5)
    # Sealed, the manifest knows our own choices; the untied head is gone all the same.
    write_manifest(tmp_path, {"model": model.config.to_dict()})
    sealed = load_model(tmp_path)
    assert sealed.config.tied
    assert torch.equal(class_logits(sealed, tokens, last), class_logits(model, tokens, last))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt1", "qwen3", "qwen3-tied", "llama", "llama-tied"])
@pytest.mark.parametrize("n_labels", [1, 2, 4])
def test_stock_classifiers_load(tmp_path, name, n_labels):
    """Two labels are the default of transformers, which config.json does not store."""
    torch.manual_seed(1)
    config = stock_configs()[name]
    config.num_labels = n_labels
    config.pad_token_id = 1
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tokens, last = padded_rows(pad=1)
    ours = load_model(tmp_path)
    assert read_labels(tmp_path) == [f"LABEL_{i}" for i in range(n_labels)]
    expected = stock_class_logits(theirs, tokens, 1)
    torch.testing.assert_close(class_logits(ours, tokens, last), expected, atol=1e-4, rtol=1e-5)


def test_a_language_model_has_no_labels(tmp_path):
    random_stock("gpt2", tmp_path)
    assert read_labels(tmp_path) is None


def test_a_regression_has_one_label(tmp_path):
    save_model(GPT(small("modern", n_labels=1)), tmp_path, pad_token_id=1, problem_type="regression")
    assert read_labels(tmp_path) == ["LABEL_0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "id2label does not name the outputs 0, 1, 2"),
        ({"id2label": ["a", "b", "c"]}, "id2label does not name"),
        ({"id2label": None, "num_labels": -3}, "num_labels is -3"),
        ({"id2label": None, "num_labels": 10**15}, "num_labels is 1000000000000000"),
        ({"id2label": {"0": "a", "1": "b"}}, "score.weight has the shape"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "unexpected tensors for this model_type: score.weight"),
    ],
)
def test_a_damaged_classifier_is_rejected(tmp_path, changes, message):
    save_model(random_model(small("modern", n_labels=3)), tmp_path, pad_token_id=1)
    changed_config(tmp_path, **changes)
    with pytest.raises(NextwordError, match=message):
        load_model(tmp_path)


def test_generation_config_has_all_eos_tokens(tmp_path):
    """A conversation ends with its turn or with the text."""
    model = random_model(small("modern"))
    save_model(model, tmp_path, end_of_text_id=0, pad_token_id=1, eos_token_ids=[0, 5])
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 5]
    save_model(model, tmp_path, end_of_text_id=0, pad_token_id=1, eos_token_ids=[5])
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == 5
    save_model(model, tmp_path, end_of_text_id=0, pad_token_id=1)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == 0


# ---------------------------------------------------------------- rejected directories


def changed_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ("gpt2", {"model_type": None}, "model_type None"),
        ("gpt2", {"activation_function": "gelu"}, "the activation 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"auto_map": {"AutoModel": "evil.py"}}, "runs no code from a model"),
        ("gpt2", {"n_embd": "wide"}, "config.json"),
        ("gpt2", {"n_embd": -36}, "must be a whole number from 1"),
        ("gpt2", {"n_embd": 72}, "has the shape"),
        ("gpt2", {"n_layer": 4}, "is missing"),
        ("gpt2", {"n_layer": 2}, "unexpected tensors"),
        ("gpt2", {"n_head": 0}, "must be a whole number from 1"),
        ("gpt2", {"vocab_size": 10**15}, "vocab_size must be"),
        ("gpt2", {"vocab_size": 10**6}, "has the shape"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, r"RoPE scaling \(llama3\)"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling"),
        ("qwen3", {"use_sliding_window": True}, "sliding windows"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized"),
        ("llama", {"hidden_size": None}, "hidden_size is null"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"RoPE scaling \(yarn\)",
        ),  # beside rope_parameters
        ("qwen3", {"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "'factor' among the RoPE parameters"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is supported only"),
        ("llama", {"sliding_window": 8}, "'sliding_window' is not supported"),
        ("gpt2", {"is_causal": False}, "'is_causal' is not supported"),
        ("llama", {"is_causal": None}, "'is_causal' is not supported"),
        ("qwen3", {"logit_scale": 0.5}, "'logit_scale' is not supported .*an unknown key"),
        ("gpt1", {"n_inner": 7}, "'n_inner' is not supported"),
        ("gpt2", {"num_attention_heads": 9}, "n_head and num_attention_heads, two names of one size"),
    ],
)
def test_unsupported_features_are_rejected_by_name(tmp_path, name, changes, message):
    random_stock(name, tmp_path)
    changed_config(tmp_path, **changes)
    with pytest.raises(NextwordError, match=message):
        load_model(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    random_stock("gpt2", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(NextwordError, match=r"pytorch_model.bin is a pickle"):
        load_model(tmp_path)


def test_an_index_with_a_path_outside_is_rejected(tmp_path):
    random_stock("gpt2", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="is outside the directory"):
        load_model(tmp_path / "model")


def test_a_directory_without_a_model_is_rejected(tmp_path):
    with pytest.raises(NextwordError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="line 1: not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptFileError, match="not a JSON object"):
        load_model(tmp_path)


def test_a_flipped_bit_is_detected_by_the_manifest(tmp_path):
    model = random_model(small("modern"))
    save_model(model, tmp_path)
    write_manifest(tmp_path, {"model": model.config.to_dict()})
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-100] ^= 4
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match=r"model\.safetensors: the content does not match its SHA-256"):
        load_model(tmp_path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_bytes_are_rejected(tmp_path_factory, data):
    """Damaged files of a model directory: it opens with valid shapes, or the error says what is wrong."""
    directory = tmp_path_factory.mktemp("hostile")
    n_labels = data.draw(st.sampled_from([0, 3]))
    model = random_model(small("gpt2", n_layers=1, d_model=8, n_heads=2, context_length=4, n_labels=n_labels))
    save_model(model, directory, pad_token_id=1)
    path = directory / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        load_model(directory)
    except NextwordError as error:
        assert str(directory) in str(error)
    finally:
        shutil.rmtree(directory)


# ---------------------------------------------------------------- every key of the configurations of transformers

TINY: dict[str, dict[str, Any]] = {
    "OpenAIGPTConfig": {"vocab_size": 31, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPT2Config": {"vocab_size": 31, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "LlamaConfig": {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8},
    "Qwen3Config": {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 8},
}  # fmt: skip
# Values that a rule by type would not find, and keys that are no field of the class.
OTHER_VALUES: dict[str, list[Any]] = {
    "activation_function": ["relu", "gelu", "gelu_fast", "gelu_python_tanh", "gelu_accurate", "silu"],
    "afn": ["relu", "silu", "swish"],
    "hidden_act": ["swish", "gelu", "relu"],
    "architectures": [["LlamaModel"]],
    "attn_implementation": ["eager"],
    "bos_token_id": [3],
    "chunk_size_feed_forward": [2],
    "dtype": ["float16"],
    "eos_token_id": [4, [4, 5]],
    "head_dim": [8],
    "hidden_size": [32],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "initializer_range": [0.5],
    "is_causal": [True, False],
    "label2id": [{"a": 0, "b": 1}],
    "layer_types": [["full_attention", "full_attention"], ["full_attention", "sliding_attention"]],
    "n_embd": [32],
    "n_head": [4],
    "num_attention_heads": [8],
    "num_key_value_heads": [4, 1],
    "output_attentions": [True],
    "pad_token_id": [0],
    "partial_rotary_factor": [0.5],
    "per_layer_config": [{"0": {"intermediate_size": 12}}],
    "problem_type": ["regression"],
    "pruned_heads": [{"0": [1]}],
    "return_dict": [None],  # with False the class of transformers fails, whatever the model
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 3.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
    ],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}, {"type": "default"}],
    "rope_theta": [5.0],
    "sliding_window": [2],
    "summary_activation": ["tanh"],
    "summary_type": ["mean"],
    "temperature": [0.1],
    "tie_last_hidden_states": [True],
    "transformers_version": ["4.0.0"],
    "use_sliding_window": [True],
}


def other_values(key: str, value: Any) -> list[Any]:
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(value, bool) or value is None:
        return [not value]
    return [value + 1 if isinstance(value, int) else 2 * value + 0.125]


@pytest.mark.parametrize("name", TINY)
def test_every_key_of_a_configuration_is_equal_or_refused_by_name(tmp_path, name):
    """With a value that is not the default: our logits are those of transformers, or the message names the key."""
    config_class = getattr(transformers, name)
    plain = config_class(**TINY[name]).to_dict()
    keys = {*plain, *config_class.attribute_map, *OTHER_VALUES} - {"model_type", "_name_or_path"}
    keys -= {key for key in ("afn", "activation_function", "hidden_act") if key not in plain}
    tokens = torch.arange(8)[None] * 3 % 31
    num_equal = num_refused = 0
    for key, value in [(k, value) for k in sorted(keys) for value in other_values(k, plain.get(k))]:
        directory = tmp_path / f"{key}-{num_equal}-{num_refused}"
        is_size = not (key in config_class.attribute_map or key.startswith("rope"))
        for sizes in ({**TINY[name], key: value} if is_size else TINY[name], TINY[name]):
            torch.manual_seed(0)
            try:
                model = transformers.AutoModelForCausalLM.from_config(config_class(**sizes)).eval()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.3 * torch.randn_like(parameter))
                model.save_pretrained(directory)
                break
            except Exception as error:  # the class makes no such model; the config.json below may still ask for it
                print(f"{key} = {value!r}: {type(error).__name__}")
        changed_config(directory, **{key: value})
        try:
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True
            )
            with torch.no_grad():
                expected = None if any(info.values()) else theirs.eval()(tokens)[0]
        except Exception:
            expected = None
        try:
            ours = load_model(directory)
        except NextwordError as error:
            known = {"architectures": "score.weight"}
            assert key in str(error) or known.get(key, "tensor") in str(error) or expected is None, (
                key,
                value,
                str(error),
            )
            num_refused += 1
            continue
        assert expected is not None, f"{key} = {value!r} opens here, and not in transformers"
        torch.testing.assert_close(logits(ours, tokens), expected, atol=1e-4, rtol=1e-5, msg=f"{key} = {value!r}")
        num_equal += 1
    assert num_equal > 25 and num_refused > 5


@pytest.mark.parametrize("name", TINY)
def test_what_a_config_leaves_out_has_the_default_of_transformers(tmp_path, name):
    """Also the sizes: only `model_type` is there."""
    config_class = getattr(transformers, name)
    stock = config_class()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": stock.model_type}))
    config = read_hf_config(tmp_path / "config.json")
    for key, setting in KEYS[config.family].items():
        if getattr(stock, key) is not None:
            assert getattr(config, setting) == getattr(stock, key), key
    if config.positions == "rope":
        assert config.rope_theta == stock.rope_parameters["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(stock.to_dict()))
    assert read_hf_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", ["gpt2", "gpt1", "qwen3-tied", "llama-tied"])
def test_a_tied_model_with_a_head_of_its_own_keeps_it(tmp_path, name):
    """As in transformers: equal to the embedding it is tied, else not, whatever config.json says."""
    random_stock(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = next(tensor for key, tensor in weights.items() if re.search("wte|embed_tokens|tokens_embed", key))
    tokens = torch.randint(0, 61, (1, 24))
    for head, is_tied in ((embedding.clone(), True), (embedding + torch.randn_like(embedding), False)):
        save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = load_model(tmp_path)
        assert ours.config.tied == is_tied
        torch.testing.assert_close(logits(ours, tokens), stock_logits(tmp_path, tokens)[0], atol=1e-4, rtol=1e-5)


def test_a_single_file_counts_before_an_index(tmp_path):
    """As in transformers: an old index beside a newer model.safetensors is not read."""
    random_stock("qwen3", tmp_path, max_shard_size="5KB")
    expected = random_stock("qwen3", tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    tokens = torch.randint(0, 61, (1, 24))
    torch.testing.assert_close(logits(load_model(tmp_path), tokens), expected(tokens).logits, atol=1e-4, rtol=1e-5)


def test_buffers_of_older_files_are_ignored(tmp_path):
    expected = random_stock("gpt1", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for prefix in ("transformer.", ""):
        buffers = {f"{prefix}position_ids": torch.arange(24), f"{prefix}h.0.attn.bias": torch.ones(1, 1, 24, 24)}
        save_file({**weights, **buffers}, tmp_path / "model.safetensors")
        tokens = torch.randint(0, 61, (1, 24))
        torch.testing.assert_close(logits(load_model(tmp_path), tokens), expected(tokens).logits, atol=1e-4, rtol=1e-5)
