"""Export to GGUF, for llama.cpp and programs built on it."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import NextwordError, import_optional
from nextword.data.tokenizer import PRETOKENIZE_PATTERN, Tokenizer
from nextword.export.verification import TOLERANCE, ExportResult, temp_output, verify_with_llama_cpp
from nextword.inference.quantization import GROUP_SIZE, Precision, precision_for
from nextword.model.config import Family, ModelConfig
from nextword.model.gpt import GPT, sinusoidal_table
from nextword.model.hf import load_model
from nextword.pipeline.language_model import resolve_model_dir

ARCHITECTURES: tuple[Family, ...] = ("gpt2", "qwen3", "llama")  # named alike in GGUF
GGML_TYPES: dict[Precision, str] = {"float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
# Names in GGUF and in a block of the model. Several tensors are concatenated.
TENSOR_NAMES = {
    "attn_norm": ["attention_norm"],
    "attn_qkv": ["attention.query", "attention.key", "attention.value"],
    "attn_q": ["attention.query"],
    "attn_k": ["attention.key"],
    "attn_v": ["attention.value"],
    "attn_q_norm": ["attention.query_norm"],
    "attn_k_norm": ["attention.key_norm"],
    "attn_output": ["attention.output"],
    "ffn_norm": ["feed_forward_norm"],
    "ffn_gate": ["feed_forward.gate"],
    "ffn_up": ["feed_forward.up"],
    "ffn_down": ["feed_forward.down"],
}
# llama.cpp's names of regular expressions for pre-tokenization.
PRE_TOKENIZERS = {PRETOKENIZE_PATTERN: "qwen35", "": "gpt-2"}


def write_gguf(
    model: str | Path, out: str | Path, precision: Precision = "float32", tolerance: float = TOLERANCE
) -> ExportResult:
    """Export a model directory to one GGUF file, verified with llama.cpp if it is installed.

    Verification needs float32: with quantized weights llama.cpp quantizes activations too. A quantized file is therefore
    verified in float32 first.

    Args:
        precision: of the matrices (int8 as Q8_0, int4 as Q4_0).
        tolerance: the largest accepted difference of log-probabilities in nats.

    Raises:
        NextwordError: llama.cpp does not support the architecture or the tokenizer, or verification fails.
        MissingDependencyError: `gguf` is not installed.
    """
    gguf = import_optional("gguf", "--to gguf", "gguf")
    directory, out = resolve_model_dir(model), Path(out)
    gpt, tokenizer = load_model(directory).eval().float(), Tokenizer.open(directory)
    family = gpt.config.family
    if family not in ARCHITECTURES:
        raise NextwordError(
            f"{directory}: llama.cpp has no architecture for {family} (post-norm); it has gpt2 and modern"
        )
    if gpt.config.n_labels:
        raise NextwordError(f"{directory}: a classifier, and only language models are exported to GGUF")
    vocabulary = gguf_vocabulary(directory, tokenizer, gpt.config.vocab_size)

    def write_file(file: Path, precision: Precision) -> None:
        writer = gguf.GGUFWriter(file, family)
        write_model_metadata(writer, gpt.config, directory.resolve().name)
        write_tokenizer_metadata(writer, vocabulary, tokenizer)
        if (template := directory / "chat_template.jinja").is_file():
            writer.add_chat_template(template.read_text(encoding="utf-8"))
        for name, tensor in gguf_tensors(gpt):
            ggml_type = gguf.GGMLQuantizationType[GGML_TYPES[tensor_precision(name, tensor, precision)]]
            array = np.ascontiguousarray(tensor.detach().numpy())
            is_quantized = ggml_type != gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(array, ggml_type) if is_quantized else array
            writer.add_tensor(name, data, raw_dtype=ggml_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    with temp_output(out) as partial:
        difference = None
        if find_spec("llama_cpp"):
            write_file(partial, "float32")
            difference = verify_with_llama_cpp(partial, gpt, tokenizer, tolerance)
        if difference is None or precision != "float32":
            write_file(partial, precision)
        return ExportResult(out, "llama-cpp-python", difference)


def tensor_precision(name: str, tensor: Tensor, precision: Precision) -> Precision:
    """The precision of a tensor: norms, biases, positions and matrices with partial groups stay in float32."""
    if tensor.ndim != 2 or tensor.shape[1] % GROUP_SIZE or name == "position_embd.weight":
        return "float32"
    return precision_for(precision, name.startswith("blk."))


def gguf_tensors(gpt: GPT) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by their names in GGUF."""
    config = gpt.config
    parameters: dict[str, Tensor] = {name: parameter for name, parameter in gpt.named_parameters()}  # noqa: C416
    yield "token_embd.weight", parameters["token_embedding.weight"]
    if config.positions == "sinusoidal":
        yield "position_embd.weight", sinusoidal_table(config.context_length, config.d_model)
    elif config.positions == "learned":
        yield "position_embd.weight", parameters["position_embedding.weight"]
    for i in range(config.n_layers):
        for name, sources in TENSOR_NAMES.items():
            if name in (("attn_q", "attn_k", "attn_v") if config.family == "gpt2" else ("attn_qkv",)):
                continue
            weights, biases = (
                [parameters[key] for source in sources if (key := f"blocks.{i}.{source}.{suffix}") in parameters]
                for suffix in ("weight", "bias")
            )
            if not weights:
                continue
            weight = torch.cat(weights)
            if config.family == "llama" and name in ("attn_q", "attn_k"):
                weight = permute_rope(weight, config.head_dim)
            yield f"blk.{i}.{name}.weight", weight
            if biases or config.family == "gpt2":  # this architecture requires biases
                yield f"blk.{i}.{name}.bias", torch.cat(biases) if biases else torch.zeros(len(weight))
    for suffix in ("weight", "bias"):
        if f"final_norm.{suffix}" in parameters:
            yield f"output_norm.{suffix}", parameters[f"final_norm.{suffix}"]
    if not config.tied:
        yield "output.weight", parameters["head.weight"]


