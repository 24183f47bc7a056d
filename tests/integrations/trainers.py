"""The Trainers of transformers and Lightning under DDP on two processes; run by torchrun, and judged by test_ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.argv[1])


def of_transformers(grades: bool) -> dict:
    from integrations.test_transformers import NORM, PADDED, Recorded, llama
    from transformers import TrainingArguments

    from grgauge import AdamW
    from grgauge.integrations.transformers import GaugeCallback, GradESCallback

    lines = []
    gauging = GaugeCallback(window=10, print=lines.append)
    freezing = [GradESCallback(tau=3.0, every=2, warmup=2)] if grades else []
    model = llama()
    arguments = TrainingArguments(
        str(FOLDER / f"transformers-{grades}"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        report_to="none",
        max_steps=61 if grades else 21,
        max_grad_norm=NORM,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=10,
        logging_steps=5,
    )
    optimizers = AdamW(model.parameters(), lr=1e-3), None
    trainer = Recorded(
        model=model,
        args=arguments,
        train_dataset=PADDED,
        optimizers=optimizers,
        callbacks=[gauging, *freezing],
    )
    trainer.seen = []
    trainer.train()
    frozen = freezing[0].grades.frozen if grades else {}
    return {
        "readings": [r.to_dict() for r in gauging.readings],
        "batch_size": gauging.gauge.batch_size,
        "lines": lines,
        "frozen": frozen,
        "steps": trainer.state.global_step,
        "seen": [{name: rows.tolist() for name, rows in inputs.items()} for inputs in trainer.seen],
        "state": grades or torch.load(FOLDER / "transformers-False" / "checkpoint-10" / "gauge.pt")["step"],
    }


def of_lightning() -> dict:
    from engines.test_lightning import MICRO, NORM, OPTIMIZERS, Digits, X, Y
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from grgauge.integrations.lightning import GaugeCallback

    class RecordedDigits(Digits):
        """Remembers the batches that it trains on."""

        def training_step(self, batch, index):
            seen.append([batch[0].tolist(), batch[1].tolist()])
            return super().training_step(batch, index)

    seen, lines = [], []
    gauging = GaugeCallback(window=10, print=lines.append)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=21,
        gradient_clip_val=NORM,
        callbacks=[gauging],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(RecordedDigits(OPTIMIZERS["SGD"]), DataLoader(TensorDataset(X, Y), MICRO))
    return {
        "readings": [r.to_dict() for r in gauging.readings],
        "batch_size": gauging.gauge.batch_size,
        "lines": lines,
        "seen": seen,
        "logged": float(trainer.callback_metrics["gr_s"]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for which in sys.argv[2:]:
        done = of_lightning() if which == "lightning" else of_transformers(which == "grades")
        rank = torch.distributed.get_rank()
        (FOLDER / f"{which}-{rank}.json").write_text(json.dumps(done))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
