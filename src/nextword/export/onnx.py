"""A model as one ONNX file, for ONNX Runtime and what is built on it: token ids in, logits out.

PyTorch's own exporter writes the graph. It has no cache of keys and values, so it is for scoring texts, and for programs that
have no other way to run a model.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from nextword.common.errors import MissingDependencyError, NextwordError
from nextword.data.tokenizer import Tokenizer
from nextword.export.verification import TOLERANCE, ExportResult, temp_output, verify_with_onnxruntime
from nextword.model.gpt import GPT
from nextword.model.hf import load_model
from nextword.pipeline.base_model import resolve_model_dir

OPSET_VERSION = 18
MAX_FILE_BYTES = 2**31 - 2**20  # bytes; one file of this format has less than 2 GiB


class LogitsModel(nn.Module):
    """input_ids [B, T] → logits [B, T, V]."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.gpt.unembed(self.gpt(input_ids))


def write_onnx(model: str | Path, out: str | Path, tolerance: float = TOLERANCE) -> ExportResult:
    """Write a model directory as one ONNX file: `input_ids`, int64 [batch, sequence], to `logits`, float32
    [batch, sequence, vocabulary], for any batch and up to the context length.

    Raises:
        NextwordError: the model is a classifier or too large for one file, or ONNX Runtime reads something else from it.
        MissingExtra: the packages `onnx` and `onnxscript` are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("--to onnx", "onnx") from error
    directory, out = resolve_model_dir(model), Path(out)
    gpt, tokenizer = load_model(directory).eval().float(), Tokenizer.open(directory)
    if gpt.config.n_labels:
        raise NextwordError(f"{directory}: a classifier, and ONNX is for models that write; predict with nextword")
    if (size := 4 * sum(parameter.numel() for parameter in gpt.parameters())) > MAX_FILE_BYTES:
        raise NextwordError(f"{directory}: its weights take {size:,} bytes, and one ONNX file has less than 2 GiB")
    sizes = {"batch": None, "sequence": gpt.config.context_length}
    shape = {i: torch.export.Dim(name, min=1, max=most) for i, (name, most) in enumerate(sizes.items())}
    example = torch.zeros(2, min(2, gpt.config.context_length), dtype=torch.int64)
    with temp_output(out) as partial:
        with suppress_warnings():
            program = torch.onnx.export(
                LogitsModel(gpt).eval(), (example,), dynamo=True, input_names=["input_ids"], output_names=["logits"],
                dynamic_shapes={"input_ids": shape}, opset_version=OPSET_VERSION, verbose=False,
            )  # fmt: skip
        assert program is not None
        for node in program.model.graph.all_nodes():  # lines and paths of this program's source
            node.metadata_props.clear()
        program.save(partial, external_data=False)
        max_difference = (
            verify_with_onnxruntime(partial, gpt, tokenizer, tolerance) if find_spec("onnxruntime") else None
        )
        return ExportResult(out, "onnxruntime", max_difference)


@contextlib.contextmanager
def suppress_warnings() -> Iterator[None]:
    """Without the exporter's warnings: of packages that it looks for, and of PyTorch's own old calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
