"""`metric="signal"`: progress is read for all that the optimizer trains, and the forecast decides what rests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..optim import local
from .forecast import Forecast
from .gradients import default_sample
from .matrix import Matrix
from .progress import Progress

Array = npt.NDArray[np.float64]

FEWEST = 2**16
"""Elements, 128 KiB of state: no fewer are read, of a model that has as many. With a quarter of them the errors of
forecasts are a third larger; with more they hardly fall, as most of an error is the noise of batches."""


class Signal:
    """Keeps gradients in one step, measures progress in the next, and decides on the reading.

    done    True once ending the training was found to forfeit no more than epsilon allows, all parameters included
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        matrices: Sequence[Matrix],
        forecast: Forecast,
        epsilon: float,
        sample: int | None,
    ) -> None:
        self.forecast, self.epsilon = forecast, epsilon
        self.done = False
        self._matrices = matrices
        monitored = {id(p): i for i, matrix in enumerate(matrices) for p in matrix.params}
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        sample = sample or max(FEWEST, default_sample(trained))
        stride = max(1, math.ceil(sum(local(p).numel() for p in trained) / sample))
        devices: dict[torch.device, list[nn.Parameter]] = {}
        for p in trained:
            devices.setdefault(p.device, []).append(p)
        self._parts = [Progress(optimizer, params, stride) for params in devices.values()]
        self._owners = [
            np.array([monitored.get(id(p), len(matrices)) for p in part.params], dtype=np.int64) for part in self._parts
        ]
        self._sizes = [np.array([p.numel() for p in part.params], dtype=np.float64) for part in self._parts]
        self.kept: list[list[Tensor | None]] | None = None

    def keep(self, inv_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Keep the gradients until the next step."""
        self.kept = [part.gradients(inv_scale, found_inf) for part in self._parts]

    def measure(self, inv_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor]:
        """Rows of sums on each device, that may be added up over ranks."""
        kept = self.kept or [[None] * len(part.params) for part in self._parts]
        self.kept = None
        return [part.read(inv_scale, found_inf, before) for part, before in zip(self._parts, kept, strict=True)]

    def falls(self, arrays: Sequence[Array]) -> list[float]:
        """The fall of the loss by each matrix, and last by all other parameters, from the rows of `measure`."""
        totals = np.zeros(len(self._matrices) + 1)
        for rows, owners, sizes in zip(arrays, self._owners, self._sizes, strict=True):
            # Ranks that hold the same parameter count alike above and below the line.
            whole = rows[:, 0] * sizes / np.where(rows[:, 1] > 0.0, rows[:, 1], np.nan)
            others = owners == len(self._matrices)
            whole[others] = np.nan_to_num(whole[others])  # parameters that had no part in this batch
            np.add.at(totals, owners, whole)
        return totals.tolist()

    def decide(self, step: int, falls: Sequence[float], patience: int, grace: int) -> tuple[list[float], list[int]]:
        """(share of the run's gain that each matrix's freezing would forfeit at most, which ones froze)."""
        forecast, matrices = self.forecast, self._matrices
        live = [i for i, matrix in enumerate(matrices) if matrix.frozen is None]
        training = [*live, len(matrices)]
        reading = np.full(len(falls), np.nan)
        reading[training] = np.array(falls)[training]
        forecast.add(step, reading)
        rests = forecast.rests(step, self.epsilon, live)
        allowed = set(forecast.freezable(step, self.epsilon, live)) if step >= grace else set()
        froze = []
        for i in live:
            if math.isfinite(reading[i]):
                matrices[i].below = matrices[i].below + 1 if i in allowed else 0
                if matrices[i].below >= patience:
                    froze.append(i)
        self.done = self.done or (rests and step >= grace and len(froze) == len(live))
        alone = forecast.forfeits(step)[:-1]
        known = np.isfinite(alone) & (forecast.gain > 0.0)
        shares = np.divide(alone, forecast.gain, out=np.full(len(matrices), np.nan), where=known)
        if froze and not self.done:
            forecast.freeze(step, froze)
        return shares.tolist(), froze

    def state_dict(self) -> dict[str, Any]:
        return {
            "forecast": self.forecast.state_dict(),
            "done": self.done,
            "kept": None if self.kept is None else [list(part) for part in self.kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forecast.load_state_dict(state["forecast"])
        self.done, kept = state["done"], state["kept"]
        # Rows of another number of ranks or another sample are of no use: that reading is left out.
        fits = kept is not None and all(
            t is None or t.numel() == size
            for part, ts in zip(self._parts, kept, strict=True)
            for size, t in zip(part.sizes, ts, strict=True)
        )
        self.kept = (
            [
                [None if t is None else t.to(p.device, copy=True) for p, t in zip(part.params, ts, strict=True)]
                for part, ts in zip(self._parts, kept, strict=True)
            ]
            if fits
            else None
        )
