"""config.json of Hugging Face model directories: writing it for a `ModelConfig`, and parsing what others wrote."""

import tomllib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import is_json_object, read_json_object
from nextword.model.config import FAMILY_DEFAULTS, HF_CLASSES, MAX_LABELS, ConfigError, Family, ModelConfig

# Limits of a config.json from elsewhere; what is larger is damaged or hostile.
MAX_JSON_BYTES = 2**22

# The key of the activation, and the activations that each of its values stands for; the first is the default in transformers.
# GPT-1's class calls the tanh form "gelu".
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
ACTIVATIONS: dict[Family, tuple[str, dict[str, str]]] = {
    "gpt1": ("afn", {"gelu": "gelu", "relu": "relu"}),
    "gpt2": ("activation_function", {**dict.fromkeys(TANH_GELU, "gelu"), "relu": "relu"}),
    "qwen3": ("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
    "llama": ("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
}
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types")
KEY_TABLES = tomllib.loads(Path(__file__).with_name("hf_config_keys.toml").read_text(encoding="utf-8"))
# Keys of config.json and the settings of `ModelConfig` that they hold.
KEYS: dict[Family, dict[str, str]] = KEY_TABLES["keys"]


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
        **{key: getattr(config, name) for key, name in KEYS[family].items()},
        activation_key: next(name for name, ours in activations.items() if ours == config.activation),
        "initializer_range": 0.02,
        "dtype": "float32",
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "pad_token_id": pad_token_id,
    }
    if is_gpt(family):
        return content | {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "attn_pdrop": 0.0}
    content |= {
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
        labels: The different names of the outputs. Default: LABEL_0, LABEL_1 …, as in the transformers classes.
        problem_type: regression, single_label_classification (of at least two labels), multi_label_classification, or None.
    """
    names = [f"LABEL_{i}" for i in range(config.n_labels)] if labels is None else list(labels)
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type,
    }


# ---------------------------------------------------------------- reading


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
    content = read_json_object(path, MAX_JSON_BYTES)
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
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except NotImplementedError as error:
        raise NextwordError(f"{path}: {error}") from error


def check_keys(content: dict[str, Any], family: Family) -> None:
    """Check that every key of config.json is one that is used here, or that is known to have no effect.

    Raises:
        NotImplementedError: A key is unknown, or its value is not supported. The message names the key.
        ConfigError: Two names of one size have different values.
    """
    aliases: dict[str, str] = KEY_TABLES["gpt_aliases"] if is_gpt(family) else {}
    for alias, key in aliases.items():
        if alias in content and content.get(key, content[alias]) != content[alias]:
            raise ConfigError(f"{key} and {alias}, two names of one size, have different values")
    known = {*KEYS[family], *aliases, ACTIVATIONS[family][0], *chain(*KEY_TABLES["irrelevant"].values())}
    known |= set[str]() if is_gpt(family) else set(ROPE_KEYS)
    known |= {"sliding_window"} if family == "qwen3" else set()  # `use_sliding_window` switches it on
    unsupported, required = KEY_TABLES["unsupported"], KEY_TABLES["required"]
    for key in sorted(content.keys() - known):
        value = content[key]
        is_supported = not value if key in unsupported else value is None or key.startswith("_")
        if value != True if key in required else not is_supported:  # noqa: E712 (1.0 is True)
            reason = (unsupported | required).get(key, "an unknown key: remove it if it has no effect")
            raise NotImplementedError(f"{key[:80]!r} is not supported with this value ({reason})")


def parse_architecture(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Settings of `ModelConfig` from the content of config.json.

    What is left out has the default of transformers.

    Raises:
        NotImplementedError: The model has a feature that `GPT` does not implement.
        ConfigError: A size is null or has two values.
    """
    check_keys(content, family)
    if is_gpt(family):
        content = {KEY_TABLES["gpt_aliases"].get(key, key): value for key, value in content.items()}
    activation_key, activations = ACTIVATIONS[family]
    keys, defaults = KEYS[family], KEY_TABLES["defaults"][family]
    # `rope_scaling` replaces `rope_parameters`, also the base in it, as in transformers.
    rope: dict[str, Any] = content.get("rope_scaling") or content.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise NotImplementedError(f"RoPE scaling ({rope_type}) is not supported")
    if unknown := {key for key in rope if rope[key] is not None} - {"rope_type", "type", "rope_theta"}:
        raise NotImplementedError(f"{min(unknown)[:80]!r} among the RoPE parameters is not supported")
    if (activation := content.get(activation_key, next(iter(activations)))) not in activations:
        raise NotImplementedError(f"the activation {activation!r} is not supported ({activation_key})")
    values = {name: content.get(key, defaults.get(key)) for key, name in keys.items()}
    if null := [key for key, name in keys.items() if values[name] is None and key in defaults]:
        raise ConfigError(f"{null[0]} is null")
    layer_types: list[Any] = content.get("layer_types") or []
    if layer_types and (set(layer_types) != {"full_attention"} or len(layer_types) != values["n_layers"]):
        raise NotImplementedError("layer_types is supported only if it says full_attention of every layer")
    width, heads = values["d_model"], values["n_heads"]
    return {
        **FAMILY_DEFAULTS[family],
        "d_ff": 4 * width,
        "n_kv_heads": heads,
        "head_dim": width // heads if heads else 0,
        **{name: value for name, value in values.items() if value is not None},
        "rope_theta": float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
        "activation": activations[activation],
    }


def parse_model_config(values: Any) -> ModelConfig:
    """A `ModelConfig` from JSON that others may have written.

    Raises:
        ConfigError: A value is invalid.
        TypeError: The values are not a JSON object.
    """
    if not is_json_object(values):
        raise TypeError("the settings of a model are not a JSON object")
    return ModelConfig.from_dict(values)
