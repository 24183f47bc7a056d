"""Gauges and GradES as callbacks of transformers' Trainer: one line, any optimizer.

    Trainer(..., callbacks=[GaugeCallback()])

The Trainer clips gradients before it calls its callbacks, and it does not hand itself to them. The callbacks here find
it in the frame that calls `on_train_begin`, and read the gradients in its `training_step`, after each backward.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._validation import require_count
from ..gauge import Gauge
from ..grades import GradES
from ..optim import unwrapped
from ..policy import Target
from ..reading import Reading
from ..tuning.learning_rates import highest_lr, scale
from .raw_gradients import RawGradients
from .verdicts import Verdicts, values

try:
    import transformers
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "grgauge.integrations.transformers needs transformers: pip install 'grgauge-kernels[transformers]'"
    ) from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"grgauge.integrations.transformers needs transformers 5 or newer, not {transformers.__version__}"
    )


class _Watching(TrainerCallback):
    """What both callbacks share: a place before clipping, values in the Trainer's logs, state in its checkpoints."""

    file: str

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._accelerator: Any = None
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

    def _before(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None) -> None:
        """Called before each micro-batch."""

    def _after(self, inputs: Mapping[str, Any], items: Tensor | int | None) -> None:
        """Called after each micro-batch's backward."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, checkpoint = _caller()
        _refuse(trainer)
        self._close()
        optimizer = unwrapped(trainer.optimizer)
        clips = args.max_grad_norm > 0
        self._raw = RawGradients(trainer.model, optimizer) if clips else None
        self._open(trainer, optimizer if self._raw is None else self._raw)
        if self._trainer is not trainer:
            self._wrap(trainer)
        self._trainer = trainer
        if self._accelerator is not trainer.accelerator:
            self._wrap_unscaling(trainer.accelerator)
        self._accelerator = trainer.accelerator
        if state.global_step > 0:
            self._resume(trainer, checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._trainer is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = self._state()  # on all ranks: it may reduce
        if folder.is_dir() and (_sharded(self._trainer) or args.should_save):
            torch.save(saved, folder / self._file(self._trainer))

    def _resume(self, trainer: Trainer, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint) / self._file(trainer)
        if path is not None and path.is_file():
            self._load(torch.load(path, map_location=trainer.args.device, weights_only=True))
        else:
            warnings.warn(
                f"{type(self).__name__} starts cold: the training goes on from step {trainer.state.global_step}, and "
                f"its checkpoint holds no {self._file(trainer)}",
                stacklevel=2,
            )

    def _file(self, trainer: Trainer) -> str:
        """Sharded states are one file a rank."""
        return f"{self.file}-{trainer.args.process_index}.pt" if _sharded(trainer) else f"{self.file}.pt"

    def _wrap(self, trainer: Trainer) -> None:
        training_step, log = trainer.training_step, trainer.log

        def read(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            self._before(model, inputs, num_items_in_batch)
            loss = training_step(model, inputs, num_items_in_batch, **kwargs)
            self._after(inputs, num_items_in_batch)
            scaled = trainer.accelerator.scaler is not None
            if self._raw is not None and trainer.accelerator.sync_gradients and not scaled:
                self._raw.step()
            return loss

        def add_values(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log({**logs, **self._values()} if "loss" in logs else logs, *args, **kwargs)

        trainer.training_step, trainer.log = read, add_values

    def _wrap_unscaling(self, accelerator: Any) -> None:
        """With a GradScaler gradients are themselves, and overflow is known, once they are unscaled to be clipped."""
        if accelerator.scaler is None:
            return
        unscale_gradients = accelerator.unscale_gradients

        def read(optimizer: Any = None) -> None:
            unscale_gradients(optimizer)
            if self._raw is not None and self._trainer is not None:
                self._raw.step_scaled(accelerator.scaler, unwrapped(self._trainer.optimizer))

        accelerator.unscale_gradients = read


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
    split_every  where the Trainer does not accumulate on its one device: steps between two extra passes over a batch in
                 halves, which are the groups of GR_S; the first comes in the middle. They cost as much as a step and
                 change nothing. None: no such passes, and GR_S is not available there
    target       what verdicts are about
    print        takes a line; None: nothing is printed

    Where the Trainer clips, gradients are read before. Micro-batches, or the ranks of DDP and FSDP2, are the groups of
    GR_S; where the Trainer divides the loss by the tokens of all of them, each weighs as much as it has. Values are
    logged as gr_t, gr_s and noise_scale, and only what exists. `reading` is the newest, `readings` are all of this run.

    Raises ValueError for a number out of range; RuntimeError when training begins under FSDP1, DeepSpeed or XLA.
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
        split_every: int | None = 100,
        target: Target | None = None,
        print: Callable[[str], object] | None = print,
    ) -> None:
        super().__init__()
        require_count("every", every, 1)
        if split_every is not None:
            require_count("split_every", split_every, 2 * every)
        self.batch_size = batch_size
        self._verdicts = Verdicts(window, act, every, target)
        self.readings: list[Reading] = []
        self.gauge: Gauge | None = None
        self._options: dict[str, Any] = {"every": every, "sample": sample, "beta": beta, "seed": seed}
        self._every, self._print = every, print
        # The passes fall on steps that are read.
        self._split_every = None if split_every is None else split_every // every * every
        self._steps, self._attached = 0, False
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
        said = self._verdicts.observe(new, highest_lr(trainer.optimizer), state.max_steps)
        if said is None:
            return
        line, factor = said
        if factor != 1.0:
            scale(trainer.optimizer, [trainer.lr_scheduler], factor)
            self._verdicts.changed(factor)
            self.gauge.restart()
        if self._print is not None and trainer.is_world_process_zero():
            self._print(line)

    def _open(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        args, scaler = trainer.args, trainer.accelerator.scaler
        size = self.batch_size or trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.gauge = Gauge(optimizer, size, scaler=scaler, **self._options)
        self._attached = args.world_size > 1
        if self._attached:
            self.gauge.attach(trainer.model_wrapped)
        self.readings, self._logged, self._steps = [], None, 0
        self._verdicts.restart(highest_lr(trainer.optimizer))
        # counts as the gauge does, which steps of a GradScaler that are skipped may leave out
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
        if (trainer.args.gradient_accumulation_steps > 1 or self._attached) and self._due:
            self.gauge.micro_step(*_share(trainer, inputs, items, self.gauge.batch_size))

    def _before(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None) -> None:
        """On one device, without accumulation, now and then: the groups of GR_S by passes of their own."""
        trainer, every = self._trainer, self._split_every
        assert self.gauge is not None
        assert trainer is not None
        if every is None or trainer.args.gradient_accumulation_steps > 1 or self._attached or not self._due:
            return
        middle = every // 2 // self._every * self._every
        if (self._steps + 1) % every != middle:
            return
        halves = _halves(inputs)
        if halves is None:
            return
        with _unchanged(trainer, model):
            for half in halves:
                samples, weight = _share(trainer, half, items, self.gauge.batch_size)
                trainer.current_gradient_accumulation_steps = _rows(inputs) / _rows(half)
                type(trainer).training_step(trainer, model, half, items)
                self.gauge.micro_step(samples, weight if weight is not None else _rows(half))


class GradESCallback(_Watching):
    """Runs `grgauge.GradES` in a Trainer's training, LoRA included, and ends it when enough matrices are frozen.

    options   as for `grgauge.GradES`; `total_steps` are the Trainer's

    Gradients are read before the Trainer clips them, and frozen matrices no longer count in its norm. The number of
    frozen matrices is logged as grades_frozen. `grades` is the GradES at work.

    Raises what `grgauge.GradES` raises, when training begins.
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
        if grades.scale == "level":
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
    frame = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise RuntimeError("on_train_begin must be called by a transformers.Trainer, and no frame above is one's")


