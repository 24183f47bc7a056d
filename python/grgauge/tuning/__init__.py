"""The three actions around a user's own training: early stopping, guided search, state reuse.

tune, Trial, Result        a training function, run at a configuration found on the way
Advisor, Autopilot         say, or do, within one run what the policy decides
"""

from .advisor import Advisor
from .autopilot import Autopilot
from .errors import TrainingError
from .study import storage_url
from .trial import Trial
from .tuner import Result, tune

__all__ = ["Advisor", "Autopilot", "Result", "TrainingError", "Trial", "storage_url", "tune"]
