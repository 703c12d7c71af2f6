"""A stock config.json: what it says of a model of ours, and the model that one describes, whoever wrote it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import read_json
from nextword.model.config import HF_CLASSES, ConfigError, ModelConfig

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
MAX_LABELS = 1_000_000  # a count above this is a damaged file
MAX_CONTEXT_LENGTH = 2**21  # tokens: with rotary positions no tensor bears this number out, and tables are made of it
MAX_CONFIG_VALUE = 10**15  # of any other number in a config.json; what is above is nobody's model
MAX_JSON_BYTES = 2**24  # bytes of a foreign config.json or of an index of shards


def to_hf_config(config: ModelConfig, end_of_text_id: int | None, pad_token_id: int | None) -> dict[str, Any]:
    """What config.json says of this model, the names of its labels left out."""
    model_type, language_model, classifier = HF_CLASSES[config.family]
    common: dict[str, Any] = {
        "architectures": [classifier if config.n_labels else language_model],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "initializer_range": 0.02,
        "dtype": "float32",
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "pad_token_id": pad_token_id,
    }
    if config.family in ("gpt1", "gpt2"):
        activation = "relu" if config.activation == "relu" else ("gelu" if config.family == "gpt1" else "gelu_new")
        family_config = {
            "n_positions": config.context_length,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "layer_norm_epsilon": config.norm_eps,
            "afn" if config.family == "gpt1" else "activation_function": activation,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
        if config.family == "gpt2":
            family_config["n_inner"] = config.d_ff
    else:
        family_config = {
            "max_position_embeddings": config.context_length,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            # The older key, which many readers still take, and the newer one say the same.
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "attention_bias": False,
            "attention_dropout": 0.0,
        }
        if config.family == "llama":
            family_config["mlp_bias"] = False
    return {**common, **family_config}


def to_hf_label_config(config: ModelConfig, labels: Sequence[str] | None, problem_type: str | None) -> dict[str, Any]:
    """What config.json says of the labels. Without names they are LABEL_0, LABEL_1 …, as in the stock classes.

    Raises:
        ValueError: not as many names as the head has outputs, the same name twice, or a `problem_type` that is unknown or
            not one of this many outputs.
    """
    names = [f"LABEL_{i}" for i in range(config.n_labels)] if labels is None else list(labels)
    if len(names) != config.n_labels:
        raise ValueError(f"{len(names)} labels for a head of {config.n_labels} outputs")
    if len(set(names)) != len(names):
        raise ValueError(f"the labels are not all different: {', '.join(names)}")
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type {problem_type!r} is none of {', '.join(PROBLEM_TYPES)}")
    if problem_type == "single_label_classification" and len(names) == 1:
        raise ValueError("one label of one is always right: the stock classes refuse single_label_classification here")
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type,
    }


def read_labels(directory: Path) -> list[str] | None:
    """The label of each output of a classification directory, in order; None for a language model.

    Raises:
        NextwordError: no config.json there.
        CorruptFile: it is not JSON, or its id2label is not a name for each of 0, 1, 2 …
    """
    path = directory / "config.json"
    return parse_labels(read_json_object(path), path)


def parse_labels(raw: dict[str, Any], path: Path) -> list[str] | None:
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not any(
        str(a).endswith("ForSequenceClassification") for a in architectures
    ):
        return None
    names = raw.get("id2label")
    if names is None:  # a count alone, or nothing, where it is the stock classes' default of two
        count = raw.get("num_labels", 2)
        if not isinstance(count, int) or not 1 <= count <= MAX_LABELS:
            raise CorruptFileError(f"{path}: num_labels is {count!r}, not a number of labels")
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(names, dict) or not names or set(names) != {str(i) for i in range(len(names))}:
        raise CorruptFileError(f"{path}: id2label does not name the outputs 0, 1, 2 …")
    return [str(names[str(i)]) for i in range(len(names))]


def read_json_object(path: Path) -> dict[str, Any]:
    raw = read_json(path, MAX_JSON_BYTES)
    if not isinstance(raw, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return raw


def read_hf_config(path: Path) -> ModelConfig:
    """The model that a stock config.json describes. With a classification head it opens as tied: no other head is there.

    Raises:
        NextwordError: a family or a feature that nextword does not have, by name.
        CorruptFile: no JSON object, a number missing or of another kind.
    """
    raw = read_json_object(path)
    families = {model_type: family for family, (model_type, *_) in HF_CLASSES.items()}
    if str(raw.get("model_type")) not in families:
        raise NextwordError(
            f"{path}: model_type {raw.get('model_type')!r} is not one that nextword opens ({', '.join(families)})"
        )
    if raw.get("auto_map"):
        raise NextwordError(
            f"{path}: this model needs code of its own (auto_map), and nextword runs no code from a model"
        )
    if raw.get("quantization_config"):
        raise NextwordError(f"{path}: quantised weights (quantization_config) are not opened")
    family = families[raw["model_type"]]
    try:
        values = parse_gpt_config(raw, family) if family in ("gpt1", "gpt2") else parse_llama_config(raw, family)
        if labels := parse_labels(raw, path):
            values |= {"n_labels": len(labels), "tied": True}
        return parse_model_config(values)
    except KeyError as error:
        raise CorruptFileError(f"{path}: {error.args[0]} is missing") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except UnsupportedFeatureError as error:
        raise NextwordError(f"{path}: {error}") from error


def parse_model_config(values: Any) -> ModelConfig:
    """The model of settings that somebody wrote down.

    Raises:
        ConfigError: they make no model, or one of a size that nobody has.
        TypeError: they are no settings at all.
    """
    if not isinstance(values, dict):
        raise TypeError("the settings of a model are not a JSON object")
    for name, value in values.items():
        limit = MAX_CONTEXT_LENGTH if name == "context_length" else MAX_CONFIG_VALUE
        if isinstance(value, (int, float)) and not -limit <= value <= limit:
            raise ConfigError(f"{name} is larger than any model has it ({limit:,})")
    return ModelConfig.from_dict(values)


class UnsupportedFeatureError(Exception):
    """A feature of a stock family that nextword does not have."""


def parse_gpt_config(raw: dict[str, Any], family: str) -> dict[str, Any]:
    name = raw.get("afn", "gelu") if family == "gpt1" else raw.get("activation_function", "gelu_new")
    # In GPT-1's class "gelu" is the tanh form; in GPT-2's that is "gelu_new".
    activations = {"relu": "relu", "gelu": "gelu"} if family == "gpt1" else {
        "relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu",
    }  # fmt: skip
    if name not in activations:
        raise UnsupportedFeatureError(f"the activation {name!r} is not one that nextword has")
    for flag in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if raw.get(flag):
            raise UnsupportedFeatureError(f"{flag} is not something that nextword does")
    if raw.get("scale_attn_weights") is False:
        raise UnsupportedFeatureError("attention without its scale of 1/√d_k is not something that nextword does")
    width, heads = raw["n_embd"], raw["n_head"]
    return {
        "vocab_size": raw["vocab_size"],
        "context_length": raw.get("n_positions", raw.get("n_ctx")),
        "n_layers": raw["n_layer"],
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": width // heads if heads else 0,
        "d_model": width,
        "d_ff": raw.get("n_inner") or 4 * width,
        "norm": "layernorm",
        "norm_position": "post" if family == "gpt1" else "pre",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "activation": activations[name],
        "tied": raw.get("tie_word_embeddings", True),
    }


def parse_llama_config(raw: dict[str, Any], family: str) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UnsupportedFeatureError(
            f"RoPE scaling ({rope.get('rope_type', rope.get('type'))}) is not something that nextword does"
        )
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedFeatureError("partial rotary positions are not something that nextword does")
    sliding = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or [])
    if sliding:
        raise UnsupportedFeatureError("sliding windows are not something that nextword does")
    for bias in ("attention_bias", "mlp_bias"):
        if raw.get(bias):
            raise UnsupportedFeatureError(f"{bias} is not something that nextword's {family} has")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedFeatureError(f"the activation {raw['hidden_act']!r} is not one that nextword has")
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else width // heads if heads else 0)
    return {
        "vocab_size": raw["vocab_size"],
        "context_length": raw["max_position_embeddings"],
        "n_layers": raw["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "d_model": width,
        "d_ff": raw["intermediate_size"],
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "positions": "rope",
        "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        "activation": "swiglu",
        "qk_norm": family == "qwen3",
        "attention_bias": False,
        "feed_forward_bias": False,
        "tied": raw.get("tie_word_embeddings", False),
    }
