"""Gauges and GradES as callbacks of transformers' Trainer: one line, any optimizer.

    Trainer(..., callbacks=[GaugeCallback()])

The Trainer clips gradients before it calls its callbacks, and it does not hand itself to them. The callbacks here find
it in the frame that calls `on_train_begin`, and read the gradients in its `training_step`, after each backward.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._validation import require_count
from ..gauge import Gauge
from ..grades import GradES
from ..optim import unwrapped
from ..optim.learning_rates import highest_lr, scale
from ..policy import Target
from ..reading import Reading
from .raw_gradients import RawGradients
from .verdicts import Verdicts, values
from .versions import require_version

try:
    import transformers
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "grgauge.integrations.transformers needs transformers: pip install 'grgauge-kernels[transformers]'"
    ) from error
require_version("transformers", transformers.__version__, (5, 10))


class _Watching(TrainerCallback):
    """What both callbacks share: a place before clipping, values in the Trainer's logs, state in its checkpoints."""

    file: str

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._raw: RawGradients | None = None

    def _open(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Begin to read: a training starts, anew or from a checkpoint."""
        raise NotImplementedError

    def _close(self) -> None:
        """Unhook from the training before."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _values(self) -> dict[str, float]:
        """What is new for the Trainer's logs."""
        raise NotImplementedError

    def _after(self, inputs: Mapping[str, Any], items: Tensor | int | None) -> None:
        """Called after each micro-batch's backward."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, checkpoint = _caller()
        _refuse(trainer)
        self._close()
        model, optimizer = trainer.model, unwrapped(_optimizer(trainer))
        if not isinstance(model, nn.Module):
            raise RuntimeError(f"the Trainer's model is {model!r}; it must be a torch.nn.Module")
        self._raw = RawGradients(model, optimizer) if args.max_grad_norm > 0 else None
        self._open(trainer, optimizer if self._raw is None else self._raw)
        if self._trainer is not trainer:
            self._wrap(trainer)
        self._trainer = trainer
        if state.global_step > 0:
            self._resume(trainer, checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.output_dir is None:
            raise RuntimeError("output_dir of the TrainingArguments is None; it must be the folder of the checkpoints")
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and args.should_save:
            torch.save(self._state(), folder / f"{self.file}.pt")

    def _resume(self, trainer: Trainer, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint) / f"{self.file}.pt"
        if path is not None and path.is_file():
            self._load(torch.load(path, map_location=trainer.args.device, weights_only=True))
        else:
            warnings.warn(
                f"{type(self).__name__} starts cold: the training goes on from step {trainer.state.global_step}, and "
                f"its checkpoint holds no {self.file}.pt",
                stacklevel=2,
            )

    def _wrap(self, trainer: Trainer) -> None:
        training_step, log = trainer.training_step, trainer.log

        def read(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            loss = training_step(model, inputs, num_items_in_batch, **kwargs)
            self._after(inputs, num_items_in_batch)
            if self._raw is not None and trainer.accelerator.sync_gradients:
                self._raw.step()
            return loss

        def add_values(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log({**logs, **self._values()} if "loss" in logs else logs, *args, **kwargs)

        trainer.training_step = read  # type: ignore[method-assign]
        trainer.log = add_values  # type: ignore[method-assign]


class GaugeCallback(_Watching):
    """Reads GR_T, GR_S and the noise scale of a Trainer's training, into its logs and checkpoints.

    batch_size   global batch in samples; None: the Trainer's
    every        steps between readings
    sample, beta, seed   as for `grgauge.Gauge`
    window       steps between two verdicts
    act          "advise": prints the verdict, and training ends in the very weights that it ends in without the
                 callback. "lr": also multiplies the learning rate, and all that the schedule computes it from, by the
                 verdict's factor: at the ends of windows in the first tenth of the training (of the first window at
                 least), unless the schedule is warming up or GR_S says that GR_T is blind
    target       what verdicts are about
    print        takes a line; None: nothing is printed

    Where the Trainer clips, gradients are read before. Micro-batches are the groups of GR_S, under DDP the ranks are:
    in one process without accumulation it is not available; halve the batch and set gradient_accumulation_steps=2.
    Where the Trainer divides the loss by the tokens of all of them, each weighs as much as it has. Values are logged as
    gr_t, gr_s and noise_scale, and only what exists. `reading` is the newest, `readings` are all of this run.

    Raises ValueError for a number out of range; RuntimeError when training begins under anything but DDP on several
    devices or processes, or in float16.
    """

    file = "gauge"

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
        target: Target | None = None,
        print: Callable[[str], object] | None = print,
    ) -> None:
        super().__init__()
        require_count("every", every, 1)
        self.batch_size = batch_size
        self._verdicts = Verdicts(window, act, every, target)
        self.readings: list[Reading] = []
        self.gauge: Gauge | None = None
        self._options: dict[str, Any] = {"every": every, "sample": sample, "beta": beta, "seed": seed}
        self._every, self._print = every, print
        self._steps, self._in_groups = 0, False
        self._counting: RemovableHandle | None = None
        self._logged: Reading | None = None

    @property
    def reading(self) -> Reading | None:
        """The newest reading of this run."""
        return self.readings[-1] if self.readings else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        assert self.gauge is not None
        assert trainer is not None
        reading = self.gauge.reading()
        new = None if reading is self.reading else reading
        if new is not None:
            self.readings.append(new)
        said = self._verdicts.observe(new, highest_lr(_optimizer(trainer)), state.max_steps)
        if said is None:
            return
        line, factor = said
        if factor != 1.0:
            scale(_optimizer(trainer), [trainer.lr_scheduler], factor)
            self._verdicts.changed(factor)
            self.gauge.restart()
        if self._print is not None and trainer.is_world_process_zero():
            self._print(line)

    def _open(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        args = trainer.args
        size = self.batch_size or trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.gauge = Gauge(optimizer, size, **self._options)
        if args.world_size > 1:
            self.gauge.attach(trainer.model_wrapped)
        self._in_groups = args.gradient_accumulation_steps > 1 or args.world_size > 1
        self.readings, self._logged, self._steps = [], None, 0
        self._verdicts.restart(highest_lr(_optimizer(trainer)))
        self._counting = optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._steps += 1

    def _close(self) -> None:
        if self.gauge is not None and self._counting is not None:
            self.gauge.remove()
            self._counting.remove()

    def _state(self) -> dict[str, Any]:
        assert self.gauge is not None
        return self.gauge.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        assert self.gauge is not None
        self.gauge.load_state_dict(state)
        self._steps = state["step"]

    def _values(self) -> dict[str, float]:
        reading = self.reading
        if reading is None or reading is self._logged:
            return {}
        self._logged = reading
        return values(reading)

    @property
    def _due(self) -> bool:
        """True if the step in progress is read."""
        return (self._steps + 1) % self._every == 0

    def _after(self, inputs: Mapping[str, Any], items: Tensor | int | None) -> None:
        trainer = self._trainer
        assert self.gauge is not None
        assert trainer is not None
        # Sizes and weights are asked for on steps that are read only: to know them may wait for the device.
        if self._in_groups and self._due:
            self.gauge.micro_step(*_share(trainer, inputs, items, self.gauge.batch_size))


class GradESCallback(_Watching):
    """Runs `grgauge.GradES` in a Trainer's training, LoRA included, and ends it when all matrices are frozen.

    options   as for `grgauge.GradES`; `total_steps` are the Trainer's. metric="signal" needs nothing else; the paper's
              metrics need `tau`

    Gradients are read before the Trainer clips them, and frozen matrices no longer count in its norm. The number of
    frozen matrices is logged as grades_frozen. `grades` is the GradES at work.

    Raises what `grgauge.GradES` raises, when training begins; RuntimeError under anything but DDP on several devices or
    processes, or in float16.
    """

    file = "grades"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.grades: GradES | None = None
        self._options = options

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """Each reading: its step, and each matrix's value in units of its threshold, which it is frozen below 1 of.

        NaN where there is none: before the level that tau is a share of is known, say.
        """
        if self.grades is None:
            return []
        grades, levels = self.grades, self.grades.levels
        if grades.tau is None:
            units = [grades.epsilon] * len(grades.matrices)
        elif grades.scale == "level":
            units = [grades.tau * (levels[name] or math.nan) for name in grades.matrices]
        elif grades.scale == "matrix":
            sizes = grades.state_dict()["sizes"]
            units = [grades.tau / size for size in sizes]
        else:
            units = [grades.tau] * len(grades.matrices)
        return [
            (r.step, {n: v / u for n, v, u in zip(grades.matrices, r.values, units, strict=True)})
            for r in grades.history
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.grades is not None
        if self.grades.done:
            control.should_training_stop = True

    def _open(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        model = trainer.model_wrapped
        self.grades = GradES(model, optimizer, total_steps=trainer.state.max_steps, **self._options)

    def _close(self) -> None:
        if self.grades is not None:
            self.grades.remove()

    def _state(self) -> dict[str, Any]:
        assert self.grades is not None
        return self.grades.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        assert self.grades is not None
        self.grades.load_state_dict(state)

    def _values(self) -> dict[str, float]:
        assert self.grades is not None
        return {"grades_frozen": len(self.grades.frozen)}


def _caller() -> tuple[Trainer, str | None]:
    """The Trainer that is calling, and the checkpoint that it goes on from."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise RuntimeError("on_train_begin must be called by a transformers.Trainer, and no frame above is one's")


