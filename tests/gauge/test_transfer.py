"""Sums on their way to the host: what arrives is what was sent, whatever happens to the tensors afterwards."""

import math

import numpy as np
import pytest
import torch

from grgauge.gauge.transfer import FEW, Transfer, stacked

ODD = [0.1, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7e308]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, len(ODD), FEW, FEW + 1, 3 * FEW])
def test_stacked_tensors_arrive_with_every_bit(numel: int, dtype: torch.dtype) -> None:
    tensors = [torch.tensor((ODD * (numel + 1))[i : i + numel], dtype=dtype).reshape(numel, 1) for i in range(3)]
    expected = torch.stack(tensors).double().numpy()

    (arrived,) = Transfer([stacked(tensors)]).arrays()

    assert arrived.dtype == np.float64
    assert arrived.shape == (3, numel, 1)
    assert arrived.tobytes() == expected.tobytes()


@pytest.mark.parametrize("numel", [1, FEW + 1])
def test_what_is_on_its_way_does_not_change_with_the_tensors(numel: int) -> None:
    steps = torch.ones(numel)
    transfer = Transfer([stacked([steps])])
    steps.add_(1)
    assert (transfer.arrays()[0] == 1.0).all()
