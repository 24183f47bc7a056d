"""GR_T, GR_S, noise scale and gradient norm of a training run.

Gauge      reads an optimizer's gradients in the optimizer's own pass, or in one of its own
"""

from .gauge import Gauge
from .transfer import Transfer

__all__ = ["Gauge", "Transfer"]