def permute_rope(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a query or key matrix of Llama for GGUF: rotated pairs are adjacent there, not half a head apart."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def write_model_metadata(writer: Any, config: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def gguf_vocabulary(directory: Path, tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Tokens, their types and merges for llama.cpp.

    Raises:
        NextwordError: the tokenizer is not a byte-level BPE that llama.cpp supports.
    """
    backend = json.loads(tokenizer.backend.to_str())
    pre_tokenizer = backend["pre_tokenizer"] or {}
    steps = {step.get("type"): step for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])}
    pattern = steps["Split"]["pattern"].get("Regex") if "Split" in steps else ""
    byte_level = steps.get("ByteLevel", {})
    is_supported = (
        backend["model"]["type"] == "BPE"
        and bool(byte_level)
        and pattern in PRE_TOKENIZERS
        and not backend["normalizer"]
        and not byte_level.get("add_prefix_space")
        and bool(pattern) != byte_level["use_regex"]
    )
    if not is_supported:
        raise NextwordError(
            f"{directory / 'tokenizer.json'}: llama.cpp does not support the pre-tokenization of this tokenizer; nextword's "
            "own (--tokenizer bpe) and GPT-2's can be exported"
        )
    by_id = {id: token for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    special = set(tokenizer.special_tokens.values())
    tokens = [
        by_id.get(i, f"[unused{i}]") for i in range(size)
    ]  # the embedding may have more rows than the tokenizer tokens
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    types = [3 if i in special else 1 if i in by_id else 5 for i in range(size)]  # control, normal, unused
    return {"tokens": tokens, "types": types, "merges": merges, "pre": PRE_TOKENIZERS[pattern]}


def write_tokenizer_metadata(writer: Any, vocabulary: dict[str, Any], tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    end_of_turn = next((id for id in tokenizer.eos_ids if id != tokenizer.eos_id), None)
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
