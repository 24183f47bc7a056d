"""The three actions around a user's own training: early stopping, guided search, state reuse.

tune, Trial, Result        a training function, run at a configuration found on the way
Advisor, Autopilot         say, or do, within one run what the policy decides
"""

from .advisor import Advisor, Autopilot
from .ranks import TrainingError
from .tuner import Result, Trial, tune

__all__ = ["Advisor", "Autopilot", "Result", "TrainingError", "Trial", "tune"]
