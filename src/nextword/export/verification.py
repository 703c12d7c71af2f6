"""Verification of exported files: the target runtime reads a file back, and its output is compared with the model's.

Compared are the logits at every position of two sequences: random tokens, and a greedy continuation by the model. If they agree
within a tolerance, greedy decoding can differ only where two tokens are equally likely to within twice the tolerance.
"""

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nextword.common import fs
from nextword.common.errors import NextwordError
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT

TOLERANCE = 1e-3  # of logits, and of log-probabilities in nats
MAX_SEQUENCE_TOKENS = 512  # runtimes keep the logits of the whole sequence
MAX_GREEDY_TOKENS = 200
NUM_LINES = 1000
TEST_PHRASES = (
    "The house on the hill isn't sold¦Wër, ñu ngi dem ca àll ba¦Ο ήλιος λάμπει σήμερα¦Сегодня идёт дождь¦الطقس جميل اليوم¦"
    "השמש זורחת¦आज मौसम अच्छा है¦今天天气很好¦今日はいい天気です¦오늘은 비가 와요¦วันนี้อากาศดี¦დღეს მზიანი დღეა¦Այսօր արև է¦"
    "ዛሬ ፀሐይ ነው¦1,234.56 + 7890 = 9124¦👩‍👩‍👧 🇲🇳 é e\u0301¦if x != y:\n\treturn {'a': [1]}¦  \n\n ¦<|endoftext|>¦...?!¦"
    "Don't WE'LL they've"
)


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
        size = self.file.stat().st_size
        return {"file": str(self.file), "bytes": size, "reader": self.runtime, "difference": self.max_difference}

    def __str__(self) -> str:
        if self.max_difference is None:
            verification = f"not verified: install {self.runtime} and export again"
        else:
            verification = f"verified with {self.runtime}, largest difference {self.max_difference:.0e}"
        return f"{self.file}: {self.file.stat().st_size:,} bytes; {verification}"


@contextlib.contextmanager
def temp_output(out: Path) -> Iterator[Path]:
    """A temporary path that is moved to `out` at the end of the block, or removed if the block fails."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with fs.map_disk_errors(out):
            yield partial
            fs.fsync_path(partial)
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


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
    import llama_cpp  # pyright: ignore[reportMissingImports]  # an optional dependency

    length = min(gpt.config.context_length, MAX_SEQUENCE_TOKENS)
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    sizes = {"n_ctx": length, "n_batch": length, "n_gpu_layers": 0, "logits_all": True}
    llama = llama_cpp.Llama(str(file), **sizes, **cache, verbose=False)
    with contextlib.closing(llama):
        for line in sample_lines(NUM_LINES):
            if llama.tokenize(line.encode(), add_bos=False, special=False) != tokenizer.encode(line):
                raise NextwordError(
                    f"llama.cpp tokenizes {line!r} differently from the model's tokenizer; nothing was written"
                )
        difference = rounded_difference = 0.0
        for ids in sample_sequences(gpt, tokenizer, length):
            llama.reset()
            llama.eval(ids)
            actual = torch.tensor(llama.scores[: len(ids)]).log_softmax(-1)  # [T, V]
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


def verify_with_onnxruntime(file: Path, gpt: GPT, tokenizer: Tokenizer, tolerance: float = TOLERANCE) -> float:
    """The largest difference of logits in ONNX Runtime, for single sequences and a batch. Raises as `verify_with_llama_cpp`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    sequences = sample_sequences(gpt, tokenizer, min(gpt.config.context_length, MAX_SEQUENCE_TOKENS))
    shortest = min(map(len, sequences))
    difference = 0.0
    for batch in [*([ids] for ids in sequences), [ids[:shortest] for ids in sequences]]:
        (actual,) = session.run(["logits"], {"input_ids": torch.tensor(batch).numpy()})
        difference = max(difference, max_abs_difference(compute_logits(gpt, batch), torch.tensor(actual)))
    return check_within(difference, "ONNX Runtime", tolerance)


def max_abs_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference; infinite if any is not a number."""
    largest = float((expected - actual).abs().max())
    return largest if largest == largest else float("inf")


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


def sample_sequences(gpt: GPT, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Two token sequences: `length` random tokens, and the greedy continuation of the first of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokenizer.vocab_size, (length,), generator=generator).tolist()
    sampling = Sampling(temperature=0, max_tokens=min(MAX_GREEDY_TOKENS, length - 1))
    [completion] = Engine(gpt, tokenizer).generate([ids[:1]], sampling)
    return [ids, [*ids[:1], *completion.tokens]]


def sample_lines(count: int) -> list[str]:
    """Lines of text in many scripts: the test phrases, and random combinations of two to six of them."""
    rng, phrases = random.Random(0), TEST_PHRASES.split("¦")
    mixed = (
        rng.choice(("", " ", "  ", "\n", ", ")).join(rng.sample(phrases, rng.randint(2, 6)))
        for _ in range(count - len(phrases))
    )
    return [*phrases, *mixed]
