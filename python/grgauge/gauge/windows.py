"""The sums of steps, from the optimizer's step to the host: collected between two readings, copied, added."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..optim import BucketSums, is_sharded
from ..optim.learning_rates import highest_lr
from ..policy.watch import Watch
from ..reading import Reading
from .micro_batches import Collected, MicroBatches
from .segments import Table
from .sources import names_of
from .statistics import Statistics
from .transfer import Array, Transfer, stacked
from .unavailable import Unavailable

if TYPE_CHECKING:
    from .ranks import Ranks

IN_FLIGHT = 20
"""Readings in flight after which the oldest are computed even if nobody has asked for them."""

STEPS_AT_ONCE = 64
"""The most steps whose sums travel together, so that memory is bounded where readings are far apart."""


_params_of = operator.attrgetter("params")


class Settings(Protocol):
    """What a user may change at any time; see `Gauge`, which has them."""

    batch_size: float
    groups: int | None
    every: int


@dataclass
class Window:
    """Steps on their way to the host.

    rows        the sums of each step
    micro       the micro-batches of the last one, if it is read
    transfer    the steps' ages and sums, then what `micro` and `ranks` need
    read        True if they make a reading
    comparable  True if there are micro-batches whose gradient should have the same norm as the step's
    lr          learning rate of the last step, None if unknown
    batch_size, groups, every   the settings then
    """

    rows: list[list[BucketSums]]
    micro: Collected
    transfer: Transfer
    read: bool
    step: int
    batch_size: float
    groups: int | None
    every: int
    problem: Unavailable | None
    comparable: bool
    ranks: Ranks | None
    calls: int
    lr: float | None


class Windows:
    """The steps that are not in a reading yet.

    optimizer   whose steps they are
    statistics  gets them in order
    micro       the micro-batches of the step in progress
    problem     returns why there is no GR_T at present, None if there is
    comparable  returns True if the norm of the micro-batches' gradient should be that of the step's
    restart     makes the whole gauge start cold
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        statistics: Statistics,
        micro: MicroBatches,
        problem: Callable[[], Unavailable | None],
        comparable: Callable[[], bool],
        restart: Callable[[], None],
    ) -> None:
        self._optimizer, self._micro = optimizer, micro
        self._problem, self._comparable, self._restart = problem, comparable, restart
        self.statistics = statistics
        self.ranks: Ranks | None = None
        self.step = 0
        self.newest: Reading | None = None
        self.watch = Watch()
        self.drop()

    def drop(self) -> None:
        """Forget all steps that are not in a reading yet."""
        self._layout: list[list[Tensor]] = []
        self._rows: list[list[BucketSums]] = []
        self._in_flight: list[Window] = []

    def take(self, sums: list[BucketSums], settings: Settings) -> None:
        """Add the sums of a step; an empty list if no parameter was trained."""
        known = len(sums) == len(self._layout) and all(map(operator.is_, map(_params_of, sums), self._layout))
        if sums and not known:
            self._lay_out([bucket.params for bucket in sums], settings)
        self.step += 1
        if sums:
            self._rows.append(sums)
        read = self.step % settings.every == 0
        if read and (sums or self.ranks is None):
            if self._rows and not sums:
                self._send(settings, read=False)
            self._send(settings, read=True)
            if len(self._in_flight) > IN_FLIGHT:
                self.reading()
        elif len(self._rows) >= STEPS_AT_ONCE:
            self._send(settings, read=False)
            self.reading()

    def reading(self) -> Reading | None:
        """The newest reading, after adding the steps that have arrived."""
        while self._in_flight and self._has_arrived(self._in_flight[0]):
            self._finish()
        return self.newest

    def finish(self, settings: Settings) -> None:
        """Add all steps, waiting for those in flight."""
        if self._rows:
            self._send(settings, read=False)
        while self._in_flight:
            self._finish()

    def _has_arrived(self, window: Window) -> bool:
        # Ranks must not decide by what has arrived on each of them: their readings would differ.
        return window.step < self.step if self.ranks is not None else window.transfer.done()

    def _finish(self) -> None:
        window = self._in_flight.pop(0)
        reading = self.statistics.fold(window)
        if reading is not None:
            self.newest = reading
            self.watch.observe(reading, window.lr)

    def _lay_out(self, layout: list[list[Tensor]], settings: Settings) -> None:
        """Remember which parameters the sums belong to. If they are not those of before, start cold."""
        names = names_of(self._optimizer)
        sharded = [names[id(p)] for ps in layout for p in ps if is_sharded(p)]
        if sharded and self.ranks is None:
            raise RuntimeError(f"{sharded[0]} is sharded over ranks: call gauge.attach(module) before the first step")
        strangers = [names[id(p)] for ps in layout for p in ps if self.ranks and id(p) not in self.ranks.params]
        if strangers:
            raise RuntimeError(f"{strangers[0]} is no parameter of the attached module, or came after attach(module)")
        sizes = [p.numel() for ps in layout for p in ps]
        known = self.statistics.table
        table = Table([names[id(p)] for ps in layout for p in ps], sizes, known.beta)
        before, now = ([id(p) for ps in own for p in ps] for own in (self._layout, layout))
        # A parameter that has moved within its groups has another name, but is the same. A loaded state has only names.
        if before == now if before else (table.names, table.sizes) == (known.names, known.sizes):
            known.names = table.names
            if self._rows:
                self._send(settings, read=False)  # only sums of one layout travel together
        else:
            if known.names:
                self._restart()
            self.statistics.table = table
        self._layout = layout

    def _send(self, settings: Settings, read: bool) -> None:
        """Start the copy of the sums so far to the host, where they are added and, with `read`, make a reading."""
        rows, micro = self._rows, self._micro.collect() if read else Collected()
        ages = [stacked([bucket.steps])[0] for bucket in rows[-1]] if rows else []
        buckets = [[b.stats for b in bucket] for bucket in (*zip(*rows), *zip(*micro.sums))]  # noqa: B905
        tensors: list[Tensor | Array] = []
        ranks, summed, calls = self.ranks, [], 0
        if ranks is not None and ranks.sharded:
            whole = [_whole(bucket, torch.stack(stats)) for bucket, stats in zip(rows[-1], buckets, strict=True)]
            summed = [sums / ranks.replicas for sums in whole]
        else:
            tensors += map(stacked, buckets)
            if micro.norms is not None:
                tensors.append(micro.norms)
        if ranks is not None and read:
            table, calls = ranks.collect(rows[-1][0].steps.device)
            summed.append(table)
        self._rows = []
        self._in_flight.append(
            Window(
                rows=rows,
                micro=micro,
                transfer=Transfer([*ages, *tensors], summed, ranks.group if ranks else None),
                read=read,
                step=self.step,
                batch_size=settings.batch_size,
                groups=settings.groups,
                every=settings.every,
                problem=self._problem(),
                comparable=bool(micro.sums) and self._comparable(),
                ranks=ranks,
                calls=calls,
                lr=_lr_on_host(self._optimizer) if read else None,
            )
        )


def _lr_on_host(optimizer: torch.optim.Optimizer) -> float | None:
    """Of all groups; None where one has none, or has it on a device, which would have to be waited for."""
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if lr is None or (isinstance(lr, Tensor) and not lr.is_cpu):
            return None
    return highest_lr(optimizer)


def _whole(bucket: BucketSums, stats: Tensor) -> Tensor:
    """A shard's sums [passes, tensors, 7] scaled up from its sample; the seventh is above 0 if anything was visited."""
    plan = bucket.plan
    scale, tensor = (torch.from_numpy(a).to(stats.device) for a in (plan.scale, plan.tensor))
    seen = (scale > 0).to(stats).expand(*stats.shape[:2])
    scaled = torch.cat([stats * scale[:, None], seen[..., None]], dim=-1)
    return scaled.new_zeros(len(scaled), len(bucket.params), scaled.shape[-1]).index_add_(1, tensor, scaled)
