"""GradES: the weight matrices of a transformer leave training one by one, as their gradients come to rest.

Source: Wen et al., "GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
arXiv 2509.01842v3, Eq. 1 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gauge import Transfer
from ..optim import reciprocal, unwrapped
from .forecast import Forecast
from .gradients import Metric, gradient_buckets
from .matrix import Scale, monitored
from .progress import require_momentum
from .signal import Signal

PROBE = 4
"""With `thaw`, the frozen matrices are read in every fourth reading as well."""


@dataclass(frozen=True)
class MatrixReading:
    """One reading of all monitored matrices, and what followed from it.

    Attributes:
        step: The optimizer step whose gradients were read.
        values: In the order of `GradES.matrices`, NaN where there is none. "delta" and "norm": mean over elements of
            |g_t - g_{t-1}| or |g_t|. "signal": the share of the run's gain that freezing this matrix alone would
            forfeit, the upper end of its interval; of a frozen one, what it was.
        froze: Matrices that this step's update was the last of.
        thawed: Frozen matrices that are updated again from step + 2 on.
    """

    step: int
    values: tuple[float, ...]
    froze: tuple[str, ...] = ()
    thawed: tuple[str, ...] = ()


class GradES:
    """Freezes weight matrices one by one, once there is evidence that they have little left to gain.

    signal  By how much a matrix's updates make the loss of other batches fall, without the part that is noise; see
            `grgauge.grades.progress`. The forecast for the rest of the run has an interval, and its upper end counts:
            matrices freeze, and the run ends, as long as that forfeits at most `epsilon` of the run's gain. Nothing
            else has to be chosen. Where gradients are noisy, the interval is wide and little freezes. Progress is
            taken to slow down steadily: a learning rate that stays high and falls at the very end brings a gain that
            no reading announces. Let alpha reach to where it falls.
    delta   G_W(t) = sum |g_t - g_{t-1}| < tau   (Eq. 1, Algorithm 1)
    norm    G_W(t) = sum |g_t| < tau             (the paper's text)

    "delta" and "norm" are the paper's. They measure how large gradients are, which is mostly noise: in fine-tunings of
    small Llamas they did not fall but rose, nearly every matrix froze at the first reading that alpha allowed, and a
    run in which every step helps lost accuracy. No tau is right for two models; compare with stopping at the same cost.

    A LoRA pair is one matrix: A and B are added up and freeze together. Gradients are read in a step hook of the
    optimizer, as the optimizer gets them: after any clipping of your own, and without GradScaler's scale. A reading is
    acted on one step later, when it has reached the host: nothing waits for the device, and all ranks, whose sums are
    added up, decide alike. Steps are calls of optimizer.step().

    A frozen matrix has no `.grad` when the optimizer updates, so neither momentum nor weight decay moves it. Its
    gradient is not computed either:

    - In one process and under FSDP2 it has requires_grad=False. FSDP2 also stops reducing it.
    - DDP waits for the gradient of every parameter it was given, whatever requires_grad says. So the layer computes
      with a detached weight, and DDP is handed an undefined gradient: the product is saved, the bucket's traffic is
      not. A weight that is used elsewhere than in its own module's forward(), or in one that torch.compile traced
      earlier, still gets a gradient, which is dropped.

    Where freezing would leave nothing with requires_grad, the last matrix is frozen as under DDP, so that training past
    `done` still runs and moves nothing.

    A reading without a value freezes nothing and leaves the count of `patience` as it is. That is the first reading of
    "delta", which has no gradient to differ from; one with a NaN or an infinity in its gradients or in those of the
    step before; one in a step that GradScaler skips; and that of a matrix whose gradient is missing or all zeros.
    Nothing is below a level that is not known yet.

    Args:
        model: The module that is trained: under DDP the wrapped one, under FSDP2 the one after fully_shard.
        optimizer: Any torch optimizer but LBFGS, over all or some of the model's parameters; only those are monitored.
            "signal" needs Adam's two moments or SGD's momentum, of 0.5 or more.
        total_steps: Optimizer steps that the run is to have.
        metric: "signal", "delta" or "norm".
        epsilon: With "signal": the share of the run's gain, in loss, that may be forfeited: up to half of it by
            freezing matrices, all of it by ending.
        tau: With "delta" and "norm", where it has no default: freeze below this. `scale` says in which unit.
        alpha: No freezing in the first ceil(alpha total_steps) steps. None: 0.5 as in the paper, 0 with "signal".
        patience: Readings in a row that it takes.
        thaw: With "delta" and "norm": a frozen matrix takes part again once it reads this or more, in the units of tau.
            None: frozen for good, as in the paper. To find out, the gradients of frozen matrices are computed for every
            fourth reading, in one step ("norm") or two ("delta"); a clipping of your own sees them then.
        modules: "auto", or a regular expression. "auto" takes the 2-D weights of linear layers (Linear, Conv1D, fused
            qkv; no embeddings) inside repeated blocks: the modules with children in a ModuleList, or modules of one
            type in a Sequential or ModuleDict. A weight that is tied to one elsewhere is left out. A regular expression
            is searched for in the names of all trained parameters with two or more dimensions: names as in
            named_parameters(), without ".weight", and with "lora" for a pair.
        scale: Of tau. "level": a share of the matrix's own level, the mean of its first five readings after `warmup`.
            "element": a mean over elements. "matrix": a sum over the matrix, as in the paper.
        warmup: Steps before the level is taken, or before readings count in a forecast; None: a tenth of total_steps.
        every: Steps between readings; between them nothing is computed. At least 2 with "delta" and "signal". None: 10;
            with "signal" fewer in runs of less than 2000 steps, total_steps / 200.
        sample: Elements to read on each rank. None: one for each 200 float32 elements of the monitored parameters
            ("delta", "norm") or of all that is trained ("signal"), at most 2^24. "delta" and "norm" read at least a
            block of each matrix, small ones whole; "signal" at least 2^16 elements of all that is trained. The state is
            these elements of one gradient, in float32 ("delta") or bfloat16 ("signal", from one step to the next only).
        seed: Which elements a sample of "delta" and "norm" takes.

    Raises:
        ValueError: For a number out of range, an argument that belongs to another metric, an optimizer without momentum
            with "signal", `modules` that match nothing, and matrices on different device meshes.
        TypeError: For LBFGS, whose steps mix all parameters.

    Examples:
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> grades = GradES(model, optimizer, total_steps=100, metric="signal")
        >>> grades
        GradES(0 of 2 matrices frozen; freezing forfeits at most 2 % of the run's gain, from step 10 on)
        >>> grades.matrices, grades.done
        (('0.0', '1.0'), False)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        metric: Metric = "delta",
        epsilon: float = 0.02,
        tau: float | None = None,
        alpha: float | None = None,
        patience: int = 2,
        thaw: float | None = None,
        modules: str = "auto",
        scale: Scale = "level",
        warmup: int | None = None,
        every: int | None = None,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, word, words in (("metric", metric, get_args(Metric)), ("scale", scale, get_args(Scale))):
            if word not in words:
                raise ValueError(f"{name} is {word!r}; it must be one of {', '.join(map(repr, words))}")
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer is LBFGS; it must be one that leaves parameters without a gradient where they are"
            )
        signal = metric == "signal"
        if signal:
            require_momentum(optimizer)
            for name, value in (("tau", tau), ("thaw", thaw)):
                if value is not None:
                    raise ValueError(f"{name} is {value}; metric 'signal' has no threshold: it must be None")
        elif tau is None:
            raise ValueError(f"tau is None; metric {metric!r} needs a threshold, and none suits every model")
        elif not 0.0 < tau < math.inf:
            raise ValueError(f"tau is {tau}; it must be above 0 and finite")
        elif thaw is not None and not thaw > tau:
            raise ValueError(f"thaw is {thaw}; it must be above tau = {tau}, or None")
        alpha = (0.0 if signal else 0.5) if alpha is None else alpha
        if not 0.0 < epsilon < 1.0:
            raise ValueError(f"epsilon is {epsilon}; it must lie inside (0, 1)")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
        least_every = 1 if metric == "norm" else 2
        warmup = math.ceil(total_steps / 10) if warmup is None else warmup
        if every is None:
            every = min(10, max(2, total_steps // 200)) if signal else 10
        for name, value, least in (
            ("total_steps", total_steps, 1),
            ("patience", patience, 1),
            ("warmup", warmup, 0),
            ("every", every, least_every),
            ("sample", 1 if sample is None else sample, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.tau, self.thaw, self.metric, self.scale, self.epsilon = tau, thaw, metric, scale, epsilon
        self.patience, self.warmup, self.every = patience, warmup, every
        self.grace = math.ceil(alpha * total_steps)
        self.history: list[MatrixReading] = []
        self._done = False
        self._model, self._optimizer = model, optimizer
        self._matrices = monitored(model, optimizer, modules)
        self._groups = _process_groups(model, [p for matrix in self._matrices for p in matrix.params])
        self._signal: Signal | None = None
        if signal:
            forecast = Forecast(len(self._matrices), total_steps, every, warmup)
            self._signal = Signal(optimizer, self._matrices, forecast, epsilon, sample)
        self._buckets = [] if signal else gradient_buckets(self._matrices, sample, seed)
        self._step = 0
        self._pending: _Pending | None = None
        self._probing = False
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def __repr__(self) -> str:
        frozen = f"{len(self.frozen)} of {len(self._matrices)} matrices frozen"
        if self._signal is not None:
            start = max(self.grace, self.warmup)
            limit = f"freezing forfeits at most {100 * self.epsilon:g} % of the run's gain, from step {start} on"
            return f"GradES({frozen}; {limit})"
        what = "|g_t - g_(t-1)|" if self.metric == "delta" else "|g_t|"
        limit = {
            "level": f"mean {what} < {self.tau:g} of its own early level",
            "element": f"mean {what} < {self.tau:g}",
            "matrix": f"sum {what} < {self.tau:g}",
        }[self.scale]
        return f"GradES({frozen}; {limit}, from step {self.grace} on)"

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the monitored matrices."""
        return tuple(matrix.name for matrix in self._matrices)

    @property
    def frozen(self) -> dict[str, int]:
        """Each frozen matrix -> the step whose reading froze it."""
        return {matrix.name: matrix.frozen for matrix in self._matrices if matrix.frozen is not None}

    @property
    def levels(self) -> dict[str, float | None]:
        """Each matrix -> its early level, a mean over elements; None as long as it is not known."""
        return {matrix.name: matrix.level for matrix in self._matrices}

    @property
    def progress(self) -> dict[str, tuple[float, float]]:
        """With "signal": each matrix -> what it would still gain in units of the loss, and the standard error of that.

        NaN where not known.
        """
        if self._signal is None:
            return {}
        return dict(zip(self.matrices, self._signal.forecast.expected(self._step), strict=False))

    @property
    def done(self) -> bool:
        """True if all monitored matrices are frozen: it is time to stop. The same on all ranks.

        With "signal", what all other parameters would still gain must be within `epsilon` as well.
        """
        return self._done

    def remove(self) -> None:
        """Unhook from optimizer and model; what was frozen can be trained again."""
        self._hook.remove()
        for matrix in self._matrices:
            matrix.resume()

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on, to be taken between two steps; of FSDP2, this rank's. Waits for a reading."""
        pending: dict[str, Any] | None = None
        if self._pending is not None:
            pending = {"step": self._pending.step, "values": self._pending.values()}
        filled = self.metric == "delta" and (self._step + 1) % self.every == 0
        return {
            "metric": self.metric,
            "names": list(self.matrices),
            "sizes": [matrix.numel for matrix in self._matrices],
            "step": self._step,
            "frozen": [matrix.frozen for matrix in self._matrices],
            "below": [matrix.below for matrix in self._matrices],
            "early": [list(matrix.early) for matrix in self._matrices],
            "history": [(r.step, list(r.values), list(r.froze), list(r.thawed)) for r in self.history],
            "pending": pending,
            "filled": [bucket.filled() for bucket in self._buckets] if filled else None,
            "signal": None if self._signal is None else self._signal.state_dict(),
            "done": self._done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, exactly; model and optimizer have their own states.

        Between the two steps of a "delta" reading the state holds gradients of this rank's sample: with another number
        of ranks, another sample or seed that one reading is left out.

        Raises:
            ValueError: If the state belongs to another metric or other matrices, before anything is changed.
        """
        if state["metric"] != self.metric:
            raise ValueError(f"the state's metric is {state['metric']!r}, this one's {self.metric!r}")
        if (state["names"], state["sizes"]) != (list(self.matrices), [matrix.numel for matrix in self._matrices]):
            raise ValueError(f"the state is of {len(state['names'])} other matrices than these {len(self._matrices)}")
        self._step = state["step"]
        for i, matrix in enumerate(self._matrices):
            matrix.frozen, matrix.below, matrix.early = state["frozen"][i], state["below"][i], list(state["early"][i])
        self.history = [MatrixReading(s, tuple(v), tuple(f), tuple(t)) for s, v, f, t in state["history"]]
        pending = state["pending"]
        self._pending = None
        if pending is not None:
            self._pending = _Pending(pending["step"], lambda: pending["values"])
        if self._signal is not None:
            self._signal.load_state_dict(state["signal"])
        self._apply(self._probes(self._step + 1))
        self._done = state["done"]
        for bucket, filled in zip(self._buckets, state["filled"] or [None] * len(self._buckets), strict=True):
            bucket.refill(filled, self._skipped())

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._on_gradients()
            return None
        evaluations = 0

        # The closure computes the gradients inside the step, and perhaps more than once.
        def read_then_drop() -> Any:
            nonlocal evaluations
            loss = closure()
            evaluations += 1
            if evaluations == 1:
                self._on_gradients()
            else:
                self._drop_gradients()
            return loss

        return (args[0], read_then_drop), {}

    @torch.no_grad()
    def _on_gradients(self) -> None:
        """Everything there is to do in a step, between its gradients and its update."""
        self._step += 1
        if self._pending is not None:
            reading, self._pending = self._pending, None
            if self._decide(reading.step, reading.values()):
                self._apply(self._probing)
            self._done = self._all_rests()
        if self._signal is not None:
            self._measure_progress(self._signal)
        elif self._measures(self._step) and (self._probing or len(self.frozen) < len(self._matrices)):
            self._measure()
        self._drop_gradients()
        probing = self._probes(self._step + 1)
        if probing != self._probing:
            self._apply(probing)

    def _drop_gradients(self) -> None:
        for matrix in self._matrices:
            if matrix.frozen is not None:
                matrix.drop_gradients()

    def _measures(self, step: int) -> bool:
        """True if the gradients of a step are looked at: for a reading, or for the one that follows to differ from."""
        return step % self.every == 0 or (self.metric != "norm" and (step + 1) % self.every == 0)

    def _probes(self, step: int) -> bool:
        """True if a step's gradients are those of the frozen matrices as well."""
        probe = self.thaw is not None and -(-step // self.every) % PROBE == 0
        return probe and self._measures(step) and any(matrix.frozen is not None for matrix in self._matrices)

    def _skipped(self) -> frozenset[int]:
        """The matrices that a reading leaves out."""
        return frozenset(i for i, m in enumerate(self._matrices) if m.frozen is not None and not self._probing)

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """(inv_scale, found_inf): what a GradScaler leaves on an optimizer that unscales and skips inside its step."""
        inv_scale = reciprocal(getattr(self._optimizer, "grad_scale", None))
        return inv_scale, getattr(self._optimizer, "found_inf", None)

    def _measure(self) -> None:
        skipped = self._skipped()
        for bucket in self._buckets:
            bucket.measure(self.metric, skipped, *self._scaling())
        if self._step % self.every:
            return
        transfer = self._summed([bucket.rows(self.metric) for bucket in self._buckets])
        self._pending = _Pending(self._step, lambda: self._values(transfer.arrays()))

    def _measure_progress(self, signal: Signal) -> None:
        if self._step % self.every == 0:
            transfer = self._summed(signal.measure(*self._scaling()))
            self._pending = _Pending(self._step, lambda: signal.falls(transfer.arrays()))
        elif self._measures(self._step):
            signal.keep(*self._scaling())

    def _summed(self, rows: list[Tensor]) -> Transfer:
        """Rows on their way to the host, added up over all ranks."""
        for row in rows:
            for group in self._groups:
                dist.all_reduce(row, group=group)
        return Transfer(rows)

    def _values(self, arrays: Sequence[npt.NDArray[np.float64]]) -> list[float]:
        """The mean over elements of each matrix, from the rows of `GradientBucket.rows`; NaN where nothing is known."""
        totals = np.zeros((len(self._matrices), 4))
        for bucket, rows in zip(self._buckets, arrays, strict=True):
            np.add.at(totals, bucket.owners, rows)
        metric, grad_abs, numel, broken = totals.T
        return np.where((broken == 0.0) & (grad_abs > 0.0), metric / numel, np.nan).tolist()

    def _decide(self, step: int, values: Sequence[float]) -> bool:
        """What follows from a reading. True if a matrix was frozen or thawed."""
        if self._signal is not None:
            values, frozen = self._signal.decide(step, values, self.patience, self.grace)
            for i in frozen:
                self._matrices[i].frozen = step
            self.history.append(MatrixReading(step, tuple(values), tuple(self.matrices[i] for i in frozen)))
            return bool(frozen)
        assert self.tau is not None
        froze, thawed = [], []
        for matrix, value in zip(self._matrices, values, strict=True):
            if math.isnan(value):
                continue
            if matrix.frozen is None and step > self.warmup and matrix.level is None:
                matrix.early.append(value)
            reading = matrix.in_units_of(self.scale, value)
            if matrix.frozen is not None:
                if self.thaw is not None and reading >= self.thaw:
                    matrix.thaw()
                    thawed.append(matrix.name)
            elif step >= self.grace:
                matrix.below = matrix.below + 1 if reading < self.tau else 0
                if matrix.below >= self.patience:
                    matrix.frozen = step
                    froze.append(matrix.name)
        self.history.append(MatrixReading(step, tuple(values), tuple(froze), tuple(thawed)))
        return bool(froze or thawed)

    def _all_rests(self) -> bool:
        return len(self.frozen) == len(self._matrices) and (self._signal is None or self._signal.done)

    def _apply(self, probing: bool) -> None:
        """From the next forward on compute the gradients of those matrices only that need one."""
        self._probing = probing
        for matrix in self._matrices:
            if matrix.frozen is None or probing:
                matrix.resume()
            else:
                matrix.halt()
        if not any(p.requires_grad for p in self._model.parameters()):
            self._matrices[-1].resume()
            self._matrices[-1].halt(detour=True)


@dataclass
class _Pending:
    """A reading on its way to the host."""

    step: int
    values: Callable[[], list[float]]


def _process_groups(model: nn.Module, params: Sequence[Tensor]) -> list[Any]:
    """The groups over which sums are added up so that all ranks that train these matrices decide alike."""
    meshes = {getattr(p, "device_mesh", None) for p in params}
    if len(meshes) > 1:
        raise ValueError(f"the matrices are on {len(meshes)} device meshes: {meshes}; make a GradES for each")
    mesh = meshes.pop()
    if mesh is not None:
        return list(mesh.get_all_groups())
    return [model.process_group] if isinstance(model, DistributedDataParallel) else []
