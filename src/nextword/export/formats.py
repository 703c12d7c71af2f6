"""Export to GGUF, for llama.cpp, and to ONNX, for ONNX Runtime, and the verification of the files.

The runtime, if it is installed, reads a file back, and its output is compared with the model's: the logits at every position
of two sequences, random tokens and a greedy continuation by the model. If they agree within a tolerance, greedy decoding can
differ only where two tokens are equally likely to within twice the tolerance.
"""

import contextlib
import json
import logging
import math
import random
import subprocess
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nextword.common import fs
from nextword.common.errors import MissingDependencyError, NextwordError, import_optional
from nextword.common.limited_process import call_in_process
from nextword.data.tokenizer import PRETOKENIZE_PATTERNS, WHOLE_WORD_PATTERNS, Tokenizer
from nextword.inference.engine import Engine, check_tokenizer
from nextword.inference.quantization import GROUP_SIZE, Precision, precision_for
from nextword.inference.sampling import Sampling
from nextword.model.config import Family, ModelConfig
from nextword.model.gpt import GPT, sinusoidal_table
from nextword.model.hf import load_model
from nextword.pipeline.language_model import resolve_model_dir

TOLERANCE = 1e-3  # of logits, and of log-probabilities in nats
MAX_SEQUENCE_TOKENS = 512  # runtimes keep the logits of the whole sequence
MAX_GREEDY_TOKENS = 200
NUM_LINES = 1000
TEST_PHRASES: str = (
    "The house on the hill isn't sold¦Wër, ñu ngi dem ca àll ba¦Ο ήλιος λάμπει σήμερα¦Сегодня идёт дождь¦الطقس جميل اليوم¦"
    "השמש זורחת¦आज मौसम अच्छा है¦今天天气很好¦今日はいい天気です¦오늘은 비가 와요¦วันนี้อากาศดี¦დღეს მზიანი დღეა¦Այսօր արև է¦"
    "ዛሬ ፀሐይ ነው¦1,234.56 + 7890 = 9124¦👩‍👩‍👧 🇲🇳 é e\u0301¦if x != y:\n\treturn {'a': [1]}¦  \n\n ¦<|endoftext|>¦...?!¦"
    "Don't WE'LL they've"
)
OPSET_VERSION = 18
MAX_TEMPLATE_BYTES = 2**20
MAX_FILE_BYTES = 2**31 - 2**20  # a single ONNX file is limited to 2 GiB
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
PRE_TOKENIZERS = {PRETOKENIZE_PATTERNS: "qwen35", WHOLE_WORD_PATTERNS: "viking", (): "gpt-2"}


@dataclass(frozen=True)
class ExportResult:
    """An exported file.

    Attributes:
        runtime: the library that verified the file, or that can.
        max_difference: the largest difference of its output from the model's; None if the library is not installed.
    """

    file: Path
    runtime: str
    max_difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON can hold it."""
        size = self.file.stat().st_size
        return {"file": str(self.file), "bytes": size, "reader": self.runtime, "difference": self.max_difference}

    def __str__(self) -> str:
        if self.max_difference is None:
            verification = f"not verified: install {self.runtime} and export again"
        else:
            verification = f"verified with {self.runtime}, largest difference {self.max_difference:.0e}"
        return f"{self.file}: {self.file.stat().st_size:,} bytes; {verification}"


def open_language_model(model: str | Path, file_format: str) -> tuple[Path, GPT, Tokenizer]:
    """The directory, the model in float32 and the tokenizer. Raises `NextwordError` for a classifier."""
    directory = resolve_model_dir(model)
    gpt, tokenizer = load_model(directory).eval().float(), Tokenizer.open(directory)
    check_tokenizer(gpt, tokenizer)
    if gpt.config.n_labels:
        raise NextwordError(f"{directory}: a classifier, and only language models are exported to {file_format}")
    return directory, gpt, tokenizer


@contextlib.contextmanager
def temp_output(out: Path) -> Generator[Path]:
    """A temporary path that is moved to `out` at the end of the block, or removed if the block fails."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with fs.map_disk_errors(out):
            yield partial
            fs.fsync_path(partial)
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- GGUF


