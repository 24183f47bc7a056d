"""Gauges as a callback of Lightning's Trainer: one line, any optimizer.

Trainer(..., callbacks=[GaugeCallback()])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from .._validation import require, require_count
from ..gauge import Gauge
from ..optim import unwrapped
from ..optim.learning_rates import highest_lr, scale
from ..policy import Target
from ..reading import Reading
from .raw_gradients import RawGradients
from .verdicts import Verdicts, values
from .versions import require_version

try:
    import lightning
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        SingleDeviceStrategy,
        Strategy,
    )
    from lightning.pytorch.utilities.data import extract_batch_size
except ImportError as error:
    raise ImportError(
        "grgauge.integrations.lightning needs lightning: pip install 'grgauge-kernels[lightning]'"
    ) from error
require_version("lightning", lightning.__version__, (2, 5))


class GaugeCallback(Callback):
    """Reads GR_T, GR_S and the noise scale of a fit, into its logs and checkpoints.

    batch_size   global batch in samples; None: the training dataloader's, times accumulation and ranks
    every        steps between readings
    sample, beta, seed   as for `grgauge.Gauge`
    window       steps between two verdicts
    act          "advise": prints the verdict, and training ends in the very weights that it ends in without the
                 callback. "lr": also multiplies the learning rate, and all that schedules compute it from, by the
                 verdict's factor: at the ends of windows in the first tenth of the training (of the first window at
                 least), unless a schedule is warming up or GR_S says that GR_T is blind
    stop_when    called with each new reading; the fit ends when it returns True
    target       what verdicts are about
    optimizer    which of several the gauge is on
    print        takes a line; None: nothing is printed

    Where Lightning clips, gradients are read before. Micro-batches are the groups of GR_S, under DDP the ranks are: on
    one device without accumulation it is not available; halve the batch and set accumulate_grad_batches=2. Values are
    logged as gr_t, gr_s and noise_scale, and only what exists. `reading` is the newest, `readings` are all of this fit.

    Raises ValueError for a number out of range, and where the batch size cannot be known; RuntimeError when training
    begins under another strategy than DDP's or one device's, or elsewhere than on CPU or CUDA.
    """

    def __init__(
        self,
        batch_size: float | None = None,
        *,
        every: int = 5,
        sample: int = 50_000_000,
        beta: float = 0.9,
        seed: int = 0,
        window: int = 50,
        act: Literal["advise", "lr"] = "advise",
        stop_when: Callable[[Reading], bool] | None = None,
        target: Target | None = None,
        optimizer: int = 0,
        print: Callable[[str], object] | None = print,
    ) -> None:
        require_count("every", every, 1)
        require(stop_when is None or callable(stop_when), "stop_when", stop_when, "None or a function of a reading")
        self.batch_size, self.stop_when = batch_size, stop_when
        self.readings: list[Reading] = []
        self.gauge: Gauge | None = None
        self._verdicts = Verdicts(window, act, every, target)
        self._options: dict[str, Any] = {"every": every, "sample": sample, "beta": beta, "seed": seed}
        self._index, self._print = optimizer, print
        self._raw: RawGradients | None = None
        self._saved: dict[str, Any] | None = None
        self._in_groups, self._size = False, 0

    @property
    def reading(self) -> Reading | None:
        """The newest reading of this fit."""
        return self.readings[-1] if self.readings else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse(trainer.strategy)
        if self.gauge is not None:
            self.gauge.remove()
        optimizer = unwrapped(trainer.optimizers[self._index])
        self._raw = RawGradients(pl_module, optimizer) if trainer.gradient_clip_val else None
        size = self.batch_size or _batch_size(trainer)
        self.gauge = Gauge(self._raw or optimizer, size, scaler=_scaler(trainer), **self._options)
        if isinstance(trainer.strategy, DDPStrategy):
            assert trainer.strategy.model is not None
            self.gauge.attach(trainer.strategy.model)
        self._in_groups = trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
        self.readings = []
        self._verdicts.restart(highest_lr(optimizer))
        if self._saved is not None:
            self.gauge.load_state_dict(self._saved)  # now that the optimizer has its own state back
            self._saved = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.batch_size is None:
            self._size = extract_batch_size(batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.gauge is not None
        if self._in_groups:
            self.gauge.micro_step(self._size or None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._raw is None or unwrapped(optimizer) is not unwrapped(trainer.optimizers[self._index]):
            return
        scaler = _scaler(trainer)
        if scaler is None:
            self._raw.step()
        else:
            self._raw.step_scaled(scaler, unwrapped(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.gauge is not None
        reading, optimizer = self.gauge.reading(), trainer.optimizers[self._index]
        if reading is None:
            return
        # Each time: a logger looks at some steps only, and a reading may come between.
        for name, value in values(reading).items():
            pl_module.log(name, value, batch_size=1)
        new = None if reading is self.reading else reading
        if new is not None:
            self.readings.append(new)
            if self.stop_when is not None and self.stop_when(new):
                trainer.should_stop = True
        said = self._verdicts.observe(new, highest_lr(optimizer), trainer.estimated_stepping_batches)
        if said is None:
            return
        line, factor = said
        if factor != 1.0:
            scale(optimizer, [config.scheduler for config in trainer.lr_scheduler_configs], factor)
            self._verdicts.changed(factor)
            self.gauge.restart()
        if self._print is not None and trainer.is_global_zero:
            self._print(line)

    def state_dict(self) -> dict[str, Any]:
        if self._saved is not None:
            return self._saved
        return {} if self.gauge is None else self.gauge.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None


def _batch_size(trainer: Trainer) -> int:
    size = getattr(trainer.train_dataloader, "batch_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"batch_size must be given, as GaugeCallback(batch_size=...): a {type(trainer.train_dataloader).__name__} "
            f"does not tell, its batch_size is {size!r}"
        )
    return size * trainer.accumulate_grad_batches * trainer.world_size


def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)


def refuse(strategy: Strategy) -> None:
    """Say in one sentence what cannot be gauged."""
    name, device = type(strategy).__name__, strategy.root_device.type
    if isinstance(strategy, FSDPStrategy):
        why = (
            "use ModelParallelStrategy or a loop of your own with fully_shard (FSDP2), and grgauge.Gauge with attach()"
        )
    elif isinstance(strategy, DeepSpeedStrategy):
        why = "DeepSpeed keeps gradients in buffers of its own; use DDPStrategy"
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        why = "where the module is of DDP or FSDP2, use grgauge.Gauge with attach() in a callback of your own"
    elif device not in ("cpu", "cuda"):
        why = f"there is no kernel for {device}"
    else:
        return
    raise RuntimeError(
        f"the Trainer's strategy is {name} on {device}; GaugeCallback supports one device and DDPStrategy, on CPU and "
        f"CUDA: {why}"
    )
