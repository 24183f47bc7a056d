"""Lightning's Trainer with the callback, on scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch
from engines.plain import assert_reads
from engines.test_lightning import CLIPS, MICRO, OPTIMIZERS, STEPS, Digits, X, Y, by_hand
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

from grgauge.integrations.lightning import GaugeCallback, refuse

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


@pytest.mark.parametrize("clipping", ["no clipping", "norm"])
def test_the_scale_of_16_bit_training_is_not_read(clipping):
    """A scale that doubles every third step, or stays, gives the same readings."""
    readings = []
    for interval in (3, 1000):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
        gauging = GaugeCallback(print=None)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        fit(OPTIMIZERS["SGD"], gauging, plugins=plugins, **CLIPS[clipping][0])
        readings.append(gauging.readings)
    assert len(readings[0]) == STEPS // 5
    for growing, constant in zip(*readings, strict=True):
        assert growing.gr_t == pytest.approx(constant.gr_t, rel=1e-2)
        assert growing.gr_s == pytest.approx(constant.gr_s, rel=1e-2)
        assert growing.grad_norm == pytest.approx(constant.grad_norm, rel=1e-2)


def test_acting_multiplies_the_learning_rate_by_the_verdicts_factor():
    lines = []
    gauging = GaugeCallback(window=20, act="lr", print=lines.append)
    trainer, _ = fit(lambda params: torch.optim.AdamW(params, lr=1e-5), gauging)
    read = gauging.readings[3]
    factor = trainer.optimizers[0].param_groups[0]["lr"] / 1e-5
    assert factor == pytest.approx((20.0 * read.finite_time_factor / read.gr_t) ** (1 / 3))
    assert factor > 1.5
    assert f"learning rate multiplied by {factor:.2f}" in lines[0]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, r"strategy is FSDPStrategy on cpu; .*: use ModelParallelStrategy or a loop of your own"),
        (ModelParallelStrategy, r"strategy is ModelParallelStrategy on cpu; .*: where the module is of DDP or FSDP2"),
    ],
)
def test_what_cannot_be_gauged_is_refused(strategy, message):
    made = strategy(parallel_devices=[torch.device("cpu")]) if strategy is FSDPStrategy else strategy()
    made.parallel_devices = [torch.device("cpu")]
    made.cluster_environment = LightningEnvironment()
    with pytest.raises(RuntimeError, match=message):
        refuse(made)


def test_another_device_is_refused():
    with pytest.raises(RuntimeError, match=r"SingleDeviceStrategy on xla; .*: there is no kernel for xla"):
        refuse(SingleDeviceStrategy(torch.device("xla", 0)))
