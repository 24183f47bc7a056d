"""What GaugeCallback adds to a step of transformers' Trainer and of Lightning, on a Llama of 26 M parameters.

    python bench/callbacks.py            both frameworks, rows to bench/results/callbacks.csv
    python bench/callbacks.py --quick    a tiny model, few turns, no rows: does it run?
    python bench/callbacks.py lightning --micro-batches 2 --device cuda --rows 8

Three trainings of the same model take turns, A B C A B C ...; a turn is five consecutive steps, as a gauge reads every
fifth, and includes what the framework does between them:

    plain    without the callback; what ratios are of
    again    the same once more: what its ratio is off from 1 by, is noise
    gauged   callbacks=[GaugeCallback()], which advises

With one micro-batch a step GR_T alone is read, with two GR_S as well. Both frameworks clip, so that gradients are read
before. A row's ratio is the median of the ratios between turns of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from turns import STEPS, Thread, append, origin, quantile_columns, ratio_columns

RESULTS = Path(__file__).resolve().parent / "results" / "callbacks.csv"
COLUMNS = (
    "date,commit,device,torch,framework,version,parameters,micro_batches,tokens,variant,"
    "q20_ms,q50_ms,q80_ms,ratio,ratio_q20,ratio_q80"
)
VARIANTS = ("plain", "again", "gauged")
LENGTH, VOCABULARY = 128, 1024
WARM_UP_TURNS = 2
ROUNDS, QUICK_ROUNDS = 40, 2
LR = 1e-4


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=LENGTH,
        )
    )


class Training:
    """The same model and data for every framework and variant."""

    def __init__(self, options: argparse.Namespace, micro_batches: int, turns: int) -> None:
        self.device, self.rows, self.micro_batches = torch.device(options.device), options.rows, micro_batches
        self.model = partial(llama, *((64, 2) if options.quick else (512, 6)))
        self.steps = STEPS * turns + 1  # the last is taken once all turns are over
        samples = torch.randint(
            VOCABULARY,
            (self.steps * micro_batches * options.rows, LENGTH),
            generator=torch.Generator().manual_seed(1),
        )
        self.data = [{"input_ids": row, "labels": row} for row in samples]

    def check(self, gauging: list[Any]) -> None:
        """What was measured is a gauged training."""
        for callback in gauging:
            if callback.reading is None or (callback.reading.gr_s is None) == (self.micro_batches > 1):
                raise RuntimeError(f"the callback has read {callback.reading}, with {self.micro_batches} micro-batches")


def of_transformers(training: Training, gauged: bool, before_step: Callable[[], None]) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from grgauge.integrations.transformers import GaugeCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            before_step()

    gauging = [GaugeCallback(print=None)] if gauged else []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=training.steps,
            per_device_train_batch_size=training.rows,
            gradient_accumulation_steps=training.micro_batches,
            learning_rate=LR,
            use_cpu=training.device.type == "cpu",
            disable_tqdm=True,
            logging_strategy="no",
            report_to="none",
            save_strategy="no",
        )
        Trainer(
            model=training.model(),
            args=arguments,
            train_dataset=training.data,
            callbacks=[Turns(), *gauging],
        ).train()
    training.check(gauging)


def of_lightning(training: Training, gauged: bool, before_step: Callable[[], None]) -> None:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from grgauge.integrations.lightning import GaugeCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.llama = training.model()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.llama(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)

    class Turns(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index % training.micro_batches == 0:
                before_step()

    gauging = [GaugeCallback(print=None)] if gauged else []
    trainer = Trainer(
        max_steps=training.steps,
        accelerator=training.device.type,
        devices=1,
        accumulate_grad_batches=training.micro_batches,
        gradient_clip_val=1.0,
        callbacks=[Turns(), *gauging],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(training.data, training.rows))
    training.check(gauging)


FRAMEWORKS = {"transformers": of_transformers, "lightning": of_lightning}


def measured(framework: str, training: Training, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a step, of each variant and round."""
    fit = FRAMEWORKS[framework]
    threads = {v: Thread(partial(fit, training, v == "gauged"), training.device) for v in VARIANTS}
    samples: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for number, (variant, thread) in itertools.product(range(WARM_UP_TURNS + rounds), threads.items()):
        seconds = thread.turn()
        if number >= WARM_UP_TURNS:
            samples[variant].append(1e3 * seconds)
    for thread in threads.values():
        thread.close()
    return samples


def rows(framework: str, training: Training, samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    made = []
    for variant, times in samples.items():
        made.append(
            {
                **origin(training.device),
                "framework": framework,
                "version": sys.modules[framework].__version__,
                "parameters": sum(p.numel() for p in training.model().parameters()),
                "micro_batches": training.micro_batches,
                "tokens": training.micro_batches * training.rows * LENGTH,
                "variant": variant,
                **quantile_columns(times),
                **ratio_columns(times, samples["plain"]),
            }
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", metavar="framework", help=f"of {', '.join(FRAMEWORKS)} (default: all)")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=(1, 2), metavar="N", help="in a step")
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH} tokens in a micro-batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each variant")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few turns, no rows: does it run?")
    options = parser.parse_args()
    if unknown := set(options.frameworks) - set(FRAMEWORKS):
        parser.error(f"framework is {', '.join(sorted(unknown))}; it must be one of {', '.join(FRAMEWORKS)}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    for framework, micro_batches in itertools.product(options.frameworks or FRAMEWORKS, options.micro_batches):
        training = Training(options, micro_batches, WARM_UP_TURNS + rounds)
        made = rows(framework, training, measured(framework, training, rounds))
        if not options.quick:
            append(RESULTS, COLUMNS, made)
        for row in made:
            print(
                f"{framework:12} {row['parameters'] / 1e6:5.1f} M {micro_batches} x {options.rows} rows "
                f"{row['variant']:7} {row['q50_ms']:9.2f} ms {row['ratio']:6.4f} "
                f"({row['ratio_q20']:.4f} to {row['ratio_q80']:.4f})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