def write_gguf(
    model: str | Path, out: str | Path, precision: Precision = "float32", tolerance: float = TOLERANCE
) -> ExportResult:
    """Export a model directory to one GGUF file, verified with llama.cpp if it is installed.

    Verification needs float32: with quantized weights llama.cpp quantizes activations too. A quantized file is therefore
    verified in float32 first.

    Args:
        model: a model or run directory.
        out: the file.
        precision: of the matrices (int8 as Q8_0, int4 as Q4_0).
        tolerance: the largest accepted difference of log-probabilities in nats.

    Raises:
        NextwordError: llama.cpp does not support the architecture or the tokenizer, or verification fails.
        MissingDependencyError: `gguf` is not installed.
    """
    gguf, out = import_optional("gguf", "--to gguf", "gguf"), Path(out)
    directory, gpt, tokenizer = open_language_model(model, "GGUF")
    family = gpt.config.family
    if family not in ARCHITECTURES:
        message = f"llama.cpp has no architecture for {family} (post-norm); it has gpt2 and modern"
        raise NextwordError(f"{directory}: {message}")
    template = directory / "chat_template.jinja"
    metadata = {
        "name": directory.resolve().name,
        **model_metadata(gpt.config),
        **tokenizer_metadata(directory, tokenizer, gpt.config.vocab_size),
        "chat_template": fs.read_text(template, MAX_TEMPLATE_BYTES) if template.is_file() else None,
    }

    def write_file(file: Path, precision: Precision) -> None:
        writer = gguf.GGUFWriter(file, family)
        for name, value in metadata.items():
            if value is not None:
                getattr(writer, f"add_{name}")(value)
        for name, tensor in gguf_tensors(gpt):
            ggml_type = gguf.GGMLQuantizationType[GGML_TYPES[tensor_precision(name, tensor, precision)]]
            array = np.ascontiguousarray(tensor.detach().numpy())
            writer.add_tensor(name, gguf.quants.quantize(array, ggml_type), raw_dtype=ggml_type)
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
    parameters: dict[str, Tensor] = {**dict(gpt.named_parameters())}
    if config.positions == "sinusoidal":
        parameters["position_embedding.weight"] = sinusoidal_table(config.context_length, config.d_model)
    skipped = ("attn_q", "attn_k", "attn_v") if config.family == "gpt2" else ("attn_qkv",)
    block_names = {name: sources for name, sources in TENSOR_NAMES.items() if name not in skipped}
    names = {"token_embd": ["token_embedding"], "position_embd": ["position_embedding"]}
    for i in range(config.n_layers):
        for name, sources in block_names.items():
            names[f"blk.{i}.{name}"] = [f"blocks.{i}.{source}" for source in sources]
    for name, sources in {**names, "output_norm": ["final_norm"], "output": ["head"]}.items():
        weights, biases = (
            [parameters[key] for source in sources if (key := f"{source}.{suffix}") in parameters]
            for suffix in ("weight", "bias")
        )
        if weights:
            weight = torch.cat(weights)
            if config.family == "llama" and name.endswith(("attn_q", "attn_k")):
                weight = permute_rope(weight, config.head_dim)
            yield f"{name}.weight", weight
            if biases:
                yield f"{name}.bias", torch.cat(biases)
            elif config.family == "gpt2" and name.startswith("blk."):  # this architecture requires biases
                yield f"{name}.bias", torch.zeros(len(weight))


