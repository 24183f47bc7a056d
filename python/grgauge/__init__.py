"""Training configuration, read off a gauge.

AdamW    torch.optim.AdamW whose step also takes the gauges' sums
Gauge    GR_T, GR_S, noise scale and gradient norm of a training run
GradES   freezes weight matrices one by one, as their gradients come to rest
Policy   what to do about readings: Continue, Retune to another Config, compare two, or Stop
tune     trains with your own training function, and finds learning rate and batch size on the way
Advisor, Autopilot   print what the policy says about a run, or act on it within the run
Advice   what a gauge's readings mean for learning rate and batch size: Gauge.advice()
verdict  the same of one reading, in a line
suggest  learning rate and batch size of the next trial, from the readings of the last one
"""

from importlib.metadata import version

from . import estimators, invariance, smoothing, theory
from .gauge import Gauge
from .grades import GradES, MatrixReading
from .optim import AdamW
from .policy import Advice, Config, Continue, Decision, Evidence, Policy, Retune, Stop, Target, suggest, verdict
from .reading import Reading, SegmentReading
from .tuning import Advisor, Autopilot, Result, TrainingError, Trial, tune

__version__ = version("grgauge-kernels")

__all__ = [
    "AdamW",
    "Advice",
    "Advisor",
    "Autopilot",
    "Config",
    "Continue",
    "Decision",
    "Evidence",
    "Gauge",
    "GradES",
    "MatrixReading",
    "Policy",
    "Reading",
    "Result",
    "Retune",
    "SegmentReading",
    "Stop",
    "Target",
    "TrainingError",
    "Trial",
    "__version__",
    "estimators",
    "invariance",
    "smoothing",
    "suggest",
    "theory",
    "tune",
    "verdict",
]


def __dir__() -> list[str]:
    """The public names only; folders are importable, but not public."""
    return __all__
