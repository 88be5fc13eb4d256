"""The learned temperature, and a bias for the sigmoid loss, within bounds that hold under every ZeRO stage."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient is only stopped where it would push further out: a value at its bound can come back.

    The gradient has to be the whole loss's on every rank, as `Scores` gives it: a rank's part may have another sign.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = low, high
        return value.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        [value] = ctx.saved_tensors
        low, high = ctx.bounds
        outwards = ((value >= high) & (grad < 0)) | ((value <= low) & (grad > 0))  # a step goes against the gradient
        return torch.where(outwards, 0.0, grad), None, None


class LogitScale(nn.Module):
    """`terms` learned scales, 1/temperature each, kept as logarithms (CLIP, arXiv 2103.00020), and as many biases.

    The bound holds in the forward pass, in fp32, whatever the parameter's dtype. Clamping the parameter in place would
    be undone by ZeRO's fp32 master copy, and under ZeRO-3 there is nothing to clamp: an engine that keeps masters
    clamps them to `bounds` after each step.

    Args:
        terms: how many.
        start: initial scale.
        highest: upper bound of the scale; the lower one is 1.
        bias: initial bias, -10 in SigLIP (2303.15343); None: no biases.
    """

    def __init__(self, terms: int, start: float, highest: float, bias: float | None = None) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((terms,), math.log(min(max(start, 1.0), highest))))
        self.bias = nn.Parameter(torch.full((terms,), bias)) if bias is not None else None
        self.highest = math.log(highest)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """(terms,) scales and biases, fp32."""
        log_scale: Tensor = _Bounded.apply(self.log_scale.float(), 0.0, self.highest)
        return log_scale.exp(), self.bias.float() if self.bias is not None else None


def bounds(model: nn.Module) -> Iterator[tuple[str, float, float]]:
    """(name, lowest, highest) of the parameters in a model that have bounds."""
    for name, module in model.named_modules():
        if isinstance(module, LogitScale):
            yield f"{name}.log_scale".removeprefix("."), 0.0, module.highest
