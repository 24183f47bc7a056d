"""GradES: weight matrices freeze one by one, as their gradients come to rest."""

from .grades import GradES, MatrixReading

__all__ = ["GradES", "MatrixReading"]
