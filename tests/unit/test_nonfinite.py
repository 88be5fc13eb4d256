import math
from typing import Any

import pytest
import torch
from torch import nn

from mser_dist.training.nonfinite import Buffers, poison


@pytest.mark.parametrize("value", [1.5, 0.0, -2.0])
def test_a_finite_loss_and_its_gradient_stay_as_they_are(value: float) -> None:
    x = torch.tensor(value, requires_grad=True)
    poisoned = poison(3 * x)
    poisoned.backward()
    assert poisoned.item() == 3 * value and x.grad is not None and x.grad.item() == 3


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    x = torch.tensor(value, requires_grad=True)
    poison(2 * x).backward()
    assert x.grad is not None and x.grad.isnan()


def test_buffers_go_back_to_the_last_good_step() -> None:
    model: Any = nn.BatchNorm1d(2)
    buffers = Buffers(model)
    model(torch.randn(4, 2))
    buffers.keep()
    good = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _ in range(2):
        model(torch.full((4, 2), math.nan))
        buffers.restore()
        assert all(torch.equal(buffer, good[name]) for name, buffer in model.named_buffers())
    model(torch.randn(4, 2))
    buffers.keep()
    assert model.num_batches_tracked == 2
