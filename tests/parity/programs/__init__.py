"""What programs do to an optimizer: a table. Each row gets a way to make one, and hands back what a program can see.

A row is a function of `make`, which is torch.optim.AdamW or ours, loose or flat. It returns (optimizer, parameters), or
with a third member anything else that is to be the same. An exception that it raises is to be of the same class.
"""

from parity.training import PROGRAMS

from . import dtypes, gradients, groups, models, options, saving, states

__all__ = ["PROGRAMS", "dtypes", "gradients", "groups", "models", "options", "saving", "states"]
