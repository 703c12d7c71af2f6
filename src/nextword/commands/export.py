"""``nextword export``: a model as one file for another program."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nextword.commands.command import Context, command
from nextword.commands.shared import check_output_file, optional
from nextword.common.errors import UsageError
from nextword.common.numbers import NonNegative
from nextword.common.options import ModelArgument, Precision, option, options

if TYPE_CHECKING:
    from nextword.export.formats import ExportResult


@options
class ExportConfig(ModelArgument):
    """Export a model to GGUF (llama.cpp) or ONNX (ONNX Runtime).

    With llama-cpp-python or onnxruntime installed, the file is read back and compared with the model, and deleted if they
    differ. Hugging Face transformers needs no export: it opens RUN/model.

    Attributes:
        to: File format.
        out: Path of the file. Default: the path of the model with .gguf or .onnx appended.
        precision: Number format of the weights in a GGUF file. ONNX files are float32.
        tolerance: Largest accepted difference when the file is read back: log-probabilities in nats (gguf) or logits (onnx).
    """

    to: Literal["gguf", "onnx"] = option(default="gguf", kw_only=False)
    out: Path | None = option(default=None, converter=optional(Path), kw_only=False)
    precision: Precision = option(default="float32", kw_only=False)
    tolerance: NonNegative = option(default=1e-3, kw_only=False)


@command(ExportConfig, example="nextword export runs/mine --to gguf")
def export(config: ExportConfig, context: Context) -> "ExportResult":
    """Write the file and verify it. Raises `UsageError` for a format or precision that does not exist."""
    path = config.model.resolve()
    out = config.out or path.with_name(f"{path.name}.{config.to}")
    check_output_file(out, config.model)
    if config.to == "gguf":
        from nextword.export.formats import write_gguf

        return write_gguf(config.model, out, config.precision, config.tolerance)
    if config.to != "onnx":
        raise UsageError(f"unknown format {config.to!r}: choose gguf or onnx")
    if config.precision != "float32":
        raise UsageError(
            f"ONNX files are float32, not {config.precision}: quantize the file with ONNX Runtime's own tools"
        )
    from nextword.export.formats import write_onnx

    return write_onnx(config.model, out, config.tolerance)
