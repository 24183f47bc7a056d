"""Lightning's Trainer with the callback, on scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch
from engines.plain import assert_reads
from engines.test_lightning import CLIPS, MICRO, OPTIMIZERS, STEPS, Digits, X, Y, by_hand
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from grgauge.integrations.lightning import GaugeCallback

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
]
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def fit(make, *callbacks, groups=4, micro=MICRO, ckpt_path=None, max_steps=STEPS, **options):
    module = Digits(make)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=groups,
        callbacks=[*callbacks],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), micro), ckpt_path=ckpt_path)
    return trainer, module


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@EVERY_OPTIMIZER
@pytest.mark.parametrize("clipping", CLIPS)
def test_one_line_reads_raw_gradients_and_changes_nothing(make, clipping):
    options, clip = CLIPS[clipping]
    gauging = GaugeCallback(print=None)
    trainer, module = fit(make, gauging, **options)
    net, truths = by_hand(make, clip)
    assert_reads(gauging.readings, truths, raw=True, rel=1e-5)
    assert trainer.callback_metrics["gr_s"] == pytest.approx(gauging.readings[-1].gr_s)
    assert torch.equal(weights(module), weights(net))


def test_without_accumulation_only_what_exists_is_logged():
    gauging = GaugeCallback(print=None)
    trainer, _ = fit(OPTIMIZERS["SGD"], gauging, groups=1)
    assert "gr_t" in trainer.callback_metrics
    assert "gr_s" not in trainer.callback_metrics


def test_extra_passes_over_halves_give_gr_s_and_change_nothing():
    gauging = GaugeCallback(split_every=10, print=None)
    _, module = fit(OPTIMIZERS["ours"], gauging, groups=1)
    _, plain = fit(OPTIMIZERS["ours"], groups=1)
    assert [r.step for r in gauging.readings if r.gr_s is not None] == [5, 15, 25]
    assert torch.equal(weights(module), weights(plain))


@EVERY_OPTIMIZER
def test_a_fit_resumed_from_a_checkpoint_reads_the_same_bits(make, tmp_path):
    straight, resumed = GaugeCallback(print=None), GaugeCallback(print=None)
    fit(make, straight)
    first, second = (ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=STEPS // 2) for _ in range(2))
    fit(make, GaugeCallback(print=None), first, max_steps=STEPS // 2)
    fit(make, resumed, second, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.readings == straight.readings[2:]


def test_stop_when():
    gauging = GaugeCallback(stop_when=lambda reading: reading.step >= 10, print=None)
    trainer, _ = fit(OPTIMIZERS["SGD"], gauging)
    assert trainer.global_step == 10
