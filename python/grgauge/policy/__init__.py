"""What a reading means and what to do about it: plain numbers, no torch, no clock, no I/O.

Target                     where readings should be
Advice, advise, verdict    what readings mean for learning rate and batch, from measured distances; verdict is its line
suggest                    the next configuration for an independent trial
Pruning, Progress          whether a trial among others is worth going on with
Policy                     readings and losses in; Continue, Retune, Probe or Stop out, with the Evidence
RuleSet                    what a policy of one's own must have
"""

from .advice import Advice, Correction, advise, verdict
from .decisions import Config, Continue, Decision, Evidence, Probe, Retune, Stop
from .policy import Policy, RuleSet
from .pruning import Progress, Pruning
from .suggest import suggest
from .target import Target

__all__ = [
    "Advice",
    "Config",
    "Continue",
    "Correction",
    "Decision",
    "Evidence",
    "Policy",
    "Probe",
    "Progress",
    "Pruning",
    "Retune",
    "RuleSet",
    "Stop",
    "Target",
    "advise",
    "suggest",
    "verdict",
]