def _refuse(trainer: Trainer) -> None:
    """Say in one sentence what cannot be gauged."""
    kind, accelerator = trainer.accelerator.distributed_type.value, trainer.accelerator
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise RuntimeError("the Trainer uses FSDP1, which hides single parameters; gauges need FSDP2 (fsdp_version: 2)")
    if kind == "DEEPSPEED":
        raise RuntimeError("the Trainer uses DeepSpeed, which keeps gradients to itself; gauges need DDP or FSDP2")
    if kind == "XLA":
        raise RuntimeError("the Trainer uses XLA, which the gauges' kernels do not run on; they need CPU or CUDA")


def _sharded(trainer: Trainer) -> bool:
    return bool(trainer.accelerator.distributed_type.value == "FSDP")


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
    args = trainer.args
    ranks = 1 if args.average_tokens_across_devices else args.world_size
    return batch_size / ranks * share, share


def _halves(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A micro-batch cut in two, None where it is not made of tensors of one length, of at least two samples."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    lengths = {value.shape[0] if value.ndim else 0 for value in tensors}
    if len(lengths) != 1 or len(tensors) < len(inputs) or lengths.pop() < 2:
        return None
    cut = _rows(inputs) // 2
    return {k: v[:cut] for k, v in inputs.items()}, {k: v[cut:] for k, v in inputs.items()}


@contextmanager
def _unchanged(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves weights, buffers, random numbers and gradients as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    steps = trainer.current_gradient_accumulation_steps
    with torch.random.fork_rng(devices):
        yield
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = steps
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
