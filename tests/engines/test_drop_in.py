"""torch's AdamW changed to ours under accelerate, the Trainer and Lightning: saved, resumed, and the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import grgauge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]

STEPS, BATCH = 12, 8
X = torch.randn(STEPS * BATCH, 6, generator=torch.Generator().manual_seed(1))
Y = X.sin().sum(1, keepdim=True)

OURS = {
    "loose": lambda params: grgauge.AdamW(params, lr=1e-2),
    "flat": lambda params: grgauge.AdamW(params, lr=1e-2, flat=True),
}


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


class Net(nn.Module):
    """With a tied weight, and a layer that is trained only from the middle of the run on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.late = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.late(self.second(self.first(x).tanh()).tanh())
        return out


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.state_dict().items()}


# accelerate


def under_accelerate(make: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Half a run, saved and loaded into new objects, the other half: the weights, and what save_model wrote."""
    for half in (0, 1):
        accelerator = accelerate.Accelerator(cpu=True)
        net = Net()
        net, optimizer = accelerator.prepare(net, make(net.parameters()))
        if half:
            accelerator.load_state(str(folder / "state"))
        for step in range(half * STEPS // 2, (half + 1) * STEPS // 2):
            rows = slice(step * BATCH, (step + 1) * BATCH)
            accelerator.backward((net(X[rows]) - Y[rows]).square().mean())
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(step % 2))
        if not half:
            accelerator.save_state(str(folder / "state"))
    accelerator.save_model(net, str(folder / "model"))
    return weights(net), load_file(folder / "model" / "model.safetensors")


# transformers


class Model(PreTrainedModel):
    config_class = PretrainedConfig
    main_input_name = "x"
    _tied_weights_keys = {"net.second.weight": "net.first.weight"}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.net = Net()
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}

    def _init_weights(self, module: nn.Module) -> None:
        """Net has drawn them."""


class Samples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "labels": Y[i]}


def under_the_trainer(make: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for half in (0, 1):
        torch.manual_seed(0)
        model = Model(PretrainedConfig())
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            max_grad_norm=1.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer = Trainer(model, arguments, train_dataset=Samples(), optimizers=(make(model.parameters()), None))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if half else None)
    trainer.save_model(str(folder / "model"))
    return weights(model), load_file(folder / "model" / "model.safetensors")


# Lightning


class Module(LightningModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.net, self.make = Net(), make

    def training_step(self, batch: Any, _: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.make(self.parameters())
        return optimizer


def under_lightning(make: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for half in (0, 1):
        module = Module(make)
        trainer = LightningTrainer(
            accelerator="cpu",
            max_steps=STEPS if half else STEPS // 2,
            max_epochs=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(TensorDataset(X[: STEPS // 2 * BATCH], Y[: STEPS // 2 * BATCH]), BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Lightning, about the end of the epoch in which it resumes
            trainer.fit(module, loader, ckpt_path=str(folder / "half.ckpt") if half else None)
        trainer.save_checkpoint(folder / ("end.ckpt" if half else "half.ckpt"))
    saved = torch.load(folder / "end.ckpt", weights_only=False)["state_dict"]
    del saved["net.second.weight"]  # a checkpoint has a tied weight twice
    return weights(module), saved


# all of them

ENGINES = {"accelerate": under_accelerate, "Trainer": under_the_trainer, "Lightning": under_lightning}


@pytest.mark.parametrize("make", OURS.values(), ids=OURS.keys())
@pytest.mark.parametrize("run", ENGINES.values(), ids=ENGINES.keys())
def test_a_run_saved_and_resumed_ends_as_with_torchs(run: Any, make: Any, tmp_path: Path) -> None:
    ours, theirs = run(make, tmp_path / "ours"), run(torchs, tmp_path / "torch")
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(own[name], other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    _, saved = ours
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in Net().parameters())
