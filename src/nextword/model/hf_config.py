"""config.json of Hugging Face model directories: writing it for a `ModelConfig`, and parsing what others wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import is_json_object, read_json
from nextword.model.config import FAMILY_DEFAULTS, HF_CLASSES, ConfigError, Family, ModelConfig

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Limits of a config.json from elsewhere; what is larger is damaged or hostile.
MAX_LABELS = 1_000_000
MAX_CONTEXT_LENGTH = 2**21  # with rotary positions no tensor confirms this number, and tables are made of it
MAX_CONFIG_VALUE = 10**15
MAX_JSON_BYTES = 2**24

# Keys of config.json and the settings of `ModelConfig` that they hold.
GPT_KEYS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tied",
}
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
# The key of the activation, and the activations that each of its values stands for; the first is the default in transformers.
# GPT-1's class calls the tanh form "gelu".
ACTIVATIONS: dict[Family, tuple[str, dict[str, str]]] = {
    "gpt1": ("afn", {"gelu": "gelu", "relu": "relu"}),
    "gpt2": ("activation_function", {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}),
    "qwen3": ("hidden_act", {"silu": "swiglu"}),
    "llama": ("hidden_act", {"silu": "swiglu"}),
}
# Features that no `ModelConfig` has, by the keys that switch them on.
GPT_UNSUPPORTED = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
LLAMA_UNSUPPORTED = ("attention_bias", "mlp_bias")


def is_gpt(family: Family) -> bool:
    """Whether config.json has the keys of GPT-1 and GPT-2, not those of Llama."""
    return family in ("gpt1", "gpt2")


# ---------------------------------------------------------------- writing


def to_hf_config(config: ModelConfig, end_of_text_id: int | None, pad_token_id: int | None) -> dict[str, Any]:
    """The content of config.json, without labels.

    Args:
        config: The model.
        end_of_text_id: Becomes `bos_token_id` and `eos_token_id`.
        pad_token_id: The pad token.
    """
    family = config.family
    model_type, lm_class, classifier_class = HF_CLASSES[family]
    activation_key, activations = ACTIVATIONS[family]
    content: dict[str, Any] = {
        "architectures": [classifier_class if config.n_labels else lm_class],
        "model_type": model_type,
        **{key: getattr(config, name) for key, name in (GPT_KEYS if is_gpt(family) else LLAMA_KEYS).items()},
        activation_key: next(name for name, ours in activations.items() if ours == config.activation),
        "initializer_range": 0.02,
        "dtype": "float32",
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "pad_token_id": pad_token_id,
    }
    if is_gpt(family):
        content |= {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "attn_pdrop": 0.0}
        return content | ({"n_inner": config.d_ff} if family == "gpt2" else {})
    content |= {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,  # the key of older readers
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    return content | ({"mlp_bias": False} if family == "llama" else {})


def to_hf_label_config(config: ModelConfig, labels: Sequence[str] | None, problem_type: str | None) -> dict[str, Any]:
    """The part of config.json that describes labels.

    Args:
        config: The model.
        labels: The name of each output. Default: LABEL_0, LABEL_1 …, as in the transformers classes.
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
        raise ValueError("single_label_classification needs at least two labels: the transformers classes refuse one")
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
    if not is_json_object(content):
        raise CorruptFileError(f"{path}: not a JSON object")
    return content


def parse_labels(content: dict[str, Any], path: Path) -> list[str] | None:
    """The label of each output of a classification model, in order; None for a language model.

    Args:
        content: The content of config.json.
        path: Its path, for messages.

    Raises:
        CorruptFileError: `id2label` does not name the outputs 0, 1, 2 …
    """
    architectures: list[Any] = content.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return None
    names = content.get("id2label")
    if names is None:
        count = content.get("num_labels", 2)  # the transformers classes' default
        if not isinstance(count, int) or not 1 <= count <= MAX_LABELS:
            raise CorruptFileError(f"{path}: num_labels is {count!r}, not a number of labels")
        return [f"LABEL_{i}" for i in range(count)]
    if not is_json_object(names) or not names or set(names) != {str(i) for i in range(len(names))}:
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
    family = families.get(str(content.get("model_type")))
    if family is None:
        supported = ", ".join(families)
        raise NextwordError(
            f"{path}: model_type {content.get('model_type')!r} is not supported (choose from {supported})"
        )
    try:
        values = parse_architecture(content, family)
        if labels := parse_labels(content, path):
            values |= {"n_labels": len(labels), "tied": True}
        return parse_model_config(values)
    except KeyError as error:
        raise CorruptFileError(f"{path}: {error.args[0]} is missing") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except NotImplementedError as error:
        raise NextwordError(f"{path}: {error}") from error


def parse_architecture(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Settings of `ModelConfig` from the content of config.json.

    Raises:
        NotImplementedError: The model has a feature that `GPT` does not implement.
        KeyError: A size is missing.
    """
    activation_key, activations = ACTIVATIONS[family]
    activation = content.get(activation_key, next(iter(activations)))
    rope: dict[str, Any] = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    partial_rotary = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0)) != 1.0
    sliding = content.get("use_sliding_window") or "sliding_attention" in (content.get("layer_types") or [])
    problems: dict[str, Any] = {
        "the model needs code of its own (auto_map); nextword runs no code from a model": content.get("auto_map"),
        "quantized weights (quantization_config) are not supported": content.get("quantization_config"),
        f"the activation {activation!r} is not supported": activation not in activations,
        f"RoPE scaling ({rope_type}) is not supported": rope_type != "default",
        "partial rotary positions are not supported": partial_rotary,
        "sliding windows are not supported": sliding,
        "attention without the scale of 1/√d_k is not supported": content.get("scale_attn_weights") is False,
        **{
            f"{key} is not supported in {family} models": content.get(key)
            for key in (GPT_UNSUPPORTED if is_gpt(family) else LLAMA_UNSUPPORTED)
        },
    }
    if problem := next((problem for problem, is_present in problems.items() if is_present), None):
        raise NotImplementedError(problem)
    defaults: dict[str, Any]
    if is_gpt(family):
        keys = GPT_KEYS
        defaults = {"n_positions": content.get("n_ctx"), "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    else:
        keys, defaults = LLAMA_KEYS, {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    values = {name: (defaults | content)[key] for key, name in keys.items()}
    width, heads = values["d_model"], values["n_heads"]
    default_head_dim = 128 if family == "qwen3" else width // heads if heads else 0
    return {
        "d_ff": content.get("n_inner") or 4 * width,
        **FAMILY_DEFAULTS[family],
        **values,
        "n_kv_heads": content.get("num_key_value_heads") or heads,
        "head_dim": content.get("head_dim") or default_head_dim,
        "rope_theta": float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
        "activation": activations[activation],
    }


def parse_model_config(values: Any) -> ModelConfig:
    """A `ModelConfig` from JSON that others may have written.

    Raises:
        ConfigError: A value is invalid or implausibly large.
        TypeError: The values are not a JSON object.
    """
    if not is_json_object(values):
        raise TypeError("the settings of a model are not a JSON object")
    for name, value in values.items():
        limit = MAX_CONTEXT_LENGTH if name == "context_length" else MAX_CONFIG_VALUE
        if isinstance(value, (int, float)) and not -limit <= value <= limit:
            raise ConfigError(f"{name} is larger than in any model ({limit:,})")
    return ModelConfig.from_dict(values)
