"""transformers' Trainer with the callbacks: what they read, log, save and change, on Python's own documentation."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from accelerate.utils import DistributedType
from engines.plain import assert_reads, plain_loop
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from grgauge import AdamW, verdict
from grgauge.integrations.transformers import GaugeCallback, GradESCallback

pytestmark = pytest.mark.engines

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
    "torch's": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def llama(dropout=0.0):
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
            attention_dropout=dropout,
        )
    )


class Recorded(Trainer):
    """Remembers the micro-batches that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


def train(make, folder, *callbacks, data=WHOLE, model=None, micro=MICRO, groups=GROUPS, resume=None, **arguments):
    model = model or llama()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=groups,
        use_cpu=True,
        disable_tqdm=True,
        **{
            "report_to": "none",
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 5,
            **arguments,
        },
    )
    optimizers = (make([p for p in model.parameters() if p.requires_grad]), None)
    trainer = Recorded(model=model, args=arguments, train_dataset=data, optimizers=optimizers, callbacks=[*callbacks])
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(make, seen, clip, tokens=False):
    """The batches that a trainer has had, in a plain loop, and what is true of it."""
    model = llama()

    def micro(inputs, total):
        rows, labels = inputs["input_ids"], inputs["labels"][:, 1:]
        n = int((labels != -100).sum())

        def loss():
            return nn.functional.cross_entropy(model(input_ids=rows).logits[:, :-1].transpose(1, 2), labels)

        return loss, BATCH * n / total, n / total

    steps = []
    for t in range(0, len(seen), GROUPS):
        step = seen[t : t + GROUPS]
        total = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in step)
        steps.append([micro(inputs, total) for inputs in step])
    return plain_loop(model, make(model.parameters()), steps, BATCH, clip)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@EVERY_OPTIMIZER
@pytest.mark.parametrize("max_grad_norm", [0.0, NORM])
@pytest.mark.parametrize("data", [WHOLE, PADDED], ids=["whole", "padded"])
def test_one_line_reads_raw_gradients_clipped_or_not(make, max_grad_norm, data, tmp_path):
    """Micro-batches weigh as many tokens as they have, as the Trainer's loss has it."""
    gauging = GaugeCallback(print=None)
    trainer = train(make, tmp_path, gauging, max_grad_norm=max_grad_norm, data=data)

    def clip(params):
        if max_grad_norm:
            clip_grad_norm_(params, NORM)

    truths = by_hand(make, trainer.seen, clip)
    assert_reads(gauging.readings, truths, raw=True, rel=1e-4)
    assert bool(max_grad_norm) == (truths[-1].raw_grad_norm > 1.5 * truths[-1].grad_norm)
    assert not any("clipping" in note for reading in gauging.readings for note in reading.notes)


@EVERY_OPTIMIZER
def test_training_ends_in_the_weights_it_ends_in_without_the_callback(make, tmp_path):
    """With dropout, so that random numbers would show if the callback drew any."""
    gauging = GaugeCallback(print=None)
    gauged = train(make, tmp_path, gauging, model=llama(dropout=0.1))
    plain = train(make, tmp_path, model=llama(dropout=0.1))
    assert torch.equal(weights(gauged), weights(plain))
    assert [entry["loss"] for entry in gauged.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in plain.state.log_history if "loss" in entry
    ]
    assert any(reading.gr_s is not None for reading in gauging.readings)


def test_without_accumulation_there_is_no_gr_s(tmp_path):
    gauging = GaugeCallback(print=None)
    trainer = train(OPTIMIZERS["ours"], tmp_path, gauging, groups=1)
    assert all(reading.gr_s is None for reading in gauging.readings)
    assert not any("gr_s" in entry for entry in trainer.state.log_history)
    assert any("gr_t" in entry for entry in trainer.state.log_history)


