"""What ends a training, in words that say why and what to do."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do."""


class StorageError(TrainingError):
    """The study or a checkpoint cannot be written. What was written before is whole."""


class DamagedError(TrainingError):
    """A checkpoint is not what was written."""


class BatchSizeError(TrainingError):
    """The data do not follow the batch size."""
