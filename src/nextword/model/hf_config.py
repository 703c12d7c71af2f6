"""config.json of Hugging Face model directories: writing it for a `ModelConfig`, and parsing what others wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import read_json
from nextword.model.config import HF_CLASSES, ConfigError, Family, ModelConfig

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Limits of a config.json from elsewhere; what is larger is damaged or hostile.
MAX_LABELS = 1_000_000
MAX_CONTEXT_LENGTH = 2**21  # with rotary positions no tensor confirms this number, and tables are made of it
MAX_CONFIG_VALUE = 10**15
MAX_JSON_BYTES = 2**24

# Keys of config.json that every model of a family has, and the settings of `ModelConfig` that they hold.
GPT_KEYS = {"vocab_size": "vocab_size", "n_embd": "d_model", "n_layer": "n_layers", "n_head": "n_heads"}
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}


class UnsupportedFeatureError(Exception):
    """A feature of a stock family that `GPT` does not implement."""


# ---------------------------------------------------------------- writing


def to_hf_config(config: ModelConfig, end_of_text_id: int | None, pad_token_id: int | None) -> dict[str, Any]:
    """The content of config.json, without labels.

    Args:
        config: The model.
        end_of_text_id: Becomes `bos_token_id` and `eos_token_id`.
        pad_token_id: The pad token.
    """
    model_type, lm_class, classifier_class = HF_CLASSES[config.family]
    is_gpt = config.family in ("gpt1", "gpt2")
    common: dict[str, Any] = {
        "architectures": [classifier_class if config.n_labels else lm_class],
        "model_type": model_type,
        **{key: getattr(config, name) for key, name in (GPT_KEYS if is_gpt else LLAMA_KEYS).items()},
        "tie_word_embeddings": config.tied,
        "initializer_range": 0.02,
        "dtype": "float32",
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "pad_token_id": pad_token_id,
    }
    if is_gpt:
        gelu = "gelu" if config.family == "gpt1" else "gelu_new"
        specific = {
            "n_positions": config.context_length,
            "layer_norm_epsilon": config.norm_eps,
            "afn" if config.family == "gpt1" else "activation_function": gelu
            if config.activation == "gelu"
            else "relu",
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
        if config.family == "gpt2":
            specific["n_inner"] = config.d_ff
    else:
        specific = {
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,  # the key of older readers
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "attention_bias": False,
            "attention_dropout": 0.0,
        }
        if config.family == "llama":
            specific["mlp_bias"] = False
    return {**common, **specific}


def to_hf_label_config(config: ModelConfig, labels: Sequence[str] | None, problem_type: str | None) -> dict[str, Any]:
    """The part of config.json that describes labels.

    Args:
        config: The model.
        labels: The name of each output. Default: LABEL_0, LABEL_1 …, as in the stock classes.
        problem_type: One of `PROBLEM_TYPES`, or None.

    Raises:
        ValueError: The number of labels differs from the number of outputs, a label occurs twice, or `problem_type` is
            unknown or impossible.
    """
    names = [f"LABEL_{i}" for i in range(config.n_labels)] if labels is None else list(labels)
    if len(names) != config.n_labels:
        raise ValueError(f"{len(names)} labels for a head of {config.n_labels} outputs")
    if len(set(names)) != len(names):
        raise ValueError(f"the labels are not all different: {', '.join(names)}")
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type {problem_type!r} is none of {', '.join(PROBLEM_TYPES)}")
    if problem_type == "single_label_classification" and len(names) == 1:
        raise ValueError("single_label_classification needs at least two labels: the stock classes refuse one")
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type,
    }


# ---------------------------------------------------------------- reading


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of limited size. Raises `CorruptFileError` for anything else."""
    content = read_json(path, MAX_JSON_BYTES)
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return content


def read_labels(directory: Path) -> list[str] | None:
    """The label of each output of a classification model, in order; None for a language model.

    Raises:
        NextwordError: The directory has no config.json.
        CorruptFileError: It is not JSON, or its `id2label` does not name the outputs 0, 1, 2 …
    """
    path = directory / "config.json"
    return parse_labels(read_json_object(path), path)


def parse_labels(content: dict[str, Any], path: Path) -> list[str] | None:
    """As `read_labels`, from the content of config.json; `path` is for messages."""
    architectures = content.get("architectures")
    suffix = "ForSequenceClassification"
    if not isinstance(architectures, list) or not any(str(name).endswith(suffix) for name in architectures):
        return None
    names = content.get("id2label")
    if names is None:
        count = content.get("num_labels", 2)  # the stock classes' default
        if not isinstance(count, int) or not 1 <= count <= MAX_LABELS:
            raise CorruptFileError(f"{path}: num_labels is {count!r}, not a number of labels")
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(names, dict) or not names or set(names) != {str(i) for i in range(len(names))}:
        raise CorruptFileError(f"{path}: id2label does not name the outputs 0, 1, 2 …")
    return [str(names[str(i)]) for i in range(len(names))]


