"""Weights in fewer bits: eight with a scale for each output, or four with a scale for each 32 inputs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Precision = Literal["float32", "int8", "int4"]
PRECISION_CODES: dict[Precision, int] = {"float32": 0, "int8": 1, "int4": 2}  # as native.cpp counts them
GROUP_SIZE = 32  # weights that share a scale in four bits


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix [out, in] as it lies in memory, its rows padded with zeros to whole groups.

    Attributes:
        data: float32 [out, in]; int8 [out, in]; or uint8 [out, in / 2], each byte two weights plus 8: of every 32, the first
            16 in the low halves.
        scale: float32 [out]; or float16 [out, in / 32].
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
        packed_groups = self.data.unflatten(1, (-1, GROUP_SIZE // 2))  # [out, groups, 16]
        weights = torch.cat((packed_groups & 15, packed_groups >> 4), dim=2).float() - 8
        return (weights * self.scale.float()[:, :, None]).flatten(1)[:, : self.shape[1]]


def precision_for(precision: Precision, in_block: bool) -> Precision:
    """The precision of one matrix. Embedding and head, outside the blocks, decide between words: not below 8 bits."""
    return "int8" if precision == "int4" and not in_block else precision


@torch.no_grad()
def quantize(weight: Tensor, precision: Precision) -> QuantizedTensor:
    """A matrix [out, in] in a precision, rounded to the nearest number that it has."""
    shape = (weight.shape[0], weight.shape[1])
    if precision == "float32":
        return QuantizedTensor(precision, weight.detach(), None, shape)
    weight = F.pad(weight.detach().float(), (0, -shape[1] % GROUP_SIZE))
    if precision == "int8":
        scale = weight.abs().amax(1) / 127
        return QuantizedTensor(precision, (weight / replace_zeros(scale)[:, None]).round().to(torch.int8), scale, shape)
    groups = weight.unflatten(1, (-1, GROUP_SIZE))  # [out, groups, 32]
    # The number that is largest without its sign becomes -8; then the scale that fits the rounded weights best, twice.
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = largest / -8
    best, error = scale, torch.full_like(scale, torch.inf)
    for _ in range(3):
        scale = scale.half().float()
        rounded = (groups / replace_zeros(scale)).round().clamp(-8, 7)
        candidate_error = (groups - rounded * scale).square().sum(2, keepdim=True)
        best, error = torch.where(candidate_error < error, scale, best), torch.minimum(candidate_error, error)
        scale = (groups * rounded).sum(2, keepdim=True) / replace_zeros(rounded.square().sum(2, keepdim=True))
    codes = ((groups / replace_zeros(best)).round().clamp(-8, 7) + 8).to(torch.uint8)
    data = (codes[:, :, : GROUP_SIZE // 2] | codes[:, :, GROUP_SIZE // 2 :] << 4).flatten(1)
    return QuantizedTensor(precision, data, best[:, :, 0].half(), shape)


def replace_zeros(scale: Tensor) -> Tensor:
    """What can be divided by: 1 in the place of 0, where all that is divided is 0."""
    return torch.where(scale == 0, 1.0, scale)
