"""`metric="signal"`: progress is read for all that the optimizer trains, and the forecast decides what rests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..optim import local
from .forecast import Forecast
from .matrix import Matrix
from .progress import Progress, rows_of

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Progresses:
    """One reading: drift and unrest of each matrix, and last of all other parameters; which of these were training."""

    drift: Array
    unrest: Array
    live: npt.NDArray[np.bool_]

    def state_dict(self) -> dict[str, Any]:
        return {"drift": self.drift.tolist(), "unrest": self.unrest.tolist(), "live": self.live.tolist()}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Progresses:
        return Progresses(np.array(state["drift"]), np.array(state["unrest"]), np.array(state["live"], dtype=bool))


class Signal:
    """Keeps gradients of frozen matrices in one step, measures progress in the next, and decides on the reading."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        matrices: Sequence[Matrix],
        forecast: Forecast,
        epsilon: float,
        sample: int,
    ) -> None:
        self.forecast, self.epsilon = forecast, epsilon
        self.rest_forfeits = math.inf
        """What ending the training forfeits besides: the progress of the parameters that are not monitored."""
        self._matrices = matrices
        monitored = {id(p): i for i, matrix in enumerate(matrices) for p in matrix.params}
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()]
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
        """Keep the gradients of frozen matrices until the next step: noise in two batches has nothing in common."""
        frozen = np.array([matrix.frozen is not None for matrix in self._matrices] + [False])
        self.kept = [
            part.gradients(inv_scale, found_inf, frozen[owners].tolist())
            for part, owners in zip(self._parts, self._owners, strict=True)
        ]

    def measure(self, inv_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor]:
        """Rows of sums on each device, that may be added up over ranks."""
        kept = self.kept or [[None] * len(part.params) for part in self._parts]
        self.kept = None
        rows = []
        for part, owners, earlier in zip(self._parts, self._owners, kept, strict=True):
            row = part.read(inv_scale, found_inf, earlier)
            for i, (owner, before) in enumerate(zip(owners.tolist(), earlier, strict=True)):
                if before is None and owner < len(self._matrices) and self._matrices[owner].frozen is not None:
                    row[i].fill_(torch.nan)
            rows.append(row)
        return rows

    def reading(self, arrays: Sequence[Array], live: npt.NDArray[np.bool_]) -> Progresses:
        """Sums over whole matrices, from the rows of `measure`."""
        totals = np.zeros((len(self._matrices) + 1, 2))
        for rows, owners, sizes in zip(arrays, self._owners, self._sizes, strict=True):
            # Ranks that hold the same parameter count alike above and below the line.
            whole = rows[:, :2] * (sizes / np.where(rows[:, 2] > 0.0, rows[:, 2], np.nan))[:, None]
            others = owners == len(self._matrices)
            whole[others] = np.nan_to_num(whole[others])  # parameters that had no part in this batch
            np.add.at(totals, owners, whole)
        return Progresses(totals[:, 0], totals[:, 1], live)

    def live(self) -> npt.NDArray[np.bool_]:
        return np.array([matrix.frozen is None for matrix in self._matrices] + [True])

    def decide(
        self, step: int, reading: Progresses, patience: int, grace: int
    ) -> tuple[list[float], list[int], list[int]]:
        """(share of the run's gain that each matrix's freezing would forfeit at most, froze, thawed)."""
        forecast, matrices = self.forecast, self._matrices
        forecast.add(step, reading.drift, reading.unrest, reading.live)
        thawed = forecast.wrong(step, [matrix.frozen for matrix in matrices])
        for i in thawed:
            forecast.thaw(i)
        alone, gain = forecast.forfeits(step), forecast.gain(step)
        self.rest_forfeits = float(alone[-1])
        froze = []
        allowed = set(forecast.freezable(step, self.epsilon)) if step >= grace else set()
        for i, matrix in enumerate(matrices):
            if matrix.frozen is not None or not math.isfinite(reading.drift[i]):
                continue
            matrix.below = matrix.below + 1 if i in allowed else 0
            if matrix.below >= patience:
                froze.append(i)
        for i in froze:
            forecast.freeze(i, float(alone[i]))
        known = np.isfinite(alone[:-1]) & (gain > 0.0)
        shares = np.divide(alone[:-1], gain, out=np.full(len(matrices), np.nan), where=known)
        return shares.tolist(), froze, thawed

    def rests(self, step: int) -> bool:
        """True if ending the training here forfeits at most epsilon of the run's gain, all parameters included."""
        forfeits = self.rest_forfeits + float(self.forecast.forfeited.sum())
        return forfeits <= self.epsilon * self.forecast.gain(step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "forecast": self.forecast.state_dict(),
            "rest_forfeits": self.rest_forfeits,
            "kept": None if self.kept is None else [list(part) for part in self.kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forecast.load_state_dict(state["forecast"])
        self.rest_forfeits, kept = state["rest_forfeits"], state["kept"]
        # Rows of another number of ranks or another sample are of no use: that probe is left out.
        fits = kept is not None and all(
            t is None or t.shape == rows_of(p, part.stride).shape
            for part, ts in zip(self._parts, kept, strict=True)
            for p, t in zip(part.params, ts, strict=True)
        )
        self.kept = (
            [
                [None if t is None else t.to(p.device, copy=True) for p, t in zip(part.params, ts, strict=True)]
                for part, ts in zip(self._parts, kept, strict=True)
            ]
            if fits
            else None
        )