def read_hf_config(path: Path) -> ModelConfig:
    """The model that a config.json describes. A model with a classification head is tied: it has no other head.

    Raises:
        NextwordError: The family or a feature is not supported.
        CorruptFileError: The file is not a JSON object, or a value is missing or invalid.
    """
    content = read_json_object(path)
    families: dict[str, Family] = {model_type: family for family, (model_type, *_) in HF_CLASSES.items()}
    if str(content.get("model_type")) not in families:
        supported = ", ".join(families)
        raise NextwordError(
            f"{path}: model_type {content.get('model_type')!r} is not supported (choose from {supported})"
        )
    if content.get("auto_map"):
        raise NextwordError(f"{path}: the model needs code of its own (auto_map); nextword runs no code from a model")
    if content.get("quantization_config"):
        raise NextwordError(f"{path}: quantized weights (quantization_config) are not supported")
    family = families[content["model_type"]]
    try:
        values = (
            parse_gpt_config(content, family) if family in ("gpt1", "gpt2") else parse_llama_config(content, family)
        )
        if labels := parse_labels(content, path):
            values |= {"n_labels": len(labels), "tied": True}
        return parse_model_config(values)
    except KeyError as error:
        raise CorruptFileError(f"{path}: {error.args[0]} is missing") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except UnsupportedFeatureError as error:
        raise NextwordError(f"{path}: {error}") from error


def parse_model_config(values: Any) -> ModelConfig:
    """A `ModelConfig` from JSON that others may have written.

    Raises:
        ConfigError: A value is invalid or implausibly large.
        TypeError: The values are not a JSON object.
    """
    if not isinstance(values, dict):
        raise TypeError("the settings of a model are not a JSON object")
    for name, value in values.items():
        limit = MAX_CONTEXT_LENGTH if name == "context_length" else MAX_CONFIG_VALUE
        if isinstance(value, (int, float)) and not -limit <= value <= limit:
            raise ConfigError(f"{name} is larger than in any model ({limit:,})")
    return ModelConfig.from_dict(values)


def parse_gpt_config(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Settings of `ModelConfig` from the config.json of GPT-1 or GPT-2. Raises `UnsupportedFeatureError`."""
    if family == "gpt1":  # whose class calls the tanh form "gelu"
        name, activations = content.get("afn", "gelu"), {"relu": "relu", "gelu": "gelu"}
    else:
        name = content.get("activation_function", "gelu_new")
        activations = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
    if name not in activations:
        raise UnsupportedFeatureError(f"the activation {name!r} is not supported")
    for flag in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if content.get(flag):
            raise UnsupportedFeatureError(f"{flag} is not supported")
    if content.get("scale_attn_weights") is False:
        raise UnsupportedFeatureError("attention without the scale of 1/√d_k is not supported")
    width, heads = content["n_embd"], content["n_head"]
    return {
        **{name: content[key] for key, name in GPT_KEYS.items()},
        "context_length": content.get("n_positions", content.get("n_ctx")),
        "n_kv_heads": heads,
        "head_dim": width // heads if heads else 0,
        "d_ff": content.get("n_inner") or 4 * width,
        "norm": "layernorm",
        "norm_position": "post" if family == "gpt1" else "pre",
        "norm_eps": content.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "activation": activations[name],
        "tied": content.get("tie_word_embeddings", True),
    }


def parse_llama_config(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Settings of `ModelConfig` from the config.json of Llama or Qwen3. Raises `UnsupportedFeatureError`."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UnsupportedFeatureError(f"RoPE scaling ({rope_type}) is not supported")
    if rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedFeatureError("partial rotary positions are not supported")
    if content.get("use_sliding_window") or "sliding_attention" in (content.get("layer_types") or []):
        raise UnsupportedFeatureError("sliding windows are not supported")
    for bias in ("attention_bias", "mlp_bias"):
        if content.get(bias):
            raise UnsupportedFeatureError(f"{bias} is not supported in {family} models")
    if content.get("hidden_act", "silu") != "silu":
        raise UnsupportedFeatureError(f"the activation {content['hidden_act']!r} is not supported")
    heads, width = content["num_attention_heads"], content["hidden_size"]
    default_head_dim = 128 if family == "qwen3" else width // heads if heads else 0
    return {
        **{name: content[key] for key, name in LLAMA_KEYS.items()},
        "n_kv_heads": content.get("num_key_value_heads") or heads,
        "head_dim": content.get("head_dim") or default_head_dim,
        "norm": "rmsnorm",
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "positions": "rope",
        "rope_theta": float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
        "activation": "swiglu",
        "qk_norm": family == "qwen3",
        "attention_bias": False,
        "feed_forward_bias": False,
        "tied": content.get("tie_word_embeddings", False),
    }
