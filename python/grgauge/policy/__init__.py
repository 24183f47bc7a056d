"""What a reading means and what to do about it: plain numbers, no torch, no clock, no I/O.

Target, verdict            where readings should be, and how far from there one is
suggest                    the next configuration for an independent trial
Pruning, Progress          whether a trial among others is worth going on with
Policy                     readings and losses in; Continue, Retune to another Config, or Stop out, with the Evidence
RuleSet                    what a policy of one's own must have
"""

from .decisions import Config, Continue, Decision, Evidence, Retune, Stop
from .policy import Policy
from .protocol import RuleSet
from .pruning import Progress, Pruning
from .suggest import suggest
from .target import Target, verdict

__all__ = [
    "Config",
    "Continue",
    "Decision",
    "Evidence",
    "Policy",
    "Progress",
    "Pruning",
    "Retune",
    "RuleSet",
    "Stop",
    "Target",
    "suggest",
    "verdict",
]
