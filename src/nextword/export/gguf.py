"""A model as one GGUF file, for llama.cpp and everything that is built on it.

The model directory stays the one source; what is written here is a copy, whole or in fewer bits.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import MissingDependencyError, NextwordError
from nextword.data.tokenizer import PRETOKENIZE_PATTERN, Tokenizer
from nextword.export.verification import TOLERANCE, ExportResult, temp_output, verify_with_llama_cpp
from nextword.inference.quantization import GROUP_SIZE, Precision, precision_for
from nextword.model.config import Family, ModelConfig
from nextword.model.gpt import GPT, sinusoidal_table
from nextword.model.hf import load_model
from nextword.pipeline.base_model import resolve_model_dir

ARCHITECTURES: dict[Family, str] = {"gpt2": "gpt2", "qwen3": "qwen3", "llama": "llama"}
GGML_TYPES: dict[Precision, str] = {"float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
# Names in GGUF → ours, one below the other. "{i}" is the layer.
COMMON_TENSOR_NAMES = {
    "attn_norm": ["attention_norm"],
    "attn_output": ["attention.output"],
    "ffn_norm": ["feed_forward_norm"],
    "ffn_up": ["feed_forward.up"],
    "ffn_down": ["feed_forward.down"],
}
SPLIT_QKV_TENSOR_NAMES = {"attn_q": ["attention.query"], "attn_k": ["attention.key"], "attn_v": ["attention.value"]}
TENSOR_NAMES: dict[Family, dict[str, list[str]]] = {
    "gpt2": {**COMMON_TENSOR_NAMES, "attn_qkv": ["attention.query", "attention.key", "attention.value"]},
    "llama": {**COMMON_TENSOR_NAMES, **SPLIT_QKV_TENSOR_NAMES, "ffn_gate": ["feed_forward.gate"]},
    "qwen3": {
        **COMMON_TENSOR_NAMES, **SPLIT_QKV_TENSOR_NAMES, "ffn_gate": ["feed_forward.gate"], "attn_q_norm": ["attention.query_norm"],
        "attn_k_norm": ["attention.key_norm"],
    },
}  # fmt: skip
# What llama.cpp calls the expressions by which a text is cut into words.
PRE_TOKENIZERS = {PRETOKENIZE_PATTERN: "qwen35", "": "gpt-2"}


def write_gguf(
    model: str | Path, out: str | Path, precision: Precision = "float32", tolerance: float = TOLERANCE
) -> ExportResult:
    """Write a model directory as one GGUF file, its matrices in a precision (int8 as Q8_0, int4 as Q4_0).

    What llama.cpp makes of it is compared with the model in float32, in which the two can be equal: with fewer bits llama.cpp
    rounds not only the weights. So where it is installed, a file with fewer bits is first written whole.

    Raises:
        NextwordError: llama.cpp has no such architecture, cannot cut text as the model's tokenizer does, or reads something
            else from the file.
        MissingExtra: the package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("--to gguf", "gguf") from error
    directory, out = resolve_model_dir(model), Path(out)
    gpt, tokenizer = load_model(directory).eval().float(), Tokenizer.open(directory)
    family = gpt.config.family
    if family not in ARCHITECTURES:
        raise NextwordError(
            f"{directory}: llama.cpp has no architecture for {family} (post-norm); gpt2 and modern have one"
        )
    if gpt.config.n_labels:
        raise NextwordError(f"{directory}: a classifier, and GGUF is for models that write; predict with nextword")
    vocabulary = gguf_vocabulary(directory, tokenizer, gpt.config.vocab_size)

    def write_file(file: Path, precision: Precision) -> None:
        writer = gguf.GGUFWriter(file, ARCHITECTURES[family])
        write_model_metadata(writer, gpt.config, directory.resolve().name)
        write_tokenizer_metadata(writer, vocabulary, tokenizer)
        if (template := directory / "chat_template.jinja").is_file():
            writer.add_chat_template(template.read_text(encoding="utf-8"))
        for name, tensor in gguf_tensors(gpt).items():
            ggml_type = gguf.GGMLQuantizationType[GGML_TYPES[tensor_precision(name, tensor, precision)]]
            array = np.ascontiguousarray(tensor.detach().numpy())
            data = array if ggml_type == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(array, ggml_type)
            writer.add_tensor(name, data, raw_dtype=ggml_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    with temp_output(out) as partial:
        max_difference = None
        if find_spec("llama_cpp"):
            write_file(partial, "float32")
            max_difference = verify_with_llama_cpp(partial, gpt, tokenizer, tolerance)
        if max_difference is None or precision != "float32":
            write_file(partial, precision)
        return ExportResult(out, "llama-cpp-python", max_difference)


def tensor_precision(name: str, tensor: Tensor, precision: Precision) -> Precision:
    """Matrices of whole groups in the precision; norms, biases and positions as they are."""
    if tensor.ndim != 2 or tensor.shape[1] % GROUP_SIZE or name == "position_embd.weight":
        return "float32"
    return precision_for(precision, name.startswith("blk."))


def gguf_tensors(gpt: GPT) -> dict[str, Tensor]:
    """The model's tensors under llama.cpp's names."""
    config = gpt.config
    parameters: dict[str, Tensor] = {name: parameter for name, parameter in gpt.named_parameters()}  # noqa: C416
    tensors: dict[str, Tensor] = {"token_embd.weight": parameters["token_embedding.weight"]}
    if config.positions == "sinusoidal":
        tensors["position_embd.weight"] = sinusoidal_table(config.context_length, config.d_model)
    elif config.positions == "learned":
        tensors["position_embd.weight"] = parameters["position_embedding.weight"]
    for i in range(config.n_layers):
        for name, source_names in TENSOR_NAMES[config.family].items():
            for suffix in ("weight", "bias"):
                source_tensors = [parameters.get(f"blocks.{i}.{part}.{suffix}") for part in source_names]
                if any(tensor is not None for tensor in source_tensors):
                    tensors[f"blk.{i}.{name}.{suffix}"] = torch.cat([t for t in source_tensors if t is not None])
                elif suffix == "bias" and config.family == "gpt2":  # the architecture always has one
                    rows = sum(parameters[f"blocks.{i}.{part}.weight"].shape[0] for part in source_names)
                    tensors[f"blk.{i}.{name}.{suffix}"] = torch.zeros(rows)
            if config.family == "llama" and name in ("attn_q", "attn_k"):
                tensors[f"blk.{i}.{name}.weight"] = permute_rope(tensors[f"blk.{i}.{name}.weight"], config.head_dim)
    for suffix in ("weight", "bias"):
        if f"final_norm.{suffix}" in parameters:
            tensors[f"output_norm.{suffix}"] = parameters[f"final_norm.{suffix}"]
    if not config.tied:
        tensors["output.weight"] = parameters["head.weight"]
    return tensors


def permute_rope(weight: Tensor, head_dim: int) -> Tensor:
    """Llama's queries and keys as GGUF has them: the pairs that a rotation turns stand side by side, not half a head apart."""
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
    """Tokens, their types and merges as llama.cpp takes them.

    Raises:
        NextwordError: the tokenizer is not a byte-level BPE that llama.cpp can follow.
    """
    backend = json.loads(tokenizer.backend.to_str())
    pre_tokenizer = backend["pre_tokenizer"] or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    expression = next((p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"), "")
    bytes_ = [p for p in parts if p.get("type") == "ByteLevel"]
    is_supported = backend["model"]["type"] == "BPE" and bytes_ and expression in PRE_TOKENIZERS
    if (
        not is_supported
        or backend["normalizer"]
        or bytes_[0].get("add_prefix_space")
        or bool(expression) == bytes_[0]["use_regex"]
    ):
        raise NextwordError(
            f"{directory / 'tokenizer.json'}: llama.cpp cannot cut text into words as this tokenizer does, so its "
            "tokens would be others; a tokenizer of nextword's (--tokenizer bpe) or GPT-2's can be exported"
        )
    by_id = {id: token for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    special = set(tokenizer.special_tokens.values())
    tokens = [by_id.get(i, f"[unused{i}]") for i in range(size)]  # ids that only the embedding has
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    types = [3 if i in special else 1 if i in by_id else 5 for i in range(size)]  # control, normal, unused
    return {"tokens": tokens, "types": types, "merges": merges, "pre": PRE_TOKENIZERS[expression]}


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
    turn_end = next((id for id in tokenizer.eos_ids if id != tokenizer.eos_id), None)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
