from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def numpy_keeps_quiet():
    """Triton's interpreter computes in numpy, which warns of NaN and overflow where a GPU does not."""
    with np.errstate(all="ignore"):
        yield
