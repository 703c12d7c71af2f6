"""Model configuration: sizes and choices, named presets, and the Hugging Face class of each model.

The choices are restricted: a configuration that no class of `transformers` can hold is refused when it is made, so that
every model can be saved as a Hugging Face directory.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from nextword.common import numbers
from nextword.common.errors import UsageError

Family = Literal["gpt1", "gpt2", "qwen3", "llama"]

# `model_type` in config.json, the class with a language-model head, and the class with a classification head.
HF_CLASSES: dict[Family, tuple[str, str, str]] = {
    "gpt1": ("openai-gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTForSequenceClassification"),
    "gpt2": ("gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "llama": ("llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
}
# The values that each family allows; the first of them is its default.
_LAYERNORM: dict[str, tuple[Any, ...]] = {
    "norm": ("layernorm",),
    "positions": ("learned", "sinusoidal"),
    "activation": ("gelu", "relu"),
    "qk_norm": (False,),
}
_RMSNORM: dict[str, tuple[Any, ...]] = {
    "norm": ("rmsnorm",),
    "norm_position": ("pre",),
    "positions": ("rope",),
    "activation": ("swiglu",),
    "attention_bias": (False,),
    "feed_forward_bias": (False,),
}
FAMILY_SETTINGS: dict[Family, dict[str, tuple[Any, ...]]] = {
    "gpt1": {**_LAYERNORM, "norm_position": ("post",)},
    "gpt2": {**_LAYERNORM, "norm_position": ("pre",)},
    "qwen3": {**_RMSNORM, "qk_norm": (True,)},
    "llama": {**_RMSNORM, "qk_norm": (False,)},
}
FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    family: {name: values[0] for name, values in settings.items()} for family, settings in FAMILY_SETTINGS.items()
}
MAX_LABELS = 1_000_000
MAX_ROPE_THETA = 10**15


class ConfigError(ValueError):
    """A configuration that is invalid or that no transformers class can hold."""


def setting(help: str, default: Any = MISSING) -> Any:
    """A dataclass field with help for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model.

    Raises:
        ConfigError: A value is out of range, or no transformers class can hold the model.
    """

    vocab_size: numbers.Size
    context_length: numbers.Size = setting("Context length in tokens.")
    n_layers: numbers.Size = setting("Number of Transformer blocks.")
    n_heads: numbers.Size = setting("Number of attention heads.")
    n_kv_heads: numbers.Size = setting("Number of key-value heads, each shared by n_heads / n_kv_heads query heads.")
    head_dim: numbers.Size = setting("Width of an attention head. Default: d_model / n_heads.")
    d_model: numbers.Size = setting("Width of the residual stream.")
    d_ff: numbers.Size = setting("Width of the feed-forward layer.")
    norm: Literal["layernorm", "rmsnorm"] = setting("Layer normalization or RMSNorm.", "layernorm")
    norm_position: Literal["pre", "post"] = setting("Norms before each residual branch, or after each sum.", "pre")
    norm_eps: numbers.PositiveShare = setting("Epsilon of the norms.", 1e-5)
    positions: Literal["learned", "sinusoidal", "rope"] = setting("Position encoding.", "learned")
    rope_theta: Annotated[float, numbers.Range(1, MAX_ROPE_THETA)] = setting(
        "Base of the rotary position embedding.", 10_000.0
    )
    activation: Literal["relu", "gelu", "swiglu"] = setting("Activation of the feed-forward layer.", "gelu")
    qk_norm: bool = setting("Normalize the queries and keys of each head.", False)
    attention_bias: bool = setting("Biases in the attention projections.", True)
    feed_forward_bias: bool = setting("Biases in the feed-forward layer.", True)
    tied: bool = setting("Tie the token embedding and the language-model head.", True)
    dropout: numbers.Decay = setting("Dropout probability of the residual branches and the embedding.", 0.0)
    n_labels: Annotated[int, numbers.Range(0, MAX_LABELS)] = setting(
        "Outputs of the classification head; 0 for a language model.", 0
    )

    def __post_init__(self) -> None:
        try:
            numbers.set_checked_numbers(self)
        except UsageError as error:
            raise ConfigError(str(error)) from error
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ConfigError(f"sinusoidal positions need an even d_model, not {self.d_model}")
        _ = self.family

    @property
    def family(self) -> Family:
        """The family of the transformers class that holds this model.

        Raises:
            ConfigError: No transformers class does; names the setting that prevents it.
        """
        if self.norm == "layernorm":
            family: Family = "gpt1" if self.norm_position == "post" else "gpt2"
        else:
            family = "qwen3" if self.qk_norm else "llama"
        allowed, hf_class = dict(FAMILY_SETTINGS[family]), HF_CLASSES[family][1]
        if self.norm == "layernorm":
            if self.head_dim * self.n_heads != self.d_model:
                sizes = f"{self.d_model} is not {self.n_heads} × {self.head_dim}"
                raise ConfigError(f"{hf_class} needs d_model = n_heads × head_dim; {sizes}")
            allowed["n_kv_heads"] = (self.n_heads,)
        if family == "gpt1":
            allowed["d_ff"] = (4 * self.d_model,)
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{hf_class}, the closest transformers class, needs "
                    f"{name} = {' or '.join(map(str, values))}, not {getattr(self, name)}"
                )
        return family

    @property
    def parameters(self) -> int:
        """Number of parameters, with embeddings and heads; a tied head counts once."""
        d, q, kv = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        norm = d * (2 if self.norm == "layernorm" else 1)
        attention = d * (q + 2 * kv) + q * d + (q + 2 * kv + d if self.attention_bias else 0)
        attention += 2 * self.head_dim if self.qk_norm else 0
        matrices = 3 if self.activation == "swiglu" else 2
        feed_forward = matrices * d * self.d_ff + (self.d_ff + d if self.feed_forward_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tied else 2)
        embeddings += self.context_length * d if self.positions == "learned" else 0
        final_norm = norm if self.norm_position == "pre" else 0
        return embeddings + self.n_layers * (attention + feed_forward + 2 * norm) + final_norm + self.n_labels * d

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations per token in training.

        Six for each parameter of a matrix (Kaplan et al. 2020, section 2.1), and attention over half a window.
        """
        lookups = 0 if self.tied else self.vocab_size * self.d_model
        lookups += self.context_length * self.d_model if self.positions == "learned" else 0
        attention = 6 * self.n_layers * self.n_heads * self.head_dim * self.context_length
        return 6.0 * (self.parameters - lookups) + attention

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """A configuration from the output of `to_dict`.

        Raises:
            ConfigError: A setting is unknown, missing or invalid.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown model settings: {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(str(error)) from error


# The choices of each preset. The sizes come from SIZES or from the caller.
PRESETS: dict[str, dict[str, Any]] = {
    # Vaswani et al. 2017, sections 3.1 to 3.5, the decoder alone. Its projections have no bias. The head is not tied, because
    # a tied matrix cannot be as large as the position table and give small logits at the same time.
    "tutorial": {
        **FAMILY_DEFAULTS["gpt1"],
        "positions": "sinusoidal",
        "activation": "relu",
        "attention_bias": False,
        "tied": False,
    },
    # Radford et al. 2018, section 4.1: post-norm, learned positions, GELU.
    "gpt1": FAMILY_DEFAULTS["gpt1"],
    # Radford et al. 2019, section 2.3: pre-norm, and a final norm.
    "gpt2": FAMILY_DEFAULTS["gpt2"],
    # Qwen3 technical report 2025, section 2: RoPE (Su et al. 2021), RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer
    # 2020), grouped-query attention (Ainslie et al. 2023), and normalized queries and keys.
    "modern": {**FAMILY_DEFAULTS["qwen3"], "norm_eps": 1e-6},
}

# name: (layers, heads, width, context length). From 125m on: GPT-3's table 2.1 (Brown et al. 2020), with a number of heads
# that divides the width where the printed one does not.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "micro": (2, 2, 64, 128),
    "tiny": (4, 4, 128, 128),
    "mini": (6, 6, 192, 256),
    "small": (6, 8, 256, 256),
    "midi": (6, 6, 384, 256),
    "base": (8, 8, 512, 512),
    "125m": (12, 12, 768, 1024),
    "350m": (24, 16, 1024, 2048),
    "760m": (24, 16, 1536, 2048),
    "1.3b": (24, 16, 2048, 2048),
    "2.7b": (32, 32, 2560, 2048),
    "6.7b": (32, 32, 4096, 2048),
    "13b": (40, 40, 5120, 2048),
    "175b": (96, 96, 12288, 2048),
}


def build_config(preset: str = "modern", size: str = "mini", *, vocab_size: int, **overrides: Any) -> ModelConfig:
    """A preset at a size.

    Args:
        preset: A name in `PRESETS`.
        size: A name in `SIZES`.
        vocab_size: Number of tokens.
        **overrides: Settings of `ModelConfig`; None is ignored. Defaults: `head_dim` d_model / n_heads; `d_ff` 4 d_model, for
            SwiGLU's three matrices 8/3 d_model rounded up to a multiple of 64; `n_kv_heads` n_heads, for `modern` half of an
            even number of at least 4.

    Raises:
        ConfigError: The preset, size or a setting is unknown or invalid, or no transformers class can hold the model.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    sizes = dict(zip(("n_layers", "n_heads", "d_model", "context_length"), SIZES[size], strict=True))
    overrides = {name: value for name, value in overrides.items() if value is not None}
    values: dict[str, Any] = {**PRESETS[preset], **sizes, **overrides, "vocab_size": vocab_size}
    n_heads, d_model = values["n_heads"], values["d_model"]
    if "head_dim" not in values:
        if d_model % n_heads:
            raise ConfigError(f"d_model ({d_model}) must be a multiple of n_heads ({n_heads}), or set head_dim")
        values["head_dim"] = d_model // n_heads
    if "n_kv_heads" not in values:
        values["n_kv_heads"] = n_heads // 2 if preset == "modern" and n_heads >= 4 and n_heads % 2 == 0 else n_heads
    if "d_ff" not in values:
        values["d_ff"] = -(-8 * d_model // (3 * 64)) * 64 if values["activation"] == "swiglu" else 4 * d_model
    return ModelConfig.from_dict(values)
