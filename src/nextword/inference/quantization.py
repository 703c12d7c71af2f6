"""Weight quantization: int8 with a scale for each output, or int4 with a scale for each 32 inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nextword.common.options import Precision

PRECISION_CODES: dict[Precision, int] = {"float32": 0, "int8": 1, "int4": 2}  # `Precision` of products.h
GROUP_SIZE = 32  # weights that share a scale in int4


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [out, in] in memory layout. Rows are padded with zeros to whole groups.

    Attributes:
        precision: Its precision.
        data: float32 [out, in]; int8 [out, in]; or for int4 uint8 [out, in / 2], each byte two weights plus 8: the low halves
            of 16 bytes hold the first 16 weights of a group.
        scale: None; float32 [out]; or float16 [out, in / 32].
        shape: [out, in] without padding.
    """

    precision: Precision
    data: Tensor
    scale: Tensor | None
    shape: tuple[int, int]

    def dequantize(self) -> Tensor:
        """The matrix that the numbers stand for, float32 [out, in]."""
        if self.scale is None:
            return self.data
        if self.precision == "int8":
            return (self.data * self.scale[:, None])[:, : self.shape[1]]
        halves = self.data.reshape(len(self.data), -1, GROUP_SIZE // 2)  # [out, groups, 16]
        weights = torch.cat((halves & 15, halves >> 4), dim=2).float() - 8
        return (weights * self.scale.float()[:, :, None]).flatten(1)[:, : self.shape[1]]


def precision_for(precision: Precision, in_block: bool) -> Precision:
    """The precision of one matrix of a model: at least int8 for embedding and head, which lie outside the blocks."""
    return "int8" if precision == "int4" and not in_block else precision


@torch.no_grad()
def quantize(weight: Tensor, precision: Precision) -> QuantizedTensor:
    """Round a matrix [out, in] to the nearest values of a precision."""
    shape = (weight.shape[0], weight.shape[1])
    if precision == "float32":
        return QuantizedTensor(precision, weight.detach(), None, shape)
    weight = F.pad(weight.detach().float(), (0, -shape[1] % GROUP_SIZE))
    if precision == "int8":
        scale = weight.abs().amax(1) / 127
        data = (weight / _replace_zeros(scale)[:, None]).round().to(torch.int8)
        return QuantizedTensor(precision, data, scale, shape)
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)  # [out, groups, 32]
    # First the scale that maps the weight of largest magnitude to -8; then, twice, the least-squares scale of the result.
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = largest / -8
    best_scale, best_error = scale, torch.full_like(scale, torch.inf)
    for _ in range(3):
        scale = scale.half().float()
        rounded = (groups / _replace_zeros(scale)).round().clamp(-8, 7)
        error = (groups - rounded * scale).square().sum(2, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
        scale = (groups * rounded).sum(2, keepdim=True) / _replace_zeros(rounded.square().sum(2, keepdim=True))
    codes = ((groups / _replace_zeros(best_scale)).round().clamp(-8, 7) + 8).to(torch.uint8)
    data = (codes[:, :, : GROUP_SIZE // 2] | codes[:, :, GROUP_SIZE // 2 :] << 4).flatten(1)
    return QuantizedTensor(precision, data, best_scale[:, :, 0].half(), shape)


def _replace_zeros(divisor: Tensor) -> Tensor:
    """1 in place of 0, where the dividends are 0, too."""
    return torch.where(divisor == 0, 1.0, divisor)
