"""Whether an exported file is the model: the program that it is for reads it back before it is left anywhere.

Numbers are compared at every position of two texts: one that the model writes greedily, and one of random tokens. A greedy text
can then differ only where two tokens are as likely as each other, to within twice the tolerance.
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

TOLERANCE = 1e-3  # of logits and of log-probabilities in nats
MAX_SEQUENCE_TOKENS = 512  # tokens of a text that is compared; a reader keeps all its logits
MAX_GREEDY_TOKENS = 200
TEST_PHRASES = (
    "The house on the hill isn't sold", "Wër, ñu ngi dem ca àll ba", "Ο ήλιος λάμπει σήμερα", "Сегодня идёт дождь",
    "الطقس جميل اليوم", "השמש זורחת", "आज मौसम अच्छा है", "今天天气很好", "今日はいい天気です", "오늘은 비가 와요",
    "วันนี้อากาศดี", "დღეს მზიანი დღეა", "Այսօր արև է", "ዛሬ ፀሐይ ነው", "1,234.56 + 7890 = 9124", "👩‍👩‍👧 🇲🇳 é e\u0301",
    "if x != y:\n\treturn {'a': [1]}", "  \n\n ", "<|endoftext|>", "...?!", "Don't WE'LL they've",
)  # fmt: skip


@dataclass(frozen=True)
class ExportResult:
    """A file that was written, and what is known of it.

    Attributes:
        reader: the library that has read it, or that could.
        difference: of its numbers from the model's, the largest; None where the library is not installed.
    """

    file: Path
    runtime: str
    max_difference: float | None

    @property
    def summary(self) -> dict[str, Any]:
        size = self.file.stat().st_size
        return {"file": str(self.file), "bytes": size, "reader": self.runtime, "difference": self.max_difference}

    def __str__(self) -> str:
        if self.max_difference is None:
            verification = f"the proof that it says the same is owing: install {self.runtime} and export again"
        else:
            verification = f"read back by {self.runtime}, its numbers differ by {self.max_difference:.0e} at most"
        return f"{self.file}: {self.file.stat().st_size:,} bytes; {verification}"


@contextlib.contextmanager
def temp_output(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` at the end of the block, and nothing where the block fails."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with fs.map_disk_errors(out):
            yield partial
            fs.fsync_path(partial)
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


class HalfPrecisionGELU(TorchFunctionMode):
    """Inside, GELU is what llama.cpp has on a CPU: looked up in a table of half-precision numbers between −10 and 10
    (`ggml_vec_gelu_f32`, under GGML_GELU_FP16)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.gelu:
            return output
        rounded = func(args[0].half().float(), **(kwargs or {})).half().float()
        return torch.where(args[0] <= -10, 0.0, torch.where(args[0] >= 10, args[0], rounded))


def verify_with_llama_cpp(file: Path, gpt: GPT, tokenizer: Tokenizer, tolerance: float = TOLERANCE) -> float:
    """The largest difference of log-probabilities in llama.cpp, with keys and values in float32.

    Raises:
        NextwordError: it is above `tolerance`, or a line becomes other tokens there. Where the half-precision GELU of llama.cpp
            is all that differs, the message says so.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]

    length = min(gpt.config.context_length, MAX_SEQUENCE_TOKENS)
    float32_type = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        str(file), n_ctx=length, n_batch=length, n_gpu_layers=0, logits_all=True, type_k=float32_type, type_v=float32_type,
        flash_attn=False, verbose=False,
    )  # fmt: skip
    with contextlib.closing(llama):
        for line in sample_lines(1000):
            if llama.tokenize(line.encode(), add_bos=False, special=False) != tokenizer.encode(line):
                raise NextwordError(
                    f"llama.cpp makes other tokens of {line!r} than the model's tokenizer: no file is left"
                )
        max_difference = max_difference_half_gelu = 0.0
        for ids in sample_sequences(gpt, tokenizer, length):
            llama.reset()
            llama.eval(ids)
            llama_logits = torch.tensor(llama.scores[: len(ids)])  # [T, V]
            max_difference = max(
                max_difference,
                max_abs_difference(compute_logits(gpt, [ids])[0].log_softmax(-1), llama_logits.log_softmax(-1)),
            )
            with HalfPrecisionGELU():
                rounded = compute_logits(gpt, [ids])[0]
            max_difference_half_gelu = max(
                max_difference_half_gelu, max_abs_difference(rounded.log_softmax(-1), llama_logits.log_softmax(-1))
            )
    if max_difference > tolerance >= max_difference_half_gelu:
        digit = 10.0 ** math.floor(math.log10(max_difference))
        raise NextwordError(
            f"llama.cpp's log-probabilities would differ from the model's by {max_difference:.1e}, more than {tolerance:g}: on a CPU "
            f"it rounds GELU to half precision (without that they differ by {max_difference_half_gelu:.0e}). No file is left; --tolerance "
            f"{math.ceil(max_difference / digit) * digit:.0e} accepts it, and a model of the preset modern has no GELU"
        )
    return check_within(max_difference, "llama.cpp", tolerance)


def verify_with_onnxruntime(file: Path, gpt: GPT, tokenizer: Tokenizer, tolerance: float = TOLERANCE) -> float:
    """The largest difference of logits in ONNX Runtime, alone and in company. Raises `NextwordError` as `by_llama_cpp` does."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    texts = sample_sequences(gpt, tokenizer, min(gpt.config.context_length, MAX_SEQUENCE_TOKENS))
    shortest = min(map(len, texts))
    batches = [*([ids] for ids in texts), [ids[:shortest] for ids in texts]]  # alone, and together
    differences = [
        max_abs_difference(compute_logits(gpt, batch), torch.tensor(session.run(["logits"], {"input_ids": torch.tensor(batch).numpy()})[0]))
        for batch in batches
    ]  # fmt: skip
    return check_within(max(differences), "ONNX Runtime", tolerance)


def max_abs_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest of all; infinite where one is no number."""
    largest = float((expected - actual).abs().max())
    return largest if largest == largest else float("inf")


def check_within(max_difference: float, runtime: str, tolerance: float) -> float:
    """The difference itself. Raises `NextwordError` where it is more than rounding."""
    if max_difference > tolerance:
        raise NextwordError(
            f"the exported file is not the model: read back by {runtime}, its numbers differ by {max_difference:.2g}, and at most "
            f"{tolerance:g} is rounding. No file is left; please report this, with the versions of {runtime} and nextword"
        )
    return max_difference


@torch.inference_mode()
def compute_logits(gpt: GPT, batch: list[list[int]]) -> Tensor:
    """[B, T, V], by the model itself."""
    return gpt.unembed(gpt(torch.tensor(batch)))


def sample_sequences(gpt: GPT, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Token ids of two texts: of random tokens as long as `length`, and what the model writes after the first of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokenizer.vocab_size, (length,), generator=generator).tolist()
    count = min(MAX_GREEDY_TOKENS, length - 1)
    [completion] = Engine(gpt, tokenizer).generate([ids[:1]], Sampling(temperature=0, max_tokens=count))
    return [ids, [*ids[:1], *completion.tokens]]


def sample_lines(count: int) -> list[str]:
    """So many lines in the scripts of the world: the phrases themselves, then two to six of them put together."""
    rng = random.Random(0)
    mixed = (
        rng.choice(("", " ", "  ", "\n", ", ")).join(rng.sample(TEST_PHRASES, rng.randint(2, 6)))
        for _ in range(count - len(TEST_PHRASES))
    )
    return [*TEST_PHRASES, *mixed]
