"""A model directory is a stock Hugging Face directory: the tables of names and layouts, both ways.

`save_model` writes what `transformers.AutoModelForCausalLM` opens (with a classification head,
`AutoModelForSequenceClassification`); `load_model` opens what it wrote, and the directories of four stock families whoever
trained them. Only safetensors and JSON are read; nothing in a directory is ever run. What config.json says is in
stock_config.py.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextword.common.errors import CorruptFileError, NextwordError
from nextword.common.fs import MANIFEST, atomic_write, read_manifest, to_json, verify_manifest
from nextword.model.config import Family, ModelConfig
from nextword.model.gpt import GPT, sinusoidal_table
from nextword.model.hf_config import (
    parse_model_config,
    read_hf_config,
    read_json_object,
    to_hf_config,
    to_hf_label_config,
)
from nextword.model.hf_config import read_labels as read_labels

# ---------------------------------------------------------------- names
# Stock name → the names of ours that it holds, one below the other. "{i}" is the layer. Where the stock name ends in "ᵀ" the
# matrix is stored [in, out] (the `Conv1D` of GPT-1 and GPT-2) and ours, [out, in], is its transpose.

CONV1D_BLOCK = {
    "h.{i}.ln_1.{p}": ["blocks.{i}.attention_norm.{p}"],
    "h.{i}.attn.c_attn.weightᵀ": [f"blocks.{{i}}.attention.{n}.weight" for n in ("query", "key", "value")],
    "h.{i}.attn.c_attn.bias": [f"blocks.{{i}}.attention.{n}.bias" for n in ("query", "key", "value")],
    "h.{i}.attn.c_proj.weightᵀ": ["blocks.{i}.attention.output.weight"],
    "h.{i}.attn.c_proj.bias": ["blocks.{i}.attention.output.bias"],
    "h.{i}.ln_2.{p}": ["blocks.{i}.feed_forward_norm.{p}"],
    "h.{i}.mlp.c_fc.weightᵀ": ["blocks.{i}.feed_forward.up.weight"],
    "h.{i}.mlp.c_fc.bias": ["blocks.{i}.feed_forward.up.bias"],
    "h.{i}.mlp.c_proj.weightᵀ": ["blocks.{i}.feed_forward.down.weight"],
    "h.{i}.mlp.c_proj.bias": ["blocks.{i}.feed_forward.down.bias"],
}
LLAMA_BLOCK = {
    "layers.{i}.input_layernorm.weight": ["blocks.{i}.attention_norm.weight"],
    "layers.{i}.self_attn.q_proj.weight": ["blocks.{i}.attention.query.weight"],
    "layers.{i}.self_attn.k_proj.weight": ["blocks.{i}.attention.key.weight"],
    "layers.{i}.self_attn.v_proj.weight": ["blocks.{i}.attention.value.weight"],
    "layers.{i}.self_attn.o_proj.weight": ["blocks.{i}.attention.output.weight"],
    "layers.{i}.self_attn.q_norm.weight": ["blocks.{i}.attention.query_norm.weight"],
    "layers.{i}.self_attn.k_norm.weight": ["blocks.{i}.attention.key_norm.weight"],
    "layers.{i}.post_attention_layernorm.weight": ["blocks.{i}.feed_forward_norm.weight"],
    "layers.{i}.mlp.gate_proj.weight": ["blocks.{i}.feed_forward.gate.weight"],
    "layers.{i}.mlp.up_proj.weight": ["blocks.{i}.feed_forward.up.weight"],
    "layers.{i}.mlp.down_proj.weight": ["blocks.{i}.feed_forward.down.weight"],
}
LLAMA_NON_BLOCK = {"embed_tokens.weight": ["token_embedding.weight"], "norm.weight": ["final_norm.weight"]}
HF_NAME_TEMPLATES: dict[Family, dict[str, list[str]]] = {
    "gpt1": {
        "tokens_embed.weight": ["token_embedding.weight"],
        "positions_embed.weight": ["position_embedding.weight"],
        **CONV1D_BLOCK,
    },
    "gpt2": {
        "wte.weight": ["token_embedding.weight"],
        "wpe.weight": ["position_embedding.weight"],
        **CONV1D_BLOCK,
        "ln_f.{p}": ["final_norm.{p}"],
    },
    "qwen3": {**LLAMA_NON_BLOCK, **LLAMA_BLOCK},
    "llama": {**LLAMA_NON_BLOCK, **{name: ours for name, ours in LLAMA_BLOCK.items() if "_norm.weight" not in name}},
}
HF_PREFIXES: dict[Family, str] = {"gpt1": "transformer.", "gpt2": "transformer.", "qwen3": "model.", "llama": "model."}
MAX_HEADER_BYTES = 2**22  # bytes: some thirty thousand tensors
MAX_SHARD_BYTES = 5 * 10**9  # bytes of weights in one file
INDEX_FILENAME = "model.safetensors.index.json"
# Buffers that older files carry: causal masks and rotary frequencies, all of them computed here.
IGNORED_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def hf_name_map(config: ModelConfig) -> dict[str, list[str]]:
    """Every stock tensor of this model by its full name → the names of ours in it, in order."""
    table: dict[str, list[str]] = {}
    for stock, ours in HF_NAME_TEMPLATES[config.family].items():
        for i in range(config.n_layers) if "{i}" in stock else [0]:
            for p in ("weight", "bias") if "{p}" in stock else [""]:
                table[HF_PREFIXES[config.family] + stock.format(i=i, p=p)] = [name.format(i=i, p=p) for name in ours]
    if config.n_labels:  # these stock classes have no other head
        table["score.weight"] = ["score.weight"]
    elif not config.tied:
        table["lm_head.weight"] = ["head.weight"]
    return table


def to_hf(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the stock class's names and layouts; zeros where it has a bias that our mathematics has not."""
    return dict(iter_hf_tensors(config, weights, lambda tensor: tensor))


