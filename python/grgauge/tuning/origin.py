"""What a study was begun with: another model or other data are refused before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .errors import TrainingError
from .fingerprint import Fingerprint
from .study import AGAIN


class Origin:
    """Names and shapes of a study's parameters, and fingerprints of all data that it has been trained on.

    study  its name
    saved  from `state_dict`; None: of a study that begins
    """

    def __init__(self, study: str, saved: Mapping[str, Any] | None = None) -> None:
        self._study = study
        self._shapes: dict[str, list[int]] | None = saved["shapes"] if saved else None
        self._data = [Fingerprint(**seen) for seen in saved["data"]] if saved else []
        self._compared = False  # data of this process

    def compare_model(self, model: nn.Module) -> None:
        """Raises TrainingError if a parameter has another name or shape."""
        shapes = {name: list(p.shape) for name, p in model.named_parameters() if not is_lazy(p)}
        before = shapes if self._shapes is None else self._shapes
        for name in {**shapes, **before}:
            now, then = shapes.get(name, "missing"), before.get(name, "without it")
            if now != then:
                raise TrainingError(
                    f"parameter {name!r} is {now}, but study {self._study!r} was begun with {then}: use another "
                    f"study_name for another model, or {AGAIN}"
                )
        self._shapes = shapes

    def compare_data(self, found: Fingerprint | None) -> None:
        """Raises TrainingError for other data: the first of a process must be among those that the study has seen.
        Later ones may be of a new phase."""
        if found is None:
            return
        if all(found.differs(seen) for seen in self._data):
            if self._data and not self._compared:
                seen = self._data[0].samples
                raise TrainingError(
                    f"data has {found.samples} samples, but study {self._study!r} was begun with "
                    + (f"{seen}" if seen != found.samples else "other samples, as many")
                    + f": use another study_name for other data, or {AGAIN}"
                )
            self._data.append(found)
        self._compared = True

    def state_dict(self) -> dict[str, Any]:
        return {"shapes": self._shapes, "data": [asdict(seen) for seen in self._data]}
