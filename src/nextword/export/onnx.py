"""Export to ONNX: token ids in, logits out, for ONNX Runtime and programs built on it.

PyTorch's exporter writes the graph. It has no KV cache: use it to score texts, or where nothing else runs a model.
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
from nextword.pipeline.language_model import resolve_model_dir

OPSET_VERSION = 18
MAX_FILE_BYTES = 2**31 - 2**20  # a single ONNX file is limited to 2 GiB


class LogitsModel(nn.Module):
    """input_ids [B, T] → logits [B, T, V]."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.gpt.unembed(self.gpt(input_ids))


def write_onnx(model: str | Path, out: str | Path, tolerance: float = TOLERANCE) -> ExportResult:
    """Export a model directory to one ONNX file, verified with ONNX Runtime if it is installed.

    The graph maps `input_ids`, int64 [batch, sequence], to `logits`, float32 [batch, sequence, vocabulary], for any batch
    size and up to the context length.

    Args:
        tolerance: the largest accepted difference of logits.

    Raises:
        NextwordError: the model is a classifier or too large for one file, or verification fails.
        MissingDependencyError: `onnx` or `onnxscript` is not installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise MissingDependencyError("--to onnx", "onnx")
    directory, out = resolve_model_dir(model), Path(out)
    gpt, tokenizer = load_model(directory).eval().float(), Tokenizer.open(directory)
    if gpt.config.n_labels:
        raise NextwordError(f"{directory}: a classifier, and only language models are exported to ONNX")
    if (size := 4 * sum(parameter.numel() for parameter in gpt.parameters())) > MAX_FILE_BYTES:
        raise NextwordError(f"{directory}: the weights take {size:,} bytes, but an ONNX file is limited to 2 GiB")
    context_length = gpt.config.context_length
    shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=context_length)}
    example = torch.zeros(2, min(2, context_length), dtype=torch.int64)
    with temp_output(out) as partial:
        with suppress_warnings():
            program = torch.onnx.export(
                LogitsModel(gpt).eval(),
                (example,),
                dynamo=True,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": shape},
                opset_version=OPSET_VERSION,
                verbose=False,
            )
        assert program is not None
        for node in program.model.graph.all_nodes():  # remove source lines and local paths
            node.metadata_props.clear()
        program.save(partial, external_data=False)
        can_verify = find_spec("onnxruntime") is not None
        difference = verify_with_onnxruntime(partial, gpt, tokenizer, tolerance) if can_verify else None
        return ExportResult(out, "onnxruntime", difference)


@contextlib.contextmanager
def suppress_warnings() -> Iterator[None]:
    """Hide the exporter's warnings about optional packages and deprecated PyTorch calls."""
    disabled_level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled_level)
