"""The gauge reads GR_T and GR_S off the gradients that training computes anyway."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .._torch_compat import loss_scale, scaling_attempt
from ..optim import AdamW, BucketSums, reciprocal, unwrapped
from ..policy import Advice, Target
from ..policy.advice import advice_of
from ..policy.watch import Watch
from ..reading import Reading
from .halves import _length as _length  # tuning imports them from here
from .halves import _part as _part
from .micro_batches import MicroBatches
from .sources import ClippingSource, FusedSource, OwnSource, Sample, require_readable
from .statistics import Statistics
from .windows import Windows

if TYPE_CHECKING:
    from .ranks import CommHook, Ranks


_numel_of = operator.attrgetter("plan.numel")


class Gauge:
    """Reads GR_T, GR_S, the gradient noise scale and the gradient norm while an optimizer trains.

    GR_T is V^/|m^|^2 of "GR-Gauge" (Wang and Chen), Eq. 18: the moving mean of the squared gradient norm, divided by
    the squared norm of the moving mean of the gradient, both bias-corrected. GR_S is (G2+S)/(B G2+S), Lemma 2 there,
    with S and G2 estimated from groups as in appendix D and in McCandlish et al., "An Empirical Model of Large-Batch
    Training", appendix A.1.

    On `grgauge.AdamW` with betas[0] equal to the gauge's beta the sums come from the step itself: the optimizer's first
    moment is the m of GR_T. Where it clips, m is an EMA of unclipped gradients, kept by the pass that reads their norm.
    With more than `sample` parameters there, and on any other optimizer, m is an EMA of the gauge's own over a sample
    of them, updated by the optimizer's step hooks. Gradients are read as the optimizer gets them.

    The gauge never changes training: weights end bit for bit as without it.

    Args:
        optimizer: any torch optimizer with dense gradients, or Lightning's or accelerate's wrapper around one.
        batch_size: global batch in samples (or in tokens, where losses are means over tokens: then the noise scale is
            in tokens too). Assign `gauge.batch_size` when the batch changes.
        groups: micro-batches in a step. None: as many as `micro_step` was called for. GR_S needs at least two. With
            `attach`, ranks are the groups.
        every: steps between readings.
        sample: number of parameters to read, where the gauge needs a pass of its own.
        beta: smoothing factor of both moments of GR_T, and over readings of S and G2. The published target of GR_T
            belongs to 0.9.
        seed: chooses the sample.
        scaler: the torch.amp.GradScaler in use, so that groups are read at their true scale.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter that is trained is not float32, bfloat16 or float16.

    Examples:
        >>> import torch, grgauge
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = grgauge.AdamW(model.parameters(), lr=1e-2)
        >>> gauge = grgauge.Gauge(optimizer, batch_size=32)
        >>> for step in range(40):
        ...     optimizer.zero_grad()
        ...     for _ in range(4):
        ...         x = torch.randn(8, 10)
        ...         loss = (model(x) - x[:, :1]).square().mean() / 4
        ...         loss.backward()
        ...         gauge.micro_step()
        ...     optimizer.step()
        >>> reading = gauge.reading()
        >>> reading.step, reading.ready
        (40, True)
        >>> 0.0 < reading.gr_s <= 1.0 <= reading.gr_t
        True
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
        require_readable(optimizer)
        self.batch_size, self.groups, self.every, self.beta = batch_size, groups, every, beta
        self._optimizer, self._scaler = optimizer, scaler if scaler is not None and scaler.is_enabled() else None
        self._attempt: object = None
        self._captured: list[BucketSums] = []
        self._removed = False
        self._sample, self._seed = Sample(optimizer, sample, seed), seed
        self._micro = MicroBatches(self._sample, lambda: self._due() and not _capturing(), self._inv_scale)
        self._windows = Windows(
            optimizer,
            Statistics(beta),
            self._micro,
            problem=lambda: self._source.problem(),
            # the norm of a sample is not that of the whole
            comparable=lambda: self._sample.share == 1.0 or isinstance(self._source, OwnSource),
            restart=self.restart,
        )
        self._source: FusedSource | ClippingSource | OwnSource
        if isinstance(optimizer, AdamW) and FusedSource.fits(optimizer, beta):
            self._source = FusedSource(optimizer, beta, self._on_step)
        elif isinstance(optimizer, AdamW) and ClippingSource.fits(optimizer, self._sample.share):
            self._source = ClippingSource(optimizer, beta, self._on_step)
        else:
            self._source = OwnSource(optimizer, self._sample, beta, self._on_step)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a Gauge is hooked into its optimizer and can be neither pickled nor copied: save gauge.state_dict(), make "
            "a Gauge on the other optimizer, and load the state there"
        )

    def attach(self, module: torch.nn.Module, *, comm_hook: CommHook | None = None, state: Any = None) -> None:
        """Make the ranks of a data-parallel module the groups of GR_S; no `micro_step` is needed then.

        Every rank takes part in one small asynchronous all-reduce a reading (with FSDP2 one for every 64 steps, where
        readings are further apart), and all of them hold the same readings. Where gradients accumulate, keep all
        micro-batches but the last from being reduced. With FSDP2, call `state_dict` on all ranks.

        Args:
            module: DistributedDataParallel, or the root module that torch.distributed.fsdp.fully_shard was applied to
                (a mesh of two dimensions is HSDP: all its ranks are groups).
            comm_hook: DDP: the communication hook that reduces the gradients. None is DDP's own all-reduce. The gauge
                measures before it and after it.
            state: the state that `comm_hook` is called with.

        Raises:
            TypeError: another kind of module.
            ValueError: the module has a communication hook already, or the gauge is attached.
            RuntimeError: the installed torch lacks the hook that this needs.
        """
        try:
            from .ranks import Ranks
        except ImportError as error:
            raise RuntimeError(
                f"torch {torch.__version__} has no hook in FSDP2's reduce-scatter ({error}); use micro_step()"
            ) from error

        if self._ranks is not None:
            raise ValueError("module is the second one: the gauge is attached to one already")
        self._windows.ranks = Ranks(
            module, self._sample.share, self._seed, self._due, self._inv_scale, comm_hook, state
        )

    def micro_step(self, samples: float | None = None, weight: float | None = None) -> None:
        """Call after each micro-batch's backward: the gradient that it has added is one group of GR_S.

        Gradients must accumulate over the step. On steps that are not read it costs nothing. Micro-batches from before
        gradients were cleared do not count, as in a step that was abandoned. If gradients were changed in another way
        between two micro-batches, or were not cleared before the step, GR_S skips the reading, with a note. To find
        that out, autograd hooks watch the gradient of one parameter; gradients that accumulate without autograd, as in
        the replay of a CUDA graph, are not checked.

        Where ranks are the groups (`attach`), it only passes this rank's samples and weight; those of several
        micro-batches add up. After `remove` it does nothing.

        Args:
            samples: size of the micro-batch in samples, or in tokens where losses are means over tokens. None:
                batch_size / groups.
            weight: share of its loss in that of the step, in any unit (its number of tokens, for example). None: equal
                shares.

        Raises:
            ValueError: a size or weight is not above 0.
            RuntimeError: a CUDA graph is being captured.
        """
        if _capturing():
            raise RuntimeError(
                "micro_step() cannot be captured in a CUDA graph: capture one micro-batch's backward, and call "
                "micro_step() after each replay"
            )
        for name, value in (("samples", samples), ("weight", weight)):
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, or None")
        if self._removed:
            return
        if not self._due():
            if self._ranks is None:
                self._micro.prepare()
        elif self._ranks is not None:
            self._ranks.count(samples, weight)
        else:
            self._micro.add(samples, weight)

    def split_backward(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Backward of one batch on one device. On steps that are read it runs in two halves, which are the groups of
        GR_S.

        The halves' losses are weighted by their sizes, so gradients add up to the same mean over the batch. A batch of
        one sample is not split, and gives no GR_S.

        Args:
            loss_fn: maps a batch to its mean loss.
            batch: a tensor [samples, ...], or a tuple, list or dict of such.

        Returns:
            The loss, detached.

        Raises:
            ValueError: the tensors are of unequal length, or there are none; or ranks are the groups.

        Examples:
            >>> import torch, grgauge
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> gauge = grgauge.Gauge(optimizer, batch_size=16, every=1)
            >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
            >>> loss = gauge.split_backward(lambda b: torch.nn.functional.mse_loss(model(b[0]), b[1]), (x, y))
            >>> optimizer.step()
            >>> gauge.reading().gr_s is not None
            True
        """
        if self._ranks is not None:
            raise ValueError("split_backward is for one device; the ranks of the attached module are groups already")
        size = _length(batch)
        if self._removed or not self._due() or size < 2:
            loss = loss_fn(batch)
            loss.backward()
            return loss.detach()
        total = torch.zeros((), dtype=torch.float32)
        for part in (slice(0, size // 2), slice(size // 2, size)):
            samples = part.stop - part.start
            loss = loss_fn(_part(batch, part)) * (samples / size)
            loss.backward()
            self.micro_step(samples, samples)
            total = total.to(loss.device) + loss.detach()
        return total

    def replayed(self) -> None:
        """Call after each replay of a CUDA graph that a step of the optimizer was captured in, on the same stream.

        A replay runs no Python, and the next one overwrites its sums. This method copies them, and they count like
        those of any other step. The captured step itself is not run and does not count. With several such graphs, the
        sums are those of the one captured last.

        Raises:
            RuntimeError: no step was captured.
        """
        if not self._captured:
            raise RuntimeError("replayed() is for steps in a CUDA graph, and this gauge has seen none captured")
        if not self._removed:
            self._take([replace(bucket, stats=bucket.stats.clone()) for bucket in self._captured])

    def reading(self) -> Reading | None:
        """The newest finished reading. Never waits for the device.

        Steps only collect sums; readings are computed here, on demand. Attached to a module, a reading comes one step
        late, on all ranks in the same step, and this method may wait for the ranks' sum.

        Returns:
            The reading, None before the first.
        """
        return self._windows.reading()

    def advice(self, loss: float | Tensor | None = None, *, target: Target | None = None) -> Advice | None:
        """What the readings so far mean for learning rate and batch size. Never waits for the device.

        It rests on the readings around step 50 after learning rate or batch last went up, warm-up included, as late
        ones say less; a schedule that decays changes nothing, and the advice is then on its peak. The distances are
        measured ones, of recorded trainings: see `grgauge.Advice`.

        Args:
            loss: the training loss of this step; without it nobody can tell that a run has diverged. It is compared
                with the first one given, so give it from the start. A tensor on a device is waited for.
            target: where readings should be, if not at the published target.

        Returns:
            The advice, None before the first reading.

        Examples:
            >>> import torch, grgauge
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(10, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
            >>> gauge = grgauge.Gauge(optimizer, batch_size=64)
            >>> for _ in range(60):
            ...     optimizer.zero_grad()
            ...     x = torch.randn(64, 10)
            ...     loss = gauge.split_backward(lambda x: (model(x) - x.sum(1, keepdim=True)).square().mean(), x)
            ...     optimizer.step()
            >>> gauge.advice(loss).lr.direction
            'raise'
        """
        self.reading()
        watch = self._windows.watch
        if loss is not None:
            watch.lost(float(loss))
        return advice_of(watch, target)

    def restart(self) -> None:
        """Start cold, as after a change of learning rate or batch: earlier steps no longer count.

        On `grgauge.AdamW` the optimizer's first moment is m; it carries over, and only V starts anew.
        """
        self._windows.statistics.restart()
        self._windows.watch.restart(self._windows.step)
        self._windows.drop()
        self._source.restart()
        self._micro.drop()

    def remove(self) -> None:
        """Unhook the gauge from its optimizer; the newest reading stays. Harmless when repeated."""
        if self._removed:
            return
        self._removed = True
        self._source.remove()
        self._micro.remove()
        if self._ranks is not None:
            self._ranks.remove()

    def state_dict(self) -> dict[str, Any]:
        """All that readings depend on, to be taken between two steps. Waits for sums on their way to the host.

        Returns:
            Plain values and tensors, for torch.save.
        """
        self._windows.finish(self)
        return {
            "step": self._windows.step,
            "batch_size": self.batch_size,
            "shards": self._shards,
            **self._windows.statistics.state_dict(),
            "sample": self._sample.state_dict(),
            "source": self._source.state_dict(),
            "watch": self._windows.watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; the optimizer's own state must be loaded as well.

        On another number of ranks S, G2 and V continue, since they mean the same there. An EMA of the gauge's own that
        was sharded cannot continue: GR_T then starts cold, with a warning. Call `attach` first.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: the state belongs to another kind of optimizer or to other parameters; the gauge is then as it
                was.
        """
        statistics, watch = Statistics.from_state(state, self.beta), Watch()
        if "watch" in state:  # not in states of before there was advice
            watch.load_state_dict(state["watch"])
        before = [(part, dict(vars(part))) for part in (self._sample, self._source)]
        try:
            if self._shards != state["shards"] and state["source"]["kind"] != "fused":
                warnings.warn(
                    f"the state was made of {state['shards']} shards, these are {self._shards}: GR_T's EMA, spread "
                    "over them, starts cold",
                    stacklevel=2,
                )
                self._source.restart()
                statistics.restart_temporal()
            else:
                self._sample.load_state_dict(state["sample"])
                self._source.load_state_dict(state["source"])
        except BaseException:
            for part, contents in before:
                vars(part).update(contents)
            raise
        self._micro.drop()
        self._windows.drop()
        self._windows.statistics, self._windows.watch, self._windows.newest = statistics, watch, None
        self._windows.step, self.batch_size = state["step"], state["batch_size"]

    @property
    def _shards(self) -> int:
        """Ranks that parameters are spread over."""
        return 1 if self._ranks is None else self._ranks.size // self._ranks.replicas

    def _due(self) -> bool:
        """True if the step in progress will be read."""
        if self._scaler is not None and scaling_attempt(self._scaler) is not self._attempt:
            # Each update() makes another dict. On overflow GradScaler does not call step() of most optimizers, so
            # micro-batches of the attempt before are still here.
            self._attempt = scaling_attempt(self._scaler)
            self._micro.drop()
            if self._ranks is not None:
                self._ranks.forget()
        return (self._windows.step + 1) % self.every == 0

    def _inv_scale(self) -> Tensor | None:
        """The factor that undoes the loss scale of gradients in progress."""
        return reciprocal(None if self._scaler is None else loss_scale(self._scaler))

    def _on_step(self, sums: list[BucketSums]) -> None:
        if not _capturing():
            self._take(sums)
        elif self._ranks is None:
            self._captured = sums
        else:
            raise RuntimeError("a step cannot be captured in a CUDA graph while its gauge is attached to a module")

    def _take(self, sums: list[BucketSums]) -> None:
        something = any(map(_numel_of, sums)) or self._ranks is not None
        self._windows.take(sums if something else [], self)

    @property
    def _ranks(self) -> Ranks | None:
        return self._windows.ranks


def _capturing() -> bool:
    """True while the current stream captures work in a CUDA graph instead of running it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
