"""What a reading means and what to do about it: plain numbers, no torch, no clock, no I/O.

Target, verdict            where readings should be, and how far from there one is
suggest                    the next configuration for an independent trial
Pruning, Progress          whether a trial among others is worth going on with
Policy                     readings and losses in; Continue, Retune to another Config, or Stop out, with the Evidence
"""

from .moves import REPEAT
from .policy import Policy
from .pruning import Progress, Pruning
from .suggest import suggest
from .target import Config, Continue, Decision, Evidence, Retune, Stop, Target, verdict

__all__ = [
    "REPEAT",
    "Config",
    "Continue",
    "Decision",
    "Evidence",
    "Policy",
    "Progress",
    "Pruning",
    "Retune",
    "Stop",
    "Target",
    "suggest",
    "verdict",
]