def test_values_reach_the_log_history_and_tensorboards_event_files(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    gauging = GaugeCallback(print=None)
    trainer = train(OPTIMIZERS["ours"], tmp_path, gauging, report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    for name in ("gr_t", "gr_s", "noise_scale"):
        logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert logged == {reading.step: getattr(reading, name) for reading in gauging.readings}
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == pytest.approx(logged, rel=1e-6)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("max_grad_norm", [0.0, NORM])
def test_a_run_resumed_from_a_checkpoint_reads_the_same_bits(make, max_grad_norm, tmp_path):
    """Saved after step 13, between two readings."""
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2, "max_grad_norm": max_grad_norm}
    straight, resumed = GaugeCallback(print=None), GaugeCallback(print=None)
    whole = train(make, tmp_path / "straight", straight, max_grad_norm=max_grad_norm)
    train(make, tmp_path / "half", GaugeCallback(print=None), **{**saving, "max_steps": STEPS // 2})
    checkpoint = tmp_path / "half" / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "gauge.pt").is_file()
    half = train(make, tmp_path / "half", resumed, resume=str(checkpoint), **saving)
    assert [reading.step for reading in resumed.readings] == [15, 20, 25]
    assert resumed.readings == straight.readings[2:]
    assert [r.segments for r in resumed.readings] == [r.segments for r in straight.readings[2:]]
    assert torch.equal(weights(half), weights(whole))


def test_a_checkpoint_without_a_gauge_starts_cold_and_says_so(tmp_path):
    train(OPTIMIZERS["ours"], tmp_path, save_strategy="steps", save_steps=10, max_steps=10)
    with pytest.warns(UserWarning, match=r"goes on from step 10, and its checkpoint holds no gauge\.pt"):
        train(OPTIMIZERS["ours"], tmp_path, GaugeCallback(print=None), resume=str(tmp_path / "checkpoint-10"))


def test_bfloat16(tmp_path):
    gauging, full = GaugeCallback(print=None), GaugeCallback(print=None)
    train(OPTIMIZERS["ours"], tmp_path, gauging, bf16=True)
    train(OPTIMIZERS["ours"], tmp_path, full)
    assert gauging.readings[-1].gr_t == pytest.approx(full.readings[-1].gr_t, rel=0.05)
    assert gauging.readings[-1].gr_s == pytest.approx(full.readings[-1].gr_s, rel=0.05)


@pytest.mark.parametrize("callback", [GaugeCallback(), GradESCallback(tau=1.0)], ids=["gauge", "GradES"])
def test_a_scaled_loss_is_refused(callback, tmp_path):
    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    with pytest.raises(RuntimeError, match=r"scales losses \(fp16\); the callbacks support fp32 and bf16 only"):
        Scaled(model=llama(), args=arguments, train_dataset=WHOLE, callbacks=[callback]).train()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("FSDP", r"fully_shard \(FSDP2; not FSDP1\)"),
        ("DEEPSPEED", "DeepSpeed keeps gradients in buffers of its own"),
        ("XLA", "there is no kernel for TPUs"),
        ("MULTI_NPU", "start one process for each GPU"),
    ],
)
def test_other_ways_than_ddp_are_refused(kind, why, tmp_path):
    class Distributed(Trainer):
        def _inner_training_loop(self, *args, **kwargs):
            self.accelerator.state.distributed_type = DistributedType(kind)
            try:
                return self.callback_handler.on_train_begin(self.args, self.state, self.control)
            finally:
                self.accelerator.state.distributed_type = DistributedType.NO

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    trainer = Distributed(model=llama(), args=arguments, train_dataset=WHOLE, callbacks=[GaugeCallback()])
    with pytest.raises(
        RuntimeError, match=f"distributed type is {kind}, .*one process on one device, and DDP: .*{why}"
    ):
        trainer.train()


def test_a_verdict_a_window(tmp_path):
    lines = []
    gauging = GaugeCallback(window=10, print=lines.append)
    train(OPTIMIZERS["ours"], tmp_path, gauging)
    assert lines == [f"step {step}: {verdict(gauging.readings[step // 5 - 1])}" for step in (10, 20)]


def test_acting_moves_the_schedule_as_a_whole(tmp_path):
    """A learning rate far too low goes up, and the decay that follows starts from there."""
    lines = []
    gauging = GaugeCallback(window=20, act="lr", print=lines.append)
    trainer = train(
        lambda params: torch.optim.AdamW(params, lr=1e-5), tmp_path, gauging, lr_scheduler_type="linear", max_steps=40
    )
    factor = trainer.lr_scheduler.base_lrs[0] / 1e-5
    assert factor == pytest.approx(
        (20.0 * gauging.readings[3].finite_time_factor / gauging.readings[3].gr_t) ** (1 / 3)
    )
    assert factor > 1.5
    assert f"learning rate multiplied by {factor:.2f}" in lines[0]
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    assert rates[40] / rates[15] == pytest.approx(factor * (1 / 40) / (26 / 40))
    assert len([line for line in lines if "multiplied" in line]) == 1  # later windows lie beyond the first tenth


