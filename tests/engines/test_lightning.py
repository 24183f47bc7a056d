"""Under Lightning's Trainer a gauge reads what it reads in a loop written by hand, on scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch
from engines.plain import assert_reads, plain_loop
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, TensorDataset

from grgauge import AdamW, Gauge

pytestmark = [  # what Lightning says of torch and, on larger machines, of devices and workers left idle
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]

BATCH, GROUPS, STEPS = 64, 4, 26
MICRO = BATCH // GROUPS
X, Y = (torch.as_tensor(column[: 13 * BATCH]) for column in load_digits(return_X_y=True))
X = X.float() / 16

OPTIMIZERS = {
    "ours": lambda params: AdamW(params, lr=1e-3),
    "ours, flat": lambda params: AdamW(params, lr=1e-3, flat=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())

NORM, VALUE = 0.1, 0.001
CLIPS = {
    "no clipping": ({}, lambda params: None),
    "norm": ({"gradient_clip_val": NORM}, lambda params: clip_grad_norm_(params, NORM)),
    "value": (
        {"gradient_clip_val": VALUE, "gradient_clip_algorithm": "value"},
        lambda params: clip_grad_value_(params, VALUE),
    ),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class Digits(LightningModule):
    def __init__(self, make):
        super().__init__()
        self.net, self.make = network(), make

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


class Gauging(Callback):
    def __init__(self, **options):
        self.options, self.saved, self.readings = options, None, []

    def on_train_start(self, trainer, module):
        self.gauge = Gauge(self.optimizer_of(trainer, module), BATCH, **self.options)
        if self.saved is not None:
            self.gauge.load_state_dict(self.saved)  # now that the optimizer has its own state back

    def optimizer_of(self, trainer, module):
        return trainer.optimizers[0]

    def on_after_backward(self, trainer, module):
        self.gauge.micro_step()

    def on_train_batch_end(self, trainer, module, *_):
        reading = self.gauge.reading()
        if reading is not None and (not self.readings or reading is not self.readings[-1]):
            self.readings.append(reading)
            module.log("gr_t", reading.gr_t)

    def state_dict(self):
        return self.gauge.state_dict()

    def load_state_dict(self, state):
        self.saved = state


def fit(make, gauging=None, max_steps=STEPS, ckpt_path=None, callbacks=(), **options):
    """A trained module and the callback with its readings."""
    gauging, module = gauging or Gauging(), Digits(make)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=GROUPS,
        callbacks=[gauging, *callbacks],
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), MICRO), ckpt_path=ckpt_path)
    return trainer, module, gauging


def by_hand(make, clip=lambda params: None):
    """The same training in a plain loop, and what is true of it."""
    net = network()

    def micro(k):
        rows = slice(k * MICRO % len(X), k * MICRO % len(X) + MICRO)
        return lambda: nn.functional.cross_entropy(net(X[rows]), Y[rows])

    steps = [[(micro(t * GROUPS + k), MICRO, 1 / GROUPS) for k in range(GROUPS)] for t in range(STEPS)]
    return net, plain_loop(net, make(net.parameters()), steps, BATCH, clip)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("clipping", CLIPS)
def test_a_fit_reads_what_a_plain_loop_does(make, clipping):
    """GR_T is of the gradients that Lightning has clipped, GR_S of those before."""
    options, clip = CLIPS[clipping]
    trainer, module, gauging = fit(make, **options)
    net, truths = by_hand(make, clip)
    assert_reads(gauging.readings, truths)
    assert trainer.callback_metrics["gr_t"] == pytest.approx(gauging.readings[-1].gr_t)
    for ours, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clipping", ["norm", "value"])
def test_clipping_by_lightning_changes_gr_t(clipping):
    """A norm clipped at every step leaves unit vectors to GR_T, which then is 1/|m^|^2 of them."""
    _, truths = by_hand(OPTIMIZERS["ours"], CLIPS[clipping][1])
    assert truths[-1].gr_t != pytest.approx(truths[-1].raw_gr_t, rel=1e-3)
    assert truths[-1].grad_norm < truths[-1].raw_grad_norm / 2


def test_max_grad_norm_reads_the_raw_gradient():
    """Clipping left to grgauge.AdamW trains as clip_grad_norm_ does, and both gauges read what was there before."""
    _, _, gauging = fit(lambda params: AdamW(params, lr=1e-3, max_grad_norm=NORM))
    _, truths = by_hand(lambda params: torch.optim.AdamW(params, lr=1e-3), CLIPS["norm"][1])
    assert_reads(gauging.readings, truths, raw=True, rel=1e-5)
    assert gauging.readings[0].grad_norm > 2 * NORM

    first = [fit(make, Gauging(every=1), max_steps=1)[2].readings[0] for make in MAX_AND_NONE]
    assert first[0] == first[1]  # both at the first weights


MAX_AND_NONE = [
    lambda params: AdamW(params, lr=1e-3, betas=(0.8, 0.999), max_grad_norm=NORM),
    lambda params: AdamW(params, lr=1e-3, betas=(0.8, 0.999)),  # another beta1: an EMA of the gauge's own, as above
]


@EVERY_OPTIMIZER
def test_a_gauge_may_be_made_on_lightnings_own_wrapper(make):
    class OnWrapper(Gauging):
        def optimizer_of(self, trainer, module):
            return module.optimizers()

    wrapped, bare = fit(make, OnWrapper())[2], fit(make)[2]
    assert len(bare.readings) == STEPS // 5
    assert wrapped.readings == bare.readings


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@EVERY_OPTIMIZER
def test_a_fit_resumed_from_a_checkpoint_reads_the_same_bits(make, tmp_path):
    """Saved by ModelCheckpoint behind step 13, between two readings; the callback's state goes along."""
    straight = fit(make)[2]
    first, second = (ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=STEPS // 2) for _ in range(2))
    fit(make, max_steps=STEPS // 2, callbacks=[first])
    trainer, _, resumed = fit(make, callbacks=[second], ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == STEPS
    assert [reading.step for reading in resumed.readings] == [15, 20, 25]
    assert resumed.readings == straight.readings[2:]
    assert [r.segments for r in resumed.readings] == [r.segments for r in straight.readings[2:]]


SCALED = {**OPTIMIZERS, "ours, clipping": lambda params: AdamW(params, lr=1e-3, max_grad_norm=NORM)}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED.keys())
def test_the_scale_of_16_bit_training_is_not_read(make):
    readings = []
    for interval in (3, 1000):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        readings.append(fit(make, Gauging(scaler=scaler), plugins=[plugin])[2].readings)
    assert scaler.get_scale() == 2.0**8
    for growing, constant in zip(*readings, strict=True):
        assert growing.gr_t == pytest.approx(constant.gr_t, rel=1e-3)
        assert growing.gr_s == pytest.approx(constant.gr_s, rel=1e-3)
        assert growing.grad_norm == pytest.approx(constant.grad_norm, rel=1e-3)


def test_lightning_refuses_to_clip_what_unscales_in_its_step():
    """As it does for torch's fused optimizers; max_grad_norm=, tested above, is what to use."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(OPTIMIZERS["ours"], plugins=[plugin], gradient_clip_val=NORM)
