"""GradES: the weight matrices of a transformer leave training one by one, as their gradients come to rest.

Source: Wen et al., "GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
arXiv 2509.01842v3, Eq. 1 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import grgauge_kernels as gk

from ..gauge import Transfer
from ..optim import local, unwrapped
from .matrix import Matrix, Scale, monitored

Metric = Literal["delta", "norm"]

COLUMN: dict[Metric, int] = {"delta": gk.STATS.index("delta_abs"), "norm": gk.STATS.index("grad_abs")}
GRAD_ABS, NONFINITE = gk.STATS.index("grad_abs"), gk.STATS.index("nonfinite")

PROBE = 4
"""With `thaw`, every how many readings the frozen matrices are read as well."""

LARGEST_SAMPLE = 2**24
"""Elements, 64 MiB of state: what is sampled of the largest models."""


@dataclass(frozen=True)
class MatrixReading:
    """One reading of all monitored matrices, and what followed from it.

    Attributes:
        step: The optimizer step whose gradients were read.
        values: Mean over elements of |g_t - g_{t-1}| or |g_t|, in the order of `GradES.matrices`; NaN where there is
            none.
        froze: Matrices that this step's update was the last of.
        thawed: Frozen matrices that are updated again from step + 2 on.
    """

    step: int
    values: tuple[float, ...]
    froze: tuple[str, ...] = ()
    thawed: tuple[str, ...] = ()


class GradES:
    """Freezes weight matrices one by one, each at the first readings of its own gradient that are below `tau`.

        delta   G_W(t) = sum |g_t - g_{t-1}|     (Eq. 1, Algorithm 1)
        norm    G_W(t) = sum |g_t|               (the paper's text)

    A LoRA pair is one matrix: G_A + G_B, and A and B freeze together. Gradients are read in a step hook of the
    optimizer, as the optimizer gets them: after any clipping of your own, and without GradScaler's scale. A reading
    looks at a fixed sample of elements. It is acted on one step later, when it has reached the host: nothing waits for
    the device, and all ranks, whose sums are added up, decide alike. Steps are calls of optimizer.step().

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
    all, which has no gradient to differ from; one with a NaN or an infinity in its gradients or in those of the step
    before; one in a step that GradScaler skips; and that of a matrix whose gradient is missing or all zeros. Nothing is
    below a level that is not known yet.

    Args:
        model: The module that is trained: under DDP the wrapped one, under FSDP2 the one after fully_shard.
        optimizer: Any torch optimizer but LBFGS, over all or some of the model's parameters; only those are monitored.
        tau: Freeze below this. `scale` says in which unit.
        total_steps: Optimizer steps that the run is to have.
        metric: "delta" or "norm".
        alpha: No freezing in the first ceil(alpha total_steps) steps.
        patience: Readings below tau in a row that it takes.
        thaw: A frozen matrix takes part again once it reads this or more, in the units of tau. To find out, the
            gradients of frozen matrices are computed for every fourth reading, in one step ("norm") or two ("delta"); a
            clipping of your own sees them then. None: frozen for good, as in the paper.
        modules: "auto", or a regular expression. "auto" takes the 2-D weights of linear layers (Linear, Conv1D, fused
            qkv; no embeddings) inside repeated blocks: the modules with children in a ModuleList, or modules of one
            type in a Sequential or ModuleDict. A weight that is tied to one elsewhere is left out. A regular expression
            is searched for in the names of all trained parameters with two or more dimensions: names as in
            named_parameters(), without ".weight", and with "lora" for a pair.
        scale: "level": tau is a share of the matrix's own level: the mean of its first five readings after `warmup`.
            "element": tau is a mean over elements. "matrix": a sum over the matrix, as in the paper.
        warmup: Steps before the level is taken; None: a tenth of total_steps.
        every: Steps between readings; between them nothing is computed. At least 2 with "delta", which looks at two.
        sample: Elements to read on each rank: at least a block of each matrix, small ones whole. None: as many as keep
            the state of "delta" at 0.5 % of the size of the monitored parameters, at most 2^24.
        seed: Which elements a sample takes.
        enough: Share of the monitored elements that must be frozen for `done`. 1 means all, as in the paper. With less,
            a last matrix that never comes to rest does not hold up the end.

    Raises:
        ValueError: For a number out of range, for `modules` that match nothing, and for matrices on different device
            meshes.
        TypeError: For LBFGS, whose steps mix all parameters.

    Examples:
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> grades = GradES(model, optimizer, tau=0.5, total_steps=100)
        >>> grades
        GradES(0 of 2 matrices frozen; mean |g_t - g_(t-1)| < 0.5 of its own early level, from step 50 on)
        >>> grades.matrices, grades.done
        (('0.0', '1.0'), False)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        tau: float,
        total_steps: int,
        metric: Metric = "delta",
        alpha: float = 0.5,
        patience: int = 2,
        thaw: float | None = None,
        modules: str = "auto",
        scale: Scale = "level",
        warmup: int | None = None,
        every: int = 10,
        sample: int | None = None,
        seed: int = 0,
        enough: float = 1.0,
    ) -> None:
        for name, word, words in (("metric", metric, get_args(Metric)), ("scale", scale, get_args(Scale))):
            if word not in words:
                raise ValueError(f"{name} is {word!r}; it must be one of {', '.join(map(repr, words))}")
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer is LBFGS; it must be one that leaves parameters without a gradient where they are"
            )
        if not 0.0 < tau < math.inf:
            raise ValueError(f"tau is {tau}; it must be above 0 and finite")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
        if not 0.0 < enough <= 1.0:
            raise ValueError(f"enough is {enough}; it must lie in (0, 1]")
        least_every = 2 if metric == "delta" else 1
        warmup = math.ceil(total_steps / 10) if warmup is None else warmup
        for name, value, least in (
            ("total_steps", total_steps, 1),
            ("patience", patience, 1),
            ("warmup", warmup, 0),
            ("every", every, least_every),
            ("sample", 1 if sample is None else sample, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if thaw is not None and not thaw > tau:
            raise ValueError(f"thaw is {thaw}; it must be above tau = {tau}, or None")
        self.tau, self.thaw, self.metric, self.scale = tau, thaw, metric, scale
        self.patience, self.warmup, self.every, self.enough = patience, warmup, every, enough
        self.grace = math.ceil(alpha * total_steps)
        self.history: list[MatrixReading] = []
        self._done = False
        self._model, self._optimizer = model, optimizer
        self._matrices = monitored(model, optimizer, modules)
        self._groups = _process_groups(model, [p for matrix in self._matrices for p in matrix.params])
        self._buckets = _buckets(self._matrices, sample, seed)
        self._step = 0
        self._pending: _Pending | None = None
        self._probing = False
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def __repr__(self) -> str:
        what = {"delta": "|g_t - g_(t-1)|", "norm": "|g_t|"}[self.metric]
        limit = {
            "level": f"mean {what} < {self.tau:g} of its own early level",
            "element": f"mean {what} < {self.tau:g}",
            "matrix": f"sum {what} < {self.tau:g}",
        }[self.scale]
        return (
            f"GradES({len(self.frozen)} of {len(self._matrices)} matrices frozen; {limit}, from step {self.grace} on)"
        )

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
    def done(self) -> bool:
        """True if all monitored matrices are frozen, or `enough`: the signal to stop. The same on all ranks."""
        return self._done

    def remove(self) -> None:
        """Unhook from optimizer and model; what was frozen can be trained again."""
        self._hook.remove()
        for matrix in self._matrices:
            matrix.resume()

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on, to be taken between two steps; of FSDP2, this rank's. Waits for a reading."""
        pending = None if self._pending is None else {"step": self._pending.step, "values": self._pending.values()}
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
        self._pending = None if pending is None else _Pending(pending["step"], lambda: list(pending["values"]))
        self._apply(self._probes(self._step + 1))
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
        if self._measures(self._step) and (self._probing or len(self.frozen) < len(self._matrices)):
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
        return step % self.every == 0 or (self.metric == "delta" and (step + 1) % self.every == 0)

    def _probes(self, step: int) -> bool:
        """True if a step's gradients are those of the frozen matrices as well."""
        probe = self.thaw is not None and -(-step // self.every) % PROBE == 0
        return probe and self._measures(step) and any(matrix.frozen is not None for matrix in self._matrices)

    def _skipped(self) -> frozenset[int]:
        """The matrices that a reading leaves out."""
        return frozenset(i for i, m in enumerate(self._matrices) if m.frozen is not None and not self._probing)

    def _measure(self) -> None:
        skipped = self._skipped()
        # What a GradScaler leaves on an optimizer that unscales and skips inside its step.
        scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        for bucket in self._buckets:
            bucket.measure(self.metric, skipped, scale, found_inf)
        if self._step % self.every:
            return
        rows = [bucket.rows(self.metric) for bucket in self._buckets]
        for row in rows:
            for group in self._groups:
                dist.all_reduce(row, group=group)
        transfer = Transfer(rows)
        self._pending = _Pending(self._step, lambda: self._values(transfer.arrays()))

    def _values(self, arrays: Sequence[npt.NDArray[np.float64]]) -> list[float]:
        """The mean over elements of each matrix, from the rows of `_Bucket.measure`; NaN where nothing is known."""
        totals = np.zeros((len(self._matrices), 4))
        for bucket, rows in zip(self._buckets, arrays, strict=True):
            np.add.at(totals, bucket.owners, rows)
        metric, grad_abs, numel, broken = totals.T
        return np.where((broken == 0.0) & (grad_abs > 0.0), metric / numel, np.nan).tolist()

    def _decide(self, step: int, values: Sequence[float]) -> bool:
        """What follows from a reading. True if a matrix was frozen or thawed."""
        froze, thawed = [], []
        for matrix, value in zip(self._matrices, values, strict=True):
            if math.isnan(value):
                continue
            if matrix.frozen is None and step > self.warmup and matrix.level is None:
                matrix.early.append(value)
            reading = matrix.in_units_of(self.scale, value)
            if matrix.frozen is not None:
                if self.thaw is not None and reading >= self.thaw:
                    matrix.frozen, matrix.below = None, 0
                    matrix.drop_gradients()  # as in this step only some ways of freezing have one
                    thawed.append(matrix.name)
            elif step >= self.grace:
                matrix.below = matrix.below + 1 if reading < self.tau else 0
                if matrix.below >= self.patience:
                    matrix.frozen = step
                    froze.append(matrix.name)
        self.history.append(MatrixReading(step, tuple(values), tuple(froze), tuple(thawed)))
        return bool(froze or thawed)

    def _apply(self, probing: bool) -> None:
        """From the next forward on compute the gradients of those matrices only that need one."""
        self._probing = probing
        frozen = sum(matrix.numel for matrix in self._matrices if matrix.frozen is not None)
        self._done = frozen >= self.enough * sum(matrix.numel for matrix in self._matrices)
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


class _Bucket:
    """The monitored parameters of one device and dtype; under FSDP2 this rank's shards of them.

    owners  int64 [segments], the matrix that each belongs to
    """

    def __init__(self, params: list[nn.Parameter], owners: list[int], share: float, seed: int) -> None:
        self.params, self.owners = params, np.array(owners, dtype=np.int64)
        self._bucket = gk.Bucket([local(p) for p in params])
        self._sample, self._seed = max(1, round(share * self._bucket.numel)), seed
        self._sizes = torch.tensor(self._bucket.sizes, dtype=torch.float64, device=self._bucket.device)
        self._skipped: frozenset[int] | None = None
        self._lay_out(frozenset())

    def _lay_out(self, skipped: frozenset[int]) -> None:
        """Look at all matrices but `skipped`. What `previous` held was laid out otherwise, and is lost."""
        if skipped == self._skipped:
            return
        segments = np.flatnonzero(np.isin(self.owners, list(skipped))).tolist()
        self._plan = self._bucket.plan(self._sample, self._seed, skip=segments)
        self._scale = torch.from_numpy(self._plan.scale).to(self._bucket.device)
        self._skipped = skipped
        self._previous: Tensor | None = None
        # Unusable elements of each segment, in the newest gradients and in those that they are compared with.
        self._broken = self._broken_before = torch.ones_like(self._sizes)

    def measure(self, metric: Metric, skipped: frozenset[int], scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Read the gradients, and with "delta" keep their sample for the next call to differ from."""
        self._lay_out(skipped)
        device = self._bucket.device
        if metric == "delta" and self._previous is None:
            self._previous = torch.zeros(self._plan.numel, device=device)
        # A missing gradient has its parameter as a stand-in of the right size.
        grads = [local(p if p.grad is None else p.grad) for p in self.params]
        inv_scale = None if scale is None else scale.to(device).float().reciprocal()
        self._stats = gk.measure_(grads, self._plan, previous=self._previous, inv_scale=inv_scale)
        self._broken_before, self._broken = self._broken, self._stats[:, NONFINITE].clone()
        for i, p in enumerate(self.params):
            if p.grad is None:
                self._broken[i].fill_(1.0)
        if found_inf is not None:
            self._broken += found_inf.to(device)

    def rows(self, metric: Metric) -> Tensor:
        """float64 [segments, 4]: of each whole segment the metric's sum and sum |g|, its elements, and how many of the
        sampled ones were unusable."""
        broken = self._broken + self._broken_before if metric == "delta" else self._broken
        columns = [self._stats[:, i] * self._scale for i in (COLUMN[metric], GRAD_ABS)]
        return torch.stack([*columns, self._sizes, broken], dim=1)

    def filled(self) -> tuple[Tensor, Tensor] | None:
        """The gradients that the next ones are to differ from, and how much of them is unusable."""
        return None if self._previous is None else (self._previous.clone(), self._broken.clone())

    def refill(self, filled: tuple[Tensor, Tensor] | None, skipped: frozenset[int]) -> None:
        """Take up what `filled` returned; of another sample, or with None, start anew."""
        self._skipped = None
        self._lay_out(skipped)
        if filled is not None and filled[0].numel() == self._plan.numel:
            self._previous, self._broken = (t.to(self._bucket.device, copy=True) for t in filled)


def _buckets(matrices: list[Matrix], sample: int | None, seed: int) -> list[_Bucket]:
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[nn.Parameter], list[int]]] = {}
    for i, matrix in enumerate(matrices):
        for p in matrix.params:
            params, owners = alike.setdefault((p.device, p.dtype), ([], []))
            params.append(p)
            owners.append(i)
    shards = [local(p) for matrix in matrices for p in matrix.params]
    total = max(1, sum(t.numel() for t in shards))
    if sample is None:
        budget = sum(t.numel() * t.element_size() for t in shards) // 200
        sample = min(LARGEST_SAMPLE, budget // torch.float32.itemsize)
    share = min(1.0, sample / total)
    return [_Bucket(params, owners, share, seed) for params, owners in alike.values()]


def _process_groups(model: nn.Module, params: Sequence[Tensor]) -> list[Any]:
    """The groups over which sums are added up so that all ranks that train these matrices decide alike."""
    meshes = {getattr(p, "device_mesh", None) for p in params}
    if len(meshes) > 1:
        raise ValueError(f"the matrices are on {len(meshes)} device meshes: {meshes}; make a GradES for each")
    mesh = meshes.pop()
    if mesh is not None:
        return list(mesh.get_all_groups())
    return [model.process_group] if isinstance(model, DistributedDataParallel) else []
