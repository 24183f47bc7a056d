"""timm makes our optimizer by its name."""

from __future__ import annotations

import pytest
from torch import nn

from grgauge import AdamW

pytestmark = pytest.mark.engines


def test_create_optimizer_v2_by_name():
    optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    import grgauge.integrations.timm  # noqa: F401

    optimizer = optim.create_optimizer_v2(nn.Linear(4, 2), "grgauge", lr=1e-3, weight_decay=0.1)
    assert type(optimizer) is AdamW
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
