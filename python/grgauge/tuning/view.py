"""What a training loop is at, as `Trial` and `Autopilot` show it."""

from __future__ import annotations

from torch import nn

from ..policy import Config
from ..reading import Reading
from .loop import Loop


class View:
    """What a loop is at: `lr`, `batch_size` and `config` of the next step, `samples` and `steps` of the weights at
    hand, `loss` and `reading`, the `model`, and `micro_batch`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    @property
    def lr(self) -> float:
        """Peak learning rate, the one that a schedule multiplies."""
        return self._loop.config.lr

    @property
    def batch_size(self) -> int:
        """Global batch in samples."""
        return self._loop.config.batch_size

    @property
    def config(self) -> Config:
        return self._loop.config

    @property
    def samples(self) -> int:
        """That the weights at hand have been trained on."""
        return self._loop.samples

    @property
    def steps(self) -> int:
        """Updates that they have had."""
        return self._loop.steps

    @property
    def loss(self) -> float:
        """Of the last step, the mean over its batch; nan before the first. On a device it is waited for."""
        return self._loop.loss

    @property
    def reading(self) -> Reading | None:
        """The newest one, None before the first."""
        return self._loop.reading

    @property
    def model(self) -> nn.Module | None:
        """None before `watch`."""
        return self._loop.model

    @property
    def averaged(self) -> nn.Module | None:
        """The running average of the weights, over about the newest tenth of the updates: often better than the weights
        at a learning rate that is high. None before the first step, and of a model that fully_shard was applied to.

        Its buffers, such as BatchNorm's statistics, are those of the weights themselves:
        `torch.optim.swa_utils.update_bn` takes its own.
        """
        return self._loop.averaged

    @property
    def probing(self) -> bool:
        """True while two learning rates are compared (`Probe`): the weights at hand may be given up after it."""
        return self._loop.probing

    @property
    def micro_batch(self) -> int | None:
        """Samples that one backward pass on one rank may take; None: all of its part of the batch."""
        return self._loop.micro_batch
