"""Under transformers' Trainer a gauge reads what it reads in a loop written by hand, on Python's own documentation."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from engines.plain import assert_reads, plain_loop
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from grgauge import AdamW, Gauge

MICRO, GROUPS, STEPS, LENGTH = 4, 4, 26, 32
BATCH = MICRO * GROUPS
NORM = 0.2

TEXT = "\n".join(topics[name] for name in sorted(topics)).encode()[: STEPS * BATCH * LENGTH]
ROWS = torch.tensor(list(TEXT)).view(-1, LENGTH)
WHOLE = [{"input_ids": row, "labels": row} for row in ROWS]
# Rows of 2 to 31 tokens to predict.
PADDED = [
    {"input_ids": row, "labels": row.where(torch.arange(LENGTH) < 3 + 7 * i % (LENGTH - 3), -100)}
    for i, row in enumerate(ROWS)
]

OPTIMIZERS = {
    "ours": lambda params: AdamW(params, lr=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


class Gauged(Trainer):
    """Behind each backward, which is before `max_grad_norm` clips, a micro-step."""

    gauge: Gauge
    weighted = False

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append({name: value.clone() for name, value in inputs.items()})
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.weighted:
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            self.gauge.micro_step(samples=tokens, weight=tokens)
        else:
            self.gauge.micro_step()
        return loss

    def log(self, logs, *args, **kwargs):
        reading = self.gauge.reading()
        if reading is not None:
            logs |= {"gr_t": reading.gr_t, "gr_s": reading.gr_s}
        super().log(logs, *args, **kwargs)


class Readings(TrainerCallback):
    """Takes every reading, and saves the gauge beside the optimizer."""

    def __init__(self, gauge):
        self.gauge, self.taken = gauge, []

    def on_step_end(self, args, state, control, **kwargs):
        reading = self.gauge.reading()
        if reading is not None and (not self.taken or reading is not self.taken[-1]):
            self.taken.append(reading)

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.gauge.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/gauge.pt")


class MicroSteps(Readings):
    """With callbacks alone. `on_pre_optimizer_step` comes behind clipping."""

    def on_substep_end(self, *args, **kwargs):
        self.gauge.micro_step()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gauge.micro_step()


def trainer_of(make, folder, kind=Gauged, callback=Readings, data=WHOLE, batch_size=BATCH, **arguments):
    model = llama()
    optimizer = make(model.parameters())
    gauge = Gauge(optimizer, batch_size)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=GROUPS,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": STEPS, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 5, **arguments},
    )
    callback = callback(gauge)
    trainer = kind(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])
    trainer.gauge, trainer.seen = gauge, []
    return trainer, callback


def by_hand(make, seen, clip=lambda params: None, batch_size=BATCH, tokens=False):
    """The batches that a trainer has had, in a plain loop, and what is true of it."""
    model = llama()

    def micro(inputs, total):
        logits, labels = inputs["input_ids"], inputs["labels"][:, 1:]
        n = int((labels != -100).sum())

        def loss():
            return nn.functional.cross_entropy(model(input_ids=logits).logits[:, :-1].transpose(1, 2), labels)

        return loss, n if tokens else MICRO, n / total

    steps = []
    for t in range(0, len(seen), GROUPS):
        step = seen[t : t + GROUPS]
        total = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in step)
        steps.append([micro(inputs, total) for inputs in step])
    return model, plain_loop(model, make(model.parameters()), steps, batch_size, clip)


def clip(params):
    clip_grad_norm_(params, NORM)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("max_grad_norm", [0.0, NORM])
def test_a_trainer_reads_what_a_plain_loop_does(make, max_grad_norm, tmp_path):
    """GR_T is of the gradients that the trainer has clipped, GR_S of those before."""
    trainer, readings = trainer_of(make, tmp_path, max_grad_norm=max_grad_norm)
    trainer.train()
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)  # the gauge sits on what is inside
    model, truths = by_hand(make, trainer.seen, clip if max_grad_norm else lambda params: None)
    assert_reads(readings.taken, truths, rel=1e-5)
    assert bool(max_grad_norm) == (truths[-1].raw_grad_norm > 1.5 * truths[-1].grad_norm)
    logged = [entry["gr_s"] for entry in trainer.state.log_history if "gr_s" in entry]
    assert logged[: len(truths)] == [reading.gr_s for reading in readings.taken]
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_gauge_may_be_made_on_accelerates_wrapper(tmp_path):
    """Which is what callbacks are given. It reads what one on the optimizer inside does, and says what was clipped."""

    class Late(Readings):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            assert isinstance(optimizer, AcceleratedOptimizer)
            self.gauge.remove()
            self.gauge = trainer.gauge = Gauge(optimizer, BATCH)

    trainer, late = trainer_of(OPTIMIZERS["ours"], tmp_path, callback=Late, max_grad_norm=NORM)
    trainer.train()
    other, bare = trainer_of(OPTIMIZERS["ours"], tmp_path, max_grad_norm=NORM)
    other.train()
    assert late.taken == bare.taken
    assert any("changed after the last micro_step(), as clipping does" in note for note in late.taken[-1].notes)


def test_max_grad_norm_of_ours_reads_the_raw_gradient(tmp_path):
    """Clipping left to grgauge.AdamW trains as clip_grad_norm_ does, and both gauges read what was there before."""
    trainer, readings = trainer_of(
        lambda params: AdamW(params, lr=1e-3, max_grad_norm=NORM),
        tmp_path,
        callback=MicroSteps,
        kind=Recorded,
        max_grad_norm=0.0,
    )
    trainer.train()
    _, truths = by_hand(lambda params: torch.optim.AdamW(params, lr=1e-3), trainer.seen, clip)
    assert_reads(readings.taken, truths, raw=True, rel=1e-4)


class Recorded(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


def test_micro_steps_by_callback_want_no_clipping_by_the_trainer(tmp_path):
    """A last group measured after clipping is none, as a difference of two scales: no GR_S, and a note."""
    off = []
    for norm in (0.0, NORM):
        trainer, readings = trainer_of(
            OPTIMIZERS["ours"], tmp_path, kind=Recorded, callback=MicroSteps, max_grad_norm=norm
        )
        trainer.train()
        _, truths = by_hand(OPTIMIZERS["ours"], trainer.seen, clip if norm else lambda params: None)
        off.append(abs((readings.taken[-1].gr_s or 0.0) / truths[-1].gr_s - 1))
        notes = readings.taken[-1].notes
    assert off[0] < 1e-5
    assert {reading.gr_s for reading in readings.taken} == {None}
    assert "GR_S skipped a reading: gradients were changed between two micro-batches" in notes


def test_losses_weighted_by_their_tokens(tmp_path):
    """The trainer divides by the tokens of all micro-batches, so a micro-batch weighs as much as it has."""

    class Weighted(Gauged):
        weighted = True

    tokens = BATCH * 15
    trainer, readings = trainer_of(
        OPTIMIZERS["ours"], tmp_path, kind=Weighted, data=PADDED, batch_size=tokens, max_grad_norm=0.0
    )
    trainer.train()
    _, truths = by_hand(OPTIMIZERS["ours"], trainer.seen, batch_size=tokens, tokens=True)
    assert_reads(readings.taken, truths, rel=1e-5)


def test_flat_states_under_a_trainer_read_the_same(tmp_path):
    trainer, loose = trainer_of(OPTIMIZERS["ours"], tmp_path)
    trainer.train()
    trainer, flat = trainer_of(lambda params: AdamW(params, lr=1e-3, flat=True), tmp_path)
    trainer.train()
    for ours, theirs in zip(flat.taken, loose.taken, strict=True):
        assert ours.gr_t == pytest.approx(theirs.gr_t, rel=1e-6)
        assert ours.gr_s == pytest.approx(theirs.gr_s, rel=1e-6)


@EVERY_OPTIMIZER
def test_a_run_resumed_from_a_checkpoint_reads_the_same_bits(make, tmp_path):
    trainer, straight = trainer_of(make, tmp_path / "straight")
    trainer.train()
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    trainer, _ = trainer_of(make, tmp_path / "half", max_steps=STEPS // 2, **saving)
    trainer.train()
    trainer, resumed = trainer_of(make, tmp_path / "half", **saving)
    checkpoint = tmp_path / "half" / f"checkpoint-{STEPS // 2}"
    trainer.gauge.load_state_dict(torch.load(checkpoint / "gauge.pt"))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [reading.step for reading in resumed.taken] == [15, 20, 25]
    assert resumed.taken == straight.taken[2:]