def test_acting_waits_while_the_schedule_warms_up(tmp_path):
    lines = []
    gauging = GaugeCallback(window=20, act="lr", print=lines.append)
    trainer = train(
        lambda params: torch.optim.AdamW(params, lr=1e-5),
        tmp_path,
        gauging,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=30,
    )
    assert trainer.lr_scheduler.base_lrs == [1e-5]
    assert lines[0].endswith("while the schedule is warming up")


def test_a_second_training_starts_anew(tmp_path):
    gauging = GaugeCallback(print=None)
    trainer = train(OPTIMIZERS["SGD"], tmp_path, gauging, max_steps=10)
    first = gauging.readings
    trainer.train()
    assert [reading.step for reading in gauging.readings] == [reading.step for reading in first] == [5, 10]


def test_outside_a_trainer():
    with pytest.raises(RuntimeError, match=r"must be called by a transformers\.Trainer"):
        GaugeCallback().on_train_begin(None, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"window": 3}, "window must be a whole number of at least 5, got 3"),
        ({"act": "batch"}, 'act must be "advise" or "lr", got \'batch\''),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GaugeCallback(**options)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trls_supervised_fine_tuning(tmp_path):
    """SFTTrainer, from texts, with its own collator and loss: one line as anywhere."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    vocabulary = {chr(i): i for i in range(32, 127)} | {"<pad>": 127, "<eos>": 128, "<unk>": 129}
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    texts = [line for line in "\n".join(topics.values()).splitlines() if 20 < len(line) < LENGTH * 2][:800]
    gauging = GaugeCallback(print=None)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_length=LENGTH,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=GROUPS,
        max_steps=STEPS,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[gauging],
    )
    trainer.train()
    assert [reading.step for reading in gauging.readings] == [5, 10, 15, 20, 25]
    assert all(0.0 < reading.gr_s <= 1.0 for reading in gauging.readings)
    logged = {entry["step"]: entry["gr_t"] for entry in trainer.state.log_history if "gr_t" in entry}
    assert logged == {reading.step: reading.gr_t for reading in gauging.readings}


# --- GradES -----------------------------------------------------------------------------------------------------------

GRADES = {"tau": 3.0, "every": 2, "warmup": 2}


def lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("model", [llama, lora])
def test_grades_freezes_and_ends_the_run(model, tmp_path):
    grades = GradESCallback(**GRADES)
    options = {"max_steps": 60, "max_grad_norm": NORM, "logging_steps": 1, "groups": 1}
    trainer = train(OPTIMIZERS["torch's"], tmp_path, grades, model=model(), **options)
    frozen = grades.grades.frozen
    assert len(frozen) == len(grades.grades.matrices)
    assert 30 < trainer.state.global_step < 60
    assert [e["grades_frozen"] for e in trainer.state.log_history if "grades_frozen" in e][-1] == len(frozen)
    for name, step in frozen.items():
        assert dict(grades.history)[step][name] < 1.0
        assert "self_attn" in name or "mlp" in name


def test_grades_reads_before_clipping(tmp_path):
    """The values are those of a Trainer that does not clip, as long as weights are the same: in the first step."""
    first = []
    for norm in (0.0, NORM):
        grades = GradESCallback(tau=1e-9, metric="norm", every=1, scale="element")
        train(OPTIMIZERS["SGD"], tmp_path, grades, max_steps=1, max_grad_norm=norm)
        first.append(grades.grades.history or grades.grades.state_dict()["pending"]["values"])
    assert first[0] == first[1]


def test_grades_goes_on_from_a_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 15, "max_steps": 26, "max_grad_norm": NORM}
    options = {**GRADES, "tau": 1.0}
    straight, resumed = GradESCallback(**options), GradESCallback(**options)
    whole = train(OPTIMIZERS["torch's"], tmp_path / "straight", straight, **saving)
    half = train(
        OPTIMIZERS["torch's"], tmp_path / "half", resumed, resume=str(tmp_path / "straight" / "checkpoint-15"), **saving
    )
    assert straight.grades.frozen
    assert resumed.grades.frozen == straight.grades.frozen
    assert torch.equal(weights(half), weights(whole))


def test_both_callbacks_at_once(tmp_path):
    alone, gauging, grades = GaugeCallback(print=None), GaugeCallback(print=None), GradESCallback(**GRADES)
    train(OPTIMIZERS["ours"], tmp_path, alone, max_grad_norm=NORM)
    train(OPTIMIZERS["ours"], tmp_path, gauging, grades, max_grad_norm=NORM)
    until = sum(reading.step <= min(grades.grades.frozen.values()) for reading in gauging.readings)
    assert until > 1
    assert gauging.readings[:until] == alone.readings[:until]
