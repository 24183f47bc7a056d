"""Training configuration, read off a gauge.

AdamW    torch.optim.AdamW whose step also takes the gauges' sums
Gauge    GR_T, GR_S, noise scale and gradient norm of a training run
GradES   freezes weight matrices one by one, as their gradients come to rest
Policy   what to do about readings: Continue, Retune to another Config, or Stop
verdict  what a reading says about learning rate and batch size
"""

from . import estimators, invariance, smoothing, theory
from .gauge import Gauge
from .grades import GradES, MatrixReading
from .optim import AdamW
from .policy import Config, Continue, Retune, Stop, Target, verdict
from .reading import Reading, SegmentReading
from .search import Policy

__all__ = [
    "AdamW",
    "Config",
    "Continue",
    "Gauge",
    "GradES",
    "MatrixReading",
    "Policy",
    "Reading",
    "Retune",
    "SegmentReading",
    "Stop",
    "Target",
    "estimators",
    "invariance",
    "smoothing",
    "theory",
    "verdict",
]