def permute_rope(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a query or key matrix of Llama for GGUF: rotated pairs are adjacent there, not half a head apart."""
    return weight.view(-1, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """Metadata of the model, by the name of the writer's method `add_NAME`."""
    metadata = {
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "block_count": config.n_layers,
        "head_count": config.n_heads,
    }
    if config.norm == "layernorm":
        return metadata | {"layer_norm_eps": config.norm_eps}
    return metadata | {
        "head_count_kv": config.n_kv_heads,
        "layer_norm_rms_eps": config.norm_eps,
        "rope_freq_base": config.rope_theta,
        "rope_dimension_count": config.head_dim,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }


def tokenizer_metadata(directory: Path, tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Metadata of the tokenizer, by the name of the writer's method `add_NAME`. None is left out.

    Args:
        directory: the model directory, for error messages.
        tokenizer: the tokenizer.
        size: the number of rows of the embedding, which may be more than the tokenizer has tokens.

    Raises:
        NextwordError: the tokenizer is not a byte-level BPE that llama.cpp supports.
    """
    backend: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    pre_tokenizer: dict[str, Any] = backend["pre_tokenizer"] or {}
    steps: list[dict[str, Any]] = [step for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if step]
    patterns = tuple(step["pattern"].get("Regex") for step in steps if step["type"] == "Split")
    byte_level = {key: value for step in steps if step["type"] == "ByteLevel" for key, value in step.items()}
    is_supported = (
        backend["model"]["type"] == "BPE"
        and byte_level
        and {step["type"] for step in steps} <= {"Split", "ByteLevel"}
        and patterns in PRE_TOKENIZERS
        and not backend["normalizer"]
        and not byte_level.get("add_prefix_space")
        and bool(patterns) != byte_level["use_regex"]
    )
    if tokenizer.normalization != "none":
        raise NextwordError(
            f"{directory / 'tokenizer.json'}: llama.cpp does not normalize text to NFC, as this tokenizer does; a model "
            "of text that was prepared without --normalize can be exported"
        )
    if not is_supported:
        raise NextwordError(
            f"{directory / 'tokenizer.json'}: llama.cpp does not support the pre-tokenization of this tokenizer; nextword's "
            "own (--tokenizer bpe) and GPT-2's can be exported"
        )
    by_id = {id: token for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    special = set(tokenizer.special_tokens.values())
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": PRE_TOKENIZERS[patterns],
        "token_list": [by_id.get(i, f"[unused{i}]") for i in range(size)],
        "token_types": [3 if i in special else 1 if i in by_id else 5 for i in range(size)],  # control, normal, unused
        "token_merges": [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]],
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "add_bos_token": tokenizer.bos_id is not None,
        "pad_token_id": tokenizer.pad_id,
        "eot_token_id": next((id for id in tokenizer.eos_ids if id != tokenizer.eos_id), None),
    }


# ---------------------------------------------------------------- ONNX


class LogitsModel(nn.Module):
    """input_ids [B, T] → logits [B, T, V]."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the logits."""
        return self.gpt.unembed(self.gpt(input_ids))


def write_onnx(model: str | Path, out: str | Path, tolerance: float = TOLERANCE) -> ExportResult:
    """Export a model directory to one ONNX file, verified with ONNX Runtime if it is installed.

    The graph maps `input_ids`, int64 [batch, sequence], to `logits`, float32 [batch, sequence, vocabulary], for any batch
    size and up to the context length.

    Args:
        model: a model or run directory.
        out: the file.
        tolerance: the largest accepted difference of logits.

    Raises:
        NextwordError: the model is a classifier or too large for one file, or verification fails.
        MissingDependencyError: `onnx` or `onnxscript` is not installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise MissingDependencyError("--to onnx", "onnx")
    out = Path(out)
    directory, gpt, tokenizer = open_language_model(model, "ONNX")
    if (size := 4 * sum(parameter.numel() for parameter in gpt.parameters())) > MAX_FILE_BYTES:
        raise NextwordError(f"{directory}: the weights take {size:,} bytes, but an ONNX file is limited to 2 GiB")
    context_length = gpt.config.context_length
    shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=context_length)}
    example = torch.zeros(2, min(2, context_length), dtype=torch.int64)
    with temp_output(out) as partial:
        # The exporter warns of optional packages and deprecated PyTorch calls.
        with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as stack:
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
            program: Any = torch.onnx.export(  # pyright: ignore[reportUnknownMemberType]  # partly annotated
                LogitsModel(gpt).eval(),
                (example,),
                dynamo=True,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": shape},
                opset_version=OPSET_VERSION,
                verbose=False,
            )
        for node in program.model.graph.all_nodes():  # remove source lines and local paths
            node.metadata_props.clear()
        program.save(partial, external_data=False)
        can_verify = find_spec("onnxruntime") is not None
        difference = verify_with_onnxruntime(partial, gpt, tokenizer, tolerance) if can_verify else None
        return ExportResult(out, "onnxruntime", difference)


# ---------------------------------------------------------------- verification


class HalfPrecisionGELU(TorchFunctionMode):
    """A mode in which GELU is computed as by llama.cpp on a CPU: with a table of half-precision numbers between −10 and 10
    (`ggml_vec_gelu_f32` with GGML_GELU_FP16)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.gelu:
            return output
        rounded = func(args[0].half().float(), **(kwargs or {})).half().float()
        return torch.where(args[0] <= -10, 0.0, torch.where(args[0] >= 10, args[0], rounded))


def verify_with_llama_cpp(file: Path, gpt: GPT, tokenizer: Tokenizer, tolerance: float = TOLERANCE) -> float:
    """The largest difference of log-probabilities in llama.cpp with a float32 KV cache.

    Raises:
        NextwordError: the difference is above `tolerance`, or llama.cpp tokenizes a text differently. The message says so
            if the half-precision GELU of llama.cpp explains the difference.
    """
    sequences, lines = sample_sequences(gpt, tokenizer), sample_lines(NUM_LINES)
    line_tokens, sequence_logits = read_with_llama_cpp(file, lines, sequences)
    for line, tokens in zip(lines, line_tokens, strict=True):
        if tokens != tokenizer.encode(line):
            message = f"llama.cpp tokenizes {line!r} differently from the model's tokenizer"
            raise NextwordError(f"{message}; nothing was written")
    difference = rounded_difference = 0.0
    for ids, logits in zip(sequences, sequence_logits, strict=True):
        actual = torch.tensor(logits).log_softmax(-1)  # [T, V]
        expected = compute_logits(gpt, [ids])[0].log_softmax(-1)
        with HalfPrecisionGELU():
            rounded = compute_logits(gpt, [ids])[0].log_softmax(-1)
        difference = max(difference, max_abs_difference(expected, actual))
        rounded_difference = max(rounded_difference, max_abs_difference(rounded, actual))
    if difference > tolerance >= rounded_difference:
        digit = 10.0 ** math.floor(math.log10(difference))
        raise NextwordError(
            f"the log-probabilities in llama.cpp differ from the model's by {difference:.1e}, more than {tolerance:g}, because "
            f"it rounds GELU to half precision on a CPU (otherwise they differ by {rounded_difference:.0e}). Nothing was "
            f"written; --tolerance {math.ceil(difference / digit) * digit:.0e} accepts it; the preset modern has no GELU"
        )
    return check_within(difference, "llama.cpp", tolerance)


def read_with_llama_cpp(
    file: Path, lines: Sequence[str], sequences: Sequence[list[int]]
) -> tuple[list[list[int]], list[np.ndarray]]:
    """The tokens of every line, and the logits [T, V] of every sequence, computed by llama.cpp in a process of its own.

    Raises:
        NextwordError: the process fails; llama.cpp may be built for instructions that the machine does not permit.
    """
    out = file.with_name(f"{file.name}.npz")
    request = {"file": str(file), "lines": lines, "sequences": sequences, "out": str(out)}
    try:
        tokens: list[list[int]] = call_in_process(Path(__file__).with_name("llama_cpp_reader.py"), request)
        with np.load(out) as arrays:
            return tokens, list(arrays.values())
    except subprocess.CalledProcessError as error:
        last_lines = error.stderr.decode(errors="replace").splitlines()[-1:]
        raise NextwordError(
            f"llama.cpp could not read the file back (exit code {error.returncode}: {''.join(last_lines)[:300]}). "
            "Nothing was written. If a signal ended it (a negative code), build llama-cpp-python again for this processor, "
            "with CMAKE_ARGS=-DGGML_NATIVE=OFF; without the package the file is written and not verified"
        ) from error
    finally:
        out.unlink(missing_ok=True)


def verify_with_onnxruntime(file: Path, gpt: GPT, tokenizer: Tokenizer, tolerance: float = TOLERANCE) -> float:
    """The largest difference of logits in ONNX Runtime, for single sequences and a batch. Raises as `verify_with_llama_cpp`."""
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    sequences = sample_sequences(gpt, tokenizer)
    shortest = min(map(len, sequences))
    difference = 0.0
    for batch in [*([ids] for ids in sequences), [ids[:shortest] for ids in sequences]]:
        (actual,) = session.run(["logits"], {"input_ids": torch.tensor(batch).numpy()})
        difference = max(difference, max_abs_difference(compute_logits(gpt, batch), torch.tensor(actual)))
    return check_within(difference, "ONNX Runtime", tolerance)


def max_abs_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference; infinite if any is not a number."""
    return float((expected - actual).abs().max().nan_to_num(nan=math.inf, posinf=math.inf))


def check_within(difference: float, runtime: str, tolerance: float) -> float:
    """Return the difference. Raises `NextwordError` if it is above the tolerance."""
    if difference > tolerance:
        raise NextwordError(
            f"the exported file does not match the model: in {runtime} its output differs by {difference:.2g}, more than the "
            f"tolerance {tolerance:g}. Nothing was written; please report this, with the versions of {runtime} and nextword"
        )
    return difference


@torch.inference_mode()
def compute_logits(gpt: GPT, batch: list[list[int]]) -> Tensor:
    """The model's logits [B, T, V]."""
    return gpt.unembed(gpt(torch.tensor(batch)))


def sample_sequences(gpt: GPT, tokenizer: Tokenizer) -> list[list[int]]:
    """Two token sequences: as many random tokens as fit, and the greedy continuation of the first of them."""
    length = min(gpt.config.context_length, MAX_SEQUENCE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(tokenizer.vocab_size, (length,), generator=generator).numpy().tolist()
    sampling = Sampling(temperature=0, max_tokens=min(MAX_GREEDY_TOKENS, length - 1))
    [completion] = Engine(gpt, tokenizer).generate([ids[:1]], sampling)
    return [ids, [*ids[:1], *completion.tokens]]


def sample_lines(count: int) -> list[str]:
    """Lines of text in many scripts: the test phrases, and random combinations of two to six of them."""
    rng = random.Random(0)
    phrases = TEST_PHRASES.split("¦")
    separators = ("", " ", "  ", "\n", ", ")
    num_mixed = count - len(phrases)
    return phrases + [rng.choice(separators).join(rng.sample(phrases, rng.randint(2, 6))) for _ in range(num_mixed)]
