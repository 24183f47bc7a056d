"""The gauge: reads GR_T and GR_S off the gradients that training computes anyway."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..estimators import Groups, gr_s, two_batch
from ..optim import AdamW, BucketSums, is_sharded, unwrapped
from ..reading import Reading
from ..smoothing import Spatial, Temporal
from ..theory import finite_time_factor
from .segments import DELTA_SQ, GRAD_SQ, LATE, NONFINITE, Ages, Rows, SampleError, Table
from .sources import ClippingSource, FusedSource, OwnSource, Sample
from .transfer import Transfer

if TYPE_CHECKING:
    from .ranks import CommHook, Ranks

WARM_UP = 20
"""Steps before GR_T is ready: uncorrelated gradients then read 79 % of their final value."""


class Gauge:
    """Reads GR_T, GR_S, the gradient noise scale and the gradient norm while an optimizer trains.

    On `grgauge.AdamW` with betas[0] equal to the gauge's beta the sums come from the step itself: the optimizer's first
    moment is the m of GR_T. Where it clips, m is an EMA of unclipped gradients, kept by the pass that reads their norm.
    With more than `sample` parameters there, and on any other optimizer, it is one of the gauge's own over `sample` of
    them, updated before each step through the optimizer's step hooks. Gradients are read as the optimizer gets them.

    optimizer   any torch optimizer with dense gradients, or Lightning's or accelerate's wrapper around one
    batch_size  global batch in samples; set it anew when the batch changes
    groups      micro-batches in a step; None: as many as `micro_step` was called for. GR_S needs at least two. With
                `attach`, ranks are the groups
    every       steps between readings
    sample      parameters looked at, where a pass of the gauge's own is needed
    beta        smoothing factor of both moments of GR_T, and over readings of S and G2. The published target of GR_T
                belongs to 0.9
    seed        which parameters a sample takes
    scaler      the torch.amp.GradScaler in use, so that groups are read at their true scale

    Steps captured in a CUDA graph are read as well: see `replayed`.

    Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batch_size: float,
        *,
        groups: int | None = None,
        every: int = 5,
        sample: int = 50_000_000,
        beta: float = 0.9,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("every", every), ("sample", sample)):
            if not value >= 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if groups is not None and groups < 1:
            raise ValueError(f"groups is {groups}; it must be at least 1, or None to count calls of micro_step()")
        if not 0.0 < beta < 1.0:
            raise ValueError(f"beta is {beta}; it must lie in (0, 1)")
        optimizer = unwrapped(optimizer)
        self.batch_size, self.groups, self.every, self.beta = batch_size, groups, every, beta
        self._optimizer, self._scaler = optimizer, scaler if scaler is not None and scaler.is_enabled() else None
        self._attempt: object = None
        self._temporal, self._spatial = Temporal(beta), Spatial(beta)
        self._table, self._sample_error = Table([], [], beta), SampleError(beta)
        self._layout: list[list[torch.Tensor]] = []
        self._step = 0
        self._rows: list[list[BucketSums]] = []
        self._groups: list[list[BucketSums]] = []
        self._shares: list[tuple[float | None, float | None]] = []
        self._captured: list[BucketSums] = []
        self._ranks: Ranks | None = None
        self._in_flight: list[_Window] = []
        self._newest: Reading | None = None
        self._sample, self._seed = Sample(optimizer, sample, seed), seed
        self._source: FusedSource | ClippingSource | OwnSource
        if isinstance(optimizer, AdamW) and FusedSource.fits(optimizer, beta):
            self._source = FusedSource(optimizer, beta, self._on_step)
        elif isinstance(optimizer, AdamW) and ClippingSource.fits(optimizer, self._sample.share):
            self._source = ClippingSource(optimizer, beta, self._on_step)
        else:
            self._source = OwnSource(optimizer, self._sample, beta, self._on_step)

    def attach(self, module: torch.nn.Module, *, comm_hook: CommHook | None = None, state: Any = None) -> None:
        """Make the ranks of a data-parallel module the groups of GR_S; no `micro_step` is needed then.

        module      DistributedDataParallel, or the root module that torch.distributed.fsdp.fully_shard was applied to
                    (a mesh of two dimensions is HSDP: all its ranks are groups)
        comm_hook, state   DDP: the communication hook that reduces the gradients, and its state; None is DDP's own
                    all-reduce. The gauge measures before it and behind it

        Every rank takes part in one small asynchronous all-reduce a reading, and all of them hold the same readings.
        Where gradients accumulate, keep all micro-batches but the last from being reduced. With FSDP2, `state_dict`
        must be called on all ranks alike.

        Raises TypeError for another kind of module, ValueError if it has a communication hook already or the gauge is
        attached, RuntimeError where the installed torch lacks what this rests on.
        """
        try:
            from .ranks import Ranks
        except ImportError as error:
            raise RuntimeError(
                f"torch {torch.__version__} has no hook in FSDP2's reduce-scatter ({error}); use micro_step()"
            ) from error

        if self._ranks is not None:
            raise ValueError("module is the second one: the gauge is attached to one already")
        self._ranks = Ranks(module, self._sample.share, self._seed, self._due, self._inv_scale, comm_hook, state)

    def micro_step(self, samples: float | None = None, weight: float | None = None) -> None:
        """Call after each micro-batch's backward: the gradient that it has added is one group of GR_S.

        samples  its size in samples, or in tokens where losses are means over tokens; None: batch_size / groups
        weight   its loss's share in the step's, in any unit (its tokens, say); None: all alike

        Gradients must accumulate over the step. Costs nothing but on the steps that are read. Where ranks are the
        groups (`attach`) it is needed only for what it says of this rank: samples and weights of its micro-batches add
        up.

        Raises ValueError for a size or weight that is not above 0, RuntimeError while a CUDA graph is captured.
        """
        if _capturing():
            raise RuntimeError(
                "micro_step() cannot be captured in a CUDA graph: capture one micro-batch's backward, and call "
                "micro_step() behind each replay"
            )
        for name, value in (("samples", samples), ("weight", weight)):
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, or None")
        if not self._due():
            return
        if self._ranks is not None:
            self._ranks.count(samples, weight)
        else:
            self._groups.append(self._sample.difference(self._inv_scale()))
            self._shares.append((samples, weight))

    def split_backward(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Backward of one batch on one device; on steps that are read in two halves, which are the groups of GR_S.

        loss_fn  maps a batch to its mean loss
        batch    a tensor [samples, ...], or a tuple, list or dict of such

        Returns the loss, detached. The halves' losses are weighted by their sizes, so gradients add up to the same mean
        over the batch. A batch of one sample is not split, and gives no GR_S. Raises ValueError for tensors of unequal
        length, or without any, and where ranks are the groups.
        """
        if self._ranks is not None:
            raise ValueError("split_backward is for one device; the ranks of the attached module are groups already")
        size = _length(batch)
        if not self._due() or size < 2:
            loss = loss_fn(batch)
            loss.backward()
            return loss.detach()
        total = torch.zeros(())
        for part in (slice(0, size // 2), slice(size // 2, size)):
            samples = part.stop - part.start
            loss = loss_fn(_part(batch, part)) * (samples / size)
            loss.backward()
            self.micro_step(samples, samples)
            total = total.to(loss.device) + loss.detach()
        return total

    def replayed(self) -> None:
        """Call behind each replay of a CUDA graph that a step of the optimizer was captured in, on the same stream.

        A replay runs no Python, and its sums lie in memory that the next one writes to: here they are copied, and then
        count as those of any other step. The captured step itself, which is not run, does not count. With several such
        graphs it is the last captured whose sums are taken.

        Raises RuntimeError if none was captured.
        """
        if not self._captured:
            raise RuntimeError("replayed() is for steps in a CUDA graph, and this gauge has seen none captured")
        self._take([replace(bucket, stats=bucket.stats.clone()) for bucket in self._captured])

    def reading(self) -> Reading | None:
        """The newest finished reading, None before the first. Never waits for the device.

        Steps only gather sums; what they say is worked out here, and not at all if nobody asks. Attached to a module, a
        reading is out one step late, on all ranks in the same step, and waits for the ranks' sum where it must.
        """
        while self._in_flight and self._is_due_out(self._in_flight[0]):
            self._finish(self._in_flight.pop(0))
        return self._newest

    def _is_due_out(self, window: _Window) -> bool:
        # Ranks must not go by what each of them happens to have received: they would tell different readings.
        return window.step < self._step if self._ranks is not None else window.transfer.done()

    @property
    def _shards(self) -> int:
        """Ranks that parameters are spread over."""
        return 1 if self._ranks is None else self._ranks.size // self._ranks.replicas

    def _due(self) -> bool:
        """True if the step in progress will be read."""
        if self._scaler is not None and self._scaler._per_optimizer_states is not self._attempt:
            # Another dict after each update(). On overflow GradScaler does not call step() of most optimizers, so what
            # belongs to the attempt before is still here.
            self._attempt = self._scaler._per_optimizer_states
            self._groups, self._shares = [], []
            if self._ranks is not None:
                self._ranks.forget()
        return (self._step + 1) % self.every == 0

    def _inv_scale(self) -> Tensor | None:
        """What gradients in progress are to be multiplied by. A tensor: asking its value would wait for the device."""
        scale = None if self._scaler is None else self._scaler._scale
        return None if scale is None else scale.float().reciprocal()

    def restart(self) -> None:
        """Start cold, as after a change of learning rate or batch: what was seen before no longer counts.

        On `grgauge.AdamW` the optimizer's first moment is m; it carries over, and only V starts anew.
        """
        self._temporal.restart()
        self._spatial.restart()
        self._source.restart()
        self._table, self._sample_error = Table([], [], self.beta), SampleError(self.beta)
        self._layout, self._rows, self._groups, self._shares, self._in_flight = [], [], [], [], []

    def remove(self) -> None:
        """Unhook the gauge from its optimizer; the newest reading stays."""
        self._source.remove()
        if self._ranks is not None:
            self._ranks.remove()

    def state_dict(self) -> dict[str, Any]:
        """All that readings depend on, to be taken between two steps. Waits for sums on their way to the host."""
        self._send(read=False)
        while self._in_flight:
            self._finish(self._in_flight.pop(0))
        return {
            "step": self._step,
            "batch_size": self.batch_size,
            "shards": self._shards,
            "temporal": self._temporal.state_dict(),
            "spatial": self._spatial.state_dict(),
            "table": self._table.state_dict(),
            "sample_error": self._sample_error.state_dict(),
            "sample": self._sample.state_dict(),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; the optimizer's own state must be loaded as well.

        On another number of ranks S, G2 and V go on, as they mean the same there; an EMA of the gauge's own that was
        spread over them cannot, and GR_T starts cold with a warning. Attach first.

        Raises ValueError if the state belongs to another kind of optimizer or to other parameters; the gauge is then as
        it was.
        """
        temporal, spatial = Temporal(self.beta), Spatial(self.beta)
        temporal.load_state_dict(state["temporal"])
        spatial.load_state_dict(state["spatial"])
        before = [(room, dict(vars(room))) for room in (self._sample, self._source)]
        try:
            if self._shards != state["shards"] and state["source"]["kind"] != "fused":
                warnings.warn(
                    f"the state was made of {state['shards']} shards, these are {self._shards}: GR_T's EMA, spread "
                    "over them, starts cold",
                    stacklevel=2,
                )
                self._source.restart()
                temporal.restart()
            else:
                self._sample.load_state_dict(state["sample"])
                self._source.load_state_dict(state["source"])
        except BaseException:
            for room, contents in before:
                vars(room).update(contents)
            raise
        self._temporal, self._spatial = temporal, spatial
        self._table = Table.from_state(state["table"], self.beta)
        self._sample_error = SampleError.from_state(state["sample_error"], self.beta)
        self._step, self.batch_size = state["step"], state["batch_size"]
        self._layout, self._rows, self._groups, self._shares, self._in_flight = [], [], [], [], []
        self._newest = None

    def _on_step(self, sums: list[BucketSums]) -> None:
        if not _capturing():
            self._take(sums)
        elif self._ranks is None:
            self._captured = sums
        else:
            raise RuntimeError("a step cannot be captured in a CUDA graph while its gauge is attached to a module")

    def _take(self, sums: list[BucketSums]) -> None:
        """Take in the sums of a step."""
        # A source makes all its lists of parameters anew when one changes, so the first tells of all.
        if len(sums) != len(self._layout) or (sums and sums[0].params is not self._layout[0]):
            self._lay_out([bucket.params for bucket in sums])
        self._step += 1
        self._rows.append(sums)
        if self._step % self.every == 0:
            self._send(read=True)
            if len(self._in_flight) > LATE:
                self.reading()

    def _lay_out(self, layout: list[list[torch.Tensor]]) -> None:
        """Take notice of which parameters the sums are of. Other ones than before: start cold."""
        names = _names(self._optimizer)
        sharded = [names[id(p)] for ps in layout for p in ps if is_sharded(p)]
        if sharded and self._ranks is None:
            raise RuntimeError(f"{sharded[0]} is sharded over ranks: call gauge.attach(module) before the first step")
        strangers = [names[id(p)] for ps in layout for p in ps if self._ranks and id(p) not in self._ranks.params]
        if strangers:
            raise RuntimeError(f"{strangers[0]} is no parameter of the attached module, or came after attach(module)")
        table = Table([names[id(p)] for ps in layout for p in ps], [p.numel() for ps in layout for p in ps], self.beta)
        if (table.names, table.sizes) != (self._table.names, self._table.sizes):
            if self._table.names:
                self.restart()
            self._table = table
        self._layout = layout

    def _send(self, read: bool) -> None:
        """Let the sums gathered so far travel to the host, to be folded in and, with `read`, to become a reading."""
        if not self._rows:
            return
        rows, groups, shares = self._rows, *((self._groups, self._shares) if read else ([], []))
        tensors = [torch.stack([b.stats for b in bucket]) for bucket in (*zip(*rows), *zip(*groups))]  # noqa: B905
        ages = [bucket.steps.double() for bucket in rows[-1]]
        ranks, summed, calls = self._ranks, [], 0
        if ranks is not None and ranks.sharded:
            summed = [_whole(bucket, stats) / ranks.replicas for bucket, stats in zip(rows[-1], tensors, strict=True)]
            tensors = []
        if ranks is not None and read:
            table, calls = ranks.collect(ages[0].device)
            summed.append(table)
        self._in_flight.append(
            _Window(
                rows,
                groups,
                shares,
                Transfer([*ages, *tensors], summed, ranks.group if ranks else None),
                read,
                calls,
                self._step,
                self.batch_size,
                self._source.problem(),
            )
        )
        self._rows, self._groups, self._shares = [], [], []

    def _finish(self, window: _Window) -> None:
        arrays = iter(window.transfer.arrays())
        ages = Ages([next(arrays) for _ in window.rows[-1]])
        rows, groups = Rows(window.rows, arrays), Rows(window.groups, arrays)
        for grad_sq in self._table.fold(rows):
            self._temporal.update(grad_sq)
        self._sample_error.fold(rows)
        if not window.read:
            return
        sampled = 0.0
        if self._ranks is not None:
            spatial = self._ranks.groups(next(arrays).tolist(), window.batch_size, window.calls)
        else:
            spatial = self._micro_batches(window, groups)
            if not isinstance(spatial, str):
                sampled = self._sample_error.of_groups(groups, spatial.weights)
        self._newest = self._read(window, rows, ages, spatial, sampled, self._changed(window, rows, groups))

    def _changed(self, window: _Window, rows: Rows, groups: Rows) -> str | None:
        """Says so if the step's gradient was another one than that behind its last micro-batch."""
        if not groups.totals or len(window.rows) - 1 not in rows.taken:
            return None
        if self._sample.share < 1.0 and not isinstance(self._source, OwnSource):
            return None  # a sample's norm and the whole's
        before, after = (math.sqrt(sums.totals[-1][GRAD_SQ]) for sums in (groups, rows))
        if math.isclose(before, after, rel_tol=1e-3):
            return None
        return (
            "GR_T and grad_norm are of a gradient that was changed behind the last micro_step(), as clipping does: "
            f"its norm was {before:.3g} before, {after:.3g} after"
        )

    def _read(
        self, window: _Window, rows: Rows, ages: Ages, groups: Groups | str, sampled: float, changed: str | None
    ) -> Reading:
        newest = rows.taken[-1] if rows.taken else None
        gr_t, temporal_problem = self._read_temporal(window, rows, newest, ages)
        problem = groups if isinstance(groups, str) else None
        if not isinstance(groups, str) and not self._spatial.update(*two_batch(*groups)):
            problem = "GR_S skipped a reading: gradients out of range"
        skipped = problem is not None and problem.startswith("GR_S skipped")
        spatial = self._spatial if (problem is None or skipped) and self._spatial.readings else None
        if spatial is not None and problem is None and not spatial.ready:
            steps = spatial.readings_until_ready * self.every
            problem = f"GR_S not ready: needs {f'~{steps:.0f} more steps' if math.isfinite(steps) else 'more signal'}"
        grad_norm = math.nan if newest is None else math.sqrt(rows.totals[newest][GRAD_SQ])
        gr_t_error = math.hypot(self._temporal.standard_error, self._sample_error.of_gr_t(rows, newest or 0, ages))
        gr_s_error, mu_error = (0.0, 0.0) if isinstance(groups, str) else _spread(groups, sampled, window.batch_size)
        return Reading(
            step=window.step,
            batch_size=window.batch_size,
            gr_t=gr_t,
            gr_t_error=_known(gr_t_error) if gr_t is not None else None,
            settled=finite_time_factor(ages.oldest, self.beta),
            gr_s=_known(spatial.gr_s(window.batch_size)) if spatial else None,
            gr_s_error=_known(math.hypot(spatial.gr_s_error(window.batch_size), gr_s_error)) if spatial else None,
            noise_scale=_known(spatial.noise_scale) if spatial else None,
            noise_scale_error=_known(math.hypot(spatial.noise_scale_error, mu_error)) if spatial else None,
            grad_norm=grad_norm,
            nonfinite=int(sum(rows.totals[i][NONFINITE] for i in rows.taken)),
            ready=temporal_problem is None and (spatial is None or spatial.ready),
            notes=tuple(note for note in (temporal_problem, problem, changed) if note is not None),
            table=self._table.snapshot(None if newest is None else rows.sums[newest]),
        )

    def _read_temporal(
        self, window: _Window, rows: Rows, newest: int | None, ages: Ages
    ) -> tuple[float | None, str | None]:
        """GR_T, and why it is missing or not ready."""
        if newest is None:
            return None, "GR_T not available: every step since the last reading was skipped"
        if window.problem is not None:
            return None, window.problem
        gr_t = _known(self._temporal.read(self._table.moment(rows, newest, ages)))
        if gr_t is None:
            return None, "GR_T not available: all gradients are zero"
        missing = WARM_UP - min(ages.oldest, self._temporal.steps)
        return gr_t, f"GR_T not ready: needs {missing:.0f} more steps" if missing > 0 else None

    def _micro_batches(self, window: _Window, groups: Rows) -> Groups | str:
        """The groups of a step's micro-batches, or why there are none."""
        n = len(groups.totals)
        if self.groups is not None and self.groups < 2:
            return f"GR_S not available: groups is {self.groups}; it needs at least two micro-batches or ranks"
        if n == 0:
            return "GR_S not available: call micro_step() after the backward of each of at least two micro-batches"
        if n == 1 or n != (self.groups or n):
            wanted = "at least 2" if self.groups is None else str(self.groups)
            return f"GR_S not available: micro_step() was called {n} times in the step, not {wanted}"
        if any(total[NONFINITE] for total in groups.totals):
            return "GR_S skipped a reading: non-finite gradients"
        samples, weights = ([value for value in column if value is not None] for column in zip(*window.shares))  # noqa: B905
        if len(samples) % n or len(weights) % n:
            return "GR_S not available: micro_step() was given samples or weight for some micro-batches only"
        p = [w / sum(weights) for w in weights] or [1.0 / n] * n
        # Gradients accumulate, so what micro-batch i added, p_i G_i, is the difference, and the first one's its whole.
        added = [groups.totals[0][GRAD_SQ]] + [total[DELTA_SQ] for total in groups.totals[1:]]
        squares = [sq / share**2 for sq, share in zip(added, p, strict=True)]
        return Groups(squares, groups.totals[-1][GRAD_SQ], samples or [window.batch_size / n] * n, p)


@dataclass
class _Window:
    """The steps between two readings, on their way to the host."""

    rows: list[list[BucketSums]]
    groups: list[list[BucketSums]]
    shares: list[tuple[float | None, float | None]]
    transfer: Transfer
    read: bool
    calls: int
    step: int
    batch_size: float
    problem: str | None


def _capturing() -> bool:
    """True while what the current stream is given goes into a CUDA graph instead of being run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """id of each parameter -> the name that the optimizer was given for it, else "group.index"."""
    return {
        id(p): name
        for g, group in enumerate(optimizer.param_groups)
        for p, name in zip(
            group["params"],
            group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))],
            strict=True,
        )
    }


def _spread(groups: Groups, error: float, batch_size: float) -> tuple[float, float]:
    """Standard errors of GR_S and of the noise scale that follow from a relative one of the groups' squares."""
    if error == 0.0:
        return 0.0, 0.0
    ends = [two_batch([sq * (1.0 + e) for sq in groups.group_sq], *groups[1:]) for e in (-error, error)]
    low, high = (gr_s(s, g2, batch_size) for s, g2 in ends)
    below, above = (s / g2 if g2 > 0.0 else math.inf for s, g2 in ends)
    return abs(high - low) / 2.0, abs(above - below) / 2.0


def _whole(bucket: BucketSums, stats: Tensor) -> Tensor:
    """A shard's sums [passes, tensors, 7] scaled up from its sample; the seventh is above 0 if anything was visited."""
    plan = bucket.plan
    scale, tensor = (torch.from_numpy(a).to(stats.device) for a in (plan.scale, plan.tensor))
    seen = (scale > 0).to(stats).expand(*stats.shape[:2])
    scaled = torch.cat([stats * scale[:, None], seen[..., None]], dim=-1)
    return scaled.new_zeros(len(scaled), len(bucket.params), scaled.shape[-1]).index_add_(1, tensor, scaled)


def _length(batch: Any) -> int:
    """Samples in a batch."""
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, (tuple, list)) else []
    lengths = {batch.shape[0]} if isinstance(batch, Tensor) else {_length(part) for part in parts}
    if len(lengths) != 1:
        raise ValueError(f"batch has tensors of {sorted(lengths)} samples; it must have tensors, all of one length")
    return int(lengths.pop())


def _part(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part]
    if isinstance(batch, dict):
        return type(batch)((key, _part(value, part)) for key, value in batch.items())
    return type(batch)(_part(value, part) for value in batch)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