def iter_hf_tensors(
    config: ModelConfig, weights: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """As `to_stock`, one tensor after the other; each of ours is asked for by `gather` when its turn comes."""

    def ours(name: str) -> Tensor:
        if name in weights:
            return gather(weights[name])
        if name == "position_embedding.weight" and config.positions == "sinusoidal":
            return sinusoidal_table(config.context_length, config.d_model)
        weight = weights[name.replace(".bias", ".weight")]  # anything else missing is a KeyError, and a mistake of ours
        return torch.zeros(weight.shape[0], dtype=weight.dtype)

    for name, parts in hf_name_map(config).items():
        tensors = [ours(part) for part in parts]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        yield name.removesuffix("ᵀ"), (tensor.T if name.endswith("ᵀ") else tensor).contiguous()


def from_hf(
    config: ModelConfig, hf_name: str, our_names: list[str], tensor: Tensor, shapes: dict[str, torch.Size]
) -> dict[str, Tensor]:
    """One stock tensor taken apart into ours; what our mathematics has not (a zero bias, the position table) is left out."""
    oriented = tensor.T if hf_name.endswith("ᵀ") else tensor
    rows = [shapes[our][0] if our in shapes else 0 for our in our_names]
    if not any(rows):
        return {}
    return {our: part.contiguous() for our, part in zip(our_names, oriented.split(rows), strict=True) if our in shapes}


# ---------------------------------------------------------------- directories


def save_model(
    model: GPT,
    directory: Path,
    *,
    end_of_text_id: int | None = None,
    pad_token_id: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    gather: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write config.json, the weights and, for a language model, generation_config.json into an existing directory.

    The tokenizer's files and the seal are the caller's. Weights are written in float32. A model with a classification head
    is written without a language-model head of its own, which its stock class has no place for.

    Args:
        ends: the tokens that end a text in generation, where they are others or more than `end_of_text`.
        labels: the name of each output of a classification head, in order.
        problem_type: what the outputs are, in the stock classes' words: "regression", "single_label_classification" or
            "multi_label_classification".
        gather: from a weight as the model has it to the whole of it; called for one after the other.

    Raises:
        ValueError: labels that do not fit the head, or a head without a pad token, by which its stock class finds the last
            token.
    """
    config = model.config
    if config.n_labels and pad_token_id is None:
        raise ValueError("a model with a classification head is saved with its pad token: its stock class needs one")
    hf_config = to_hf_config(config, end_of_text_id, pad_token_id) | to_hf_label_config(config, labels, problem_type)
    atomic_write(directory / "config.json", to_json(hf_config))
    for path in write_weights(directory, config, model.state_dict(), lambda tensor: gather(tensor).float().cpu()):
        shutil.copymode(directory / "config.json", path)  # which is made for its owner alone
    if config.n_labels:
        return
    stop_ids = [end_of_text_id] if eos_token_ids is None else list(eos_token_ids)
    eos = stop_ids if len(stop_ids) > 1 else next(iter(stop_ids), None)
    generation = {"bos_token_id": end_of_text_id, "eos_token_id": eos, "pad_token_id": pad_token_id, "do_sample": True}
    atomic_write(directory / "generation_config.json", to_json(generation))


def write_weights(
    directory: Path, config: ModelConfig, weights: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> list[Path]:
    """Write model.safetensors, or of a large model several files under an index, as the stock classes do; those files. No more
    than one of them is held in memory."""
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    file_indices: dict[str, int] = {}  # of each tensor the file
    size = total = 0

    def flush_shard() -> None:
        files.append(directory / f".{len(files)}.safetensors")
        save_file(shard, files[-1], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in iter_hf_tensors(config, weights, gather):
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            flush_shard()
            size = 0
        shard[name], file_indices[name] = tensor, len(files)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush_shard()
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        index = {name: names[place] for name, place in file_indices.items()}
        atomic_write(directory / INDEX_FILENAME, to_json({"metadata": {"total_size": total}, "weight_map": index}))
    return [path.rename(directory / name) for path, name in zip(files, names, strict=True)]


def load_model(directory: Path, device: torch.device | str = "cpu") -> GPT:
    """Open a stock directory, ours (checked against its manifest) or anybody's; float32, ready to use.

    Raises:
        CorruptFile: a hash, a shape or a file that is not as it should be.
        NextwordError: no model here, or one with something that nextword does not do, by name.
    """
    config = load_config(directory, verify_manifest)
    return GPT.from_weights(config, dict(iter_weights(directory, config))).to(device)


def load_config(directory: Path, load_manifest: Callable[[Path], dict[str, Any]] = read_manifest) -> ModelConfig:
    """What a directory says of its model's shape. Raises as `load_model`."""
    if not (directory / "config.json").is_file():
        raise NextwordError(f"{directory}: no config.json, so this is no model directory")
    config = read_hf_config(directory / "config.json")
    if (directory / MANIFEST).is_file():
        metadata = load_manifest(directory)
        if "model" in metadata:  # what the stock format has no place for: the sinusoids, and biases that do not exist
            try:
                config = parse_model_config(metadata["model"])
            except (ValueError, TypeError, OverflowError) as error:
                raise CorruptFileError(f"{directory / MANIFEST}: {error}") from error
            config = replace(config, tied=config.tied or config.n_labels > 0)  # as in `read_stock_config`
    return config


def weight_shapes(directory: Path, config: ModelConfig, n_tensors: int) -> dict[str, torch.Size]:
    """The shape of every tensor of ours, from one layer, which the others are like.

    A config.json may say any number of layers, and even a model without numbers takes time for each: so what the files hold
    is counted first.

    Raises:
        CorruptFile: more layers than a directory of `n_tensors` tensors can have, or sizes that no tensor can have.
    """
    try:
        one_layer_weights = GPT.on_meta(replace(config, n_layers=1)).state_dict()
    except RuntimeError as error:  # torch's: more bytes than a number of bytes can be
        raise CorruptFileError(f"{directory}: its sizes are larger than any model's") from error
    block = [
        stock
        for stock, ours in HF_NAME_TEMPLATES[config.family].items()
        if ours[0].format(i=0, p="weight") in one_layer_weights
    ]
    if config.n_layers * sum("{i}" in stock for stock in block) > n_tensors:
        raise CorruptFileError(
            f"{directory}: config.json says {config.n_layers:,} layers, of which a tensor is missing: {n_tensors:,} are here"
        )
    shapes = {}
    for name, tensor in one_layer_weights.items():
        layers = range(config.n_layers) if name.startswith("blocks.0.") else [0]
        shapes |= {name.replace("blocks.0.", f"blocks.{i}.", 1): tensor.shape for i in layers}
    return shapes


def check_header(path: Path) -> None:
    """A safetensors file says first how long its header is. Raises `CorruptFile` where that cannot be so, before it is read."""
    if not path.is_file():
        raise CorruptFileError(f"{path}: missing, or no file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise CorruptFileError(
            f"{path}: not a safetensors file (a header of {length:,} bytes, in a file of {path.stat().st_size:,})"
        )


def find_weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file that has it, in one file or in shards under an index."""
    index = directory / INDEX_FILENAME
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CorruptFileError(f"{index}: weight_map does not give a file name for each tensor")
        files = sorted(set(weight_map.values()))
        if outside := [name for name in files if Path(name).name != name]:
            raise CorruptFileError(f"{index}: {outside[0]!r} is no file of this directory")
    elif (directory / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        other = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
        hint = f"; {other[0]} is a pickle, which nextword does not open: convert it to safetensors" if other else ""
        raise NextwordError(f"{directory}: no model.safetensors{hint}")
    paths = {}
    for name in files:
        check_header(directory / name)
        try:
            with safe_open(directory / name, framework="pt") as file:
                paths.update(dict.fromkeys(file.keys(), directory / name))
        except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
            raise CorruptFileError(f"{directory / name}: not a safetensors file ({error})") from error
    return paths


def load_shards(directory: Path, kind: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint's "weights" or "optimizer": of one file, or put together from the parts of several processes,
    each of which says where in the whole tensor it begins; at its beginning, where a file says nothing."""
    shards: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(directory.glob(f"{kind}*.safetensors")):
        with safe_open(path, framework="pt", device=str(device)) as file:
            sharding_info = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                offsets = sharding_info[name]["saved_offsets"] if name in sharding_info else [0] * tensor.ndim
                shards.setdefault(name, []).append((offsets, tensor))
    return {name: assemble_shards(found) for name, found in shards.items()}


def assemble_shards(shards: list[tuple[list[int], Tensor]]) -> Tensor:
    """A tensor of parts, each with the place where it begins in every dimension."""
    if len(shards) == 1:
        return shards[0][1]
    shard_ends = [[begin + length for begin, length in zip(begins, part.shape, strict=True)] for begins, part in shards]
    tensor = shards[0][1].new_empty([max(end) for end in zip(*shard_ends, strict=True)])
    for (begins, part), end in zip(shards, shard_ends, strict=True):
        tensor[tuple(slice(*both) for both in zip(begins, end, strict=True))] = part
    return tensor


def iter_weights(directory: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors out of a directory's files, in float32, one after the other. Every shape is checked in its file's header
    before the tensor is read. Raises as `load_model`."""
    sources = find_weight_files(directory)
    shapes = weight_shapes(directory, config, len(sources))
    prefix = HF_PREFIXES[config.family]
    table = hf_name_map(config)
    known = {name.removesuffix("ᵀ") for name in table} | {name.removesuffix("ᵀ").removeprefix(prefix) for name in table}
    known |= {"lm_head.weight"}  # a tied head may be written out as well
    unexpected = [name for name in sources if name not in known and not name.endswith(IGNORED_BUFFERS)]
    if unexpected:
        raise NextwordError(
            f"{directory}: tensors that this kind of model does not have: {', '.join(sorted(unexpected)[:5])}"
        )
    for name, ours in table.items():
        stock = name.removesuffix("ᵀ")
        bare = stock.removeprefix(prefix)  # the base model alone is saved without the prefix
        key = stock if stock in sources else bare
        if key not in sources:
            if any(our in shapes for our in ours) or "position_embedding.weight" in ours:  # which the sinusoids fill
                raise CorruptFileError(f"{directory}: the tensor {stock} is missing")
            continue
        expected = expected_shape(config, name, ours, shapes)
        with safe_open(sources[key], framework="pt") as file:
            tensor_slice = file.get_slice(key)
            if list(tensor_slice.get_shape()) != expected:
                raise CorruptFileError(
                    f"{sources[key]}: {key} has the shape {tensor_slice.get_shape()}; config.json says {expected}"
                )
            if tensor_slice.get_dtype() not in ("F32", "F16", "BF16", "F64"):
                raise NextwordError(
                    f"{sources[key]}: {key} holds {tensor_slice.get_dtype()}, which nextword does not open"
                )
            yield from from_hf(config, name, ours, tensor_slice[:].float(), shapes).items()


def expected_shape(config: ModelConfig, hf_name: str, our_names: list[str], shapes: dict[str, torch.Size]) -> list[int]:
    """The shape a stock tensor must have for the model that config.json describes."""
    if not any(our in shapes for our in our_names):
        if "positions_embed" in hf_name or "wpe" in hf_name:
            return [config.context_length, config.d_model]
        return [sum(shapes[our.replace(".bias", ".weight")][0] for our in our_names)]
    shape = [sum(shapes[our][0] for our in our_names), *shapes[our_names[0]][1:]]
    return shape[::-1] if hf_name.endswith("ᵀ") else shape