def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    if trainer.optimizer is None:
        raise RuntimeError("the Trainer has no optimizer yet; it makes one when training begins")
    return trainer.optimizer


_INSTEAD = {
    "FSDP": "use grgauge.Gauge with attach() in a loop of your own, on a module of fully_shard (FSDP2; not FSDP1)",
    "DEEPSPEED": "DeepSpeed keeps gradients in buffers of its own",
    "MEGATRON_LM": "Megatron-LM keeps gradients in buffers of its own",
    "XLA": "there is no kernel for TPUs",
}
"""Distributed type -> what to do about it, or why there is nothing to do."""


def _refuse(trainer: Trainer) -> None:
    """Say in one sentence what cannot be gauged."""
    kind, gpus = trainer.accelerator.distributed_type.value, trainer.args.n_gpu
    if gpus > 1 or kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise RuntimeError(
            f"the Trainer's distributed type is {kind}, with {gpus} GPUs in each process; the callbacks support one "
            f"process on one device, and DDP: {_INSTEAD.get(kind, 'start one process for each GPU, with torchrun')}"
        )
    if trainer.accelerator.scaler is not None:
        raise RuntimeError("the Trainer scales losses (fp16); the callbacks support fp32 and bf16 only")


def _rows(inputs: Mapping[str, Any]) -> int:
    """Samples in a micro-batch."""
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim)


def _share(
    trainer: Trainer, inputs: Mapping[str, Any], items: Tensor | int | None, batch_size: float
) -> tuple[float, float | None]:
    """A micro-batch's size in samples and its share in the loss; None: all alike.

    Where the loss is divided by all tokens that are predicted, a micro-batch is as large as its part of them.
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if items is None or not isinstance(labels, Tensor):
        return _rows(inputs), None
    if "shift_labels" not in inputs and trainer._loss_shifts_labels:
        labels = labels[..., 1:]
    share = int(labels.ne(-100).sum()) / float(torch.as_tensor(items).float().mean())
    return batch_size * share, share
