"""Training configuration, read off a gauge.

AdamW    torch.optim.AdamW whose step also takes the gauges' sums
Gauge    GR_T, GR_S, noise scale and gradient norm of a training run
verdict  what a reading says about learning rate and batch size
"""

from . import estimators, smoothing, theory
from .gauge import Gauge
from .optim import AdamW
from .policy import Target, verdict
from .reading import Reading, SegmentReading

__all__ = ["AdamW", "Gauge", "Reading", "SegmentReading", "Target", "estimators", "smoothing", "theory", "verdict"]
