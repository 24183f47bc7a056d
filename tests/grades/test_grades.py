"""GradES: what is monitored, what a reading is, what follows from it, and that a frozen matrix rests."""

from __future__ import annotations

import copy
import io
import math

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import grgauge_kernels as gk
from grgauge import AdamW, Gauge, GradES
from grgauge.grades.matrix import LEVEL_READINGS

OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "ours, flat": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, flat=True),
    "ours, clipping": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, max_grad_norm=0.3),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, blocks, norm, head: what every transformer has around its matrices."""

    def __init__(self, width=8, depth=2, checkpointed=None):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16, bias=False)
        self.checkpointed = checkpointed  # use_reentrant, or None: no checkpointing

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return self.head(self.norm(x))


MATRICES = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)


def loss_of(net, t, scale=1.0):
    tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(t))
    return scale * nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(net, optimizer, steps, start=1):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(net, t).backward()
        optimizer.step()


def drive(net, optimizer, gradients):
    """One step for each entry: name of a matrix -> value that its whole gradient has (None: no gradient); else 1."""
    for given in gradients:
        for name, p in net.named_parameters():
            value = given.get(name.removesuffix(".weight"), 1.0) if isinstance(given, dict) else given
            p.grad = torch.full_like(p, value) if value is not None and p.requires_grad else None
        optimizer.step()


def grades_of(net, make=OPTIMIZERS["ours"], **kwargs):
    options = {"metric": "norm", "tau": 0.5, "total_steps": 20, "warmup": 0, "every": 1, "patience": 1} | kwargs
    optimizer = make(net.parameters())
    return GradES(net, optimizer, **options), optimizer


def values_of(grades):
    return {reading.step: dict(zip(grades.matrices, reading.values, strict=True)) for reading in grades.history}


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


# --- what is monitored ------------------------------------------------------------------------------------------------


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, **SMALL))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def torch_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False)


STYLES = {
    llama: (
        "model.layers.{}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
    gpt2: ("transformer.h.{}.", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    bert: (
        "bert.encoder.layer.{}.",
        "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
        "output.dense",
    ),
    vit: (
        "vit.layers.{}.",
        "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
    ),
    torch_encoder: ("layers.{}.", "self_attn.in_proj_weight self_attn.out_proj linear1 linear2"),
}


@pytest.mark.parametrize(("make", "expected"), STYLES.items(), ids=[make.__name__ for make in STYLES])
def test_the_matrices_of_every_block_are_found_and_nothing_else(make, expected):
    model = make()
    grades = GradES(model, torch.optim.SGD(model.parameters()), tau=0.5, total_steps=10)
    prefix, names = expected
    assert set(grades.matrices) == {prefix.format(i) + name for i in range(2) for name in names.split()}


PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def lora(targets=("q_proj", "down_proj")):
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=list(targets)))


@PEFT
def test_lora_pairs_are_one_matrix_each():
    model = lora()
    grades = GradES(model, torch.optim.SGD(model.parameters()), tau=0.5, total_steps=10)
    expected = {
        f"base_model.model.model.layers.{i}.{module}.lora.default"
        for i in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert set(grades.matrices) == expected


@pytest.mark.parametrize("container", [nn.Sequential, lambda *blocks: nn.ModuleDict(zip("ab", blocks, strict=True))])
def test_blocks_of_one_type_in_a_sequential_or_a_dict_count_as_repeated(container):
    net = network()
    net.blocks = container(*net.blocks)
    assert len(grades_of(net)[0].matrices) == 4


def test_a_single_block_in_a_list_is_a_block():
    assert grades_of(network(depth=1))[0].matrices == MATRICES[:2]


def test_a_regular_expression_names_matrices():
    assert grades_of(network(), modules=r"\.up$")[0].matrices == ("blocks.0.up", "blocks.1.up")
    assert grades_of(network(), modules="embedding|head")[0].matrices == ("embedding", "head")


def test_what_is_not_trained_is_not_monitored():
    net = network()
    net.blocks[0].up.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if name != "blocks.1.up.weight"])
    grades = GradES(net, optimizer, tau=0.5, total_steps=10)
    assert grades.matrices == ("blocks.0.down", "blocks.1.down")


@pytest.mark.parametrize(
    ("modules", "words"),
    [("q_proj", "matches no matrix.*blocks.0.up, blocks.0.down"), ("(", "must be 'auto' or a regular expression")],
)
def test_no_match_for_modules_is_an_error(modules, words):
    with pytest.raises(ValueError, match=words):
        grades_of(network(), modules=modules)


def test_a_model_without_blocks_is_an_error_that_says_what_there_is():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"no 2-D weights inside repeated blocks.*: 0, 2$"):
        grades_of(net)


def test_weights_tied_between_blocks_are_one_matrix_and_such_to_the_embedding_none():
    net = network()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    net.head.weight = net.embedding.weight
    assert grades_of(net)[0].matrices == ("blocks.0.up", "blocks.0.down", "blocks.1.down")
    wide = nn.Linear(8, 16)
    wide.weight = net.embedding.weight
    net.blocks[1].up = wide
    assert grades_of(net)[0].matrices == ("blocks.0.up", "blocks.0.down", "blocks.1.down")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metric": "l2"}, "metric is 'l2'; it must be one of 'delta', 'norm'"),
        ({"scale": "layer"}, "scale is 'layer'"),
        ({"tau": 0.0}, "tau is 0.0; it must be above 0"),
        ({"tau": math.nan}, "tau is nan"),
        ({"alpha": 1.5}, r"alpha is 1.5; it must lie in \[0, 1\]"),
        ({"total_steps": 0}, "total_steps is 0; it must be at least 1"),
        ({"patience": 0}, "patience is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"every": 1, "metric": "delta"}, "every is 1; it must be at least 2"),
        ({"sample": 0}, "sample is 0"),
        ({"enough": 0.0}, r"enough is 0\.0; it must lie in \(0, 1\]"),
        ({"thaw": 0.5}, "thaw is 0.5; it must be above tau = 0.5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        grades_of(network(), **given)


# --- what a reading is ------------------------------------------------------------------------------------------------


def mean_abs(tensors):
    return float(sum(t.double().abs().sum() for t in tensors) / sum(t.numel() for t in tensors))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_readings_equal_their_definition(make, metric):
    net = network()
    grades, optimizer = grades_of(net, make, metric=metric, every=3, alpha=1.0, total_steps=99)
    weights = dict(net.named_parameters())
    before, expected = {}, {}
    for t in range(1, 14):
        optimizer.zero_grad()
        loss_of(net, t).backward()
        now = {name: weights[f"{name}.weight"].grad.clone() for name in MATRICES}
        if t % 3 == 0:
            differences = {name: now[name] - before[name] if metric == "delta" else now[name] for name in MATRICES}
            expected[t] = {name: mean_abs([d]) for name, d in differences.items()}
        before = now
        optimizer.step()
    values = values_of(grades)
    assert list(values) == [3, 6, 9, 12]
    for t, at_step in values.items():
        assert at_step == pytest.approx(expected[t], rel=1e-5)


@PEFT
@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_a_pair_reads_the_sum_of_both(metric):
    model = lora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grades = GradES(model, optimizer, tau=0.5, total_steps=9, metric=metric, every=2, alpha=1.0)
    pairs = {
        name: [p for n, p in model.named_parameters() if n.startswith(name.removesuffix("lora.default") + "lora_")]
        for name in grades.matrices
    }
    tokens = torch.randint(32, (2, 8))
    before, expected = {}, {}
    for t in range(1, 6):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        now = {name: [p.grad.clone() for p in pair] for name, pair in pairs.items()}
        for name in pairs:
            assert len(pairs[name]) == 2
            against = before.get(name) if metric == "delta" else [torch.zeros_like(g) for g in now[name]]
            if t % 2 == 0:
                expected.setdefault(t, {})[name] = mean_abs([a - b for a, b in zip(now[name], against, strict=True)])
        before = now
        optimizer.step()
    values = values_of(grades)
    assert list(values) == [2, 4]
    for t, at_step in values.items():
        assert at_step == pytest.approx(expected[t], rel=1e-5)


def test_nothing_is_measured_between_readings(monkeypatch):
    net = network()
    grades, optimizer = grades_of(net, OPTIMIZERS["torch AdamW"], metric="delta", every=5)
    steps = []
    measure = gk.measure_
    monkeypatch.setattr(gk, "measure_", lambda *args, **kwargs: steps.append(t) or measure(*args, **kwargs))
    for t in range(1, 15):
        train(net, optimizer, 1, start=t)
    assert steps == [4, 5, 9, 10, 14]
    assert [reading.step for reading in grades.history] == [5, 10]


def test_the_state_of_delta_is_one_per_cent_of_the_matrices():
    net = network(width=512, depth=4)
    grades, optimizer = grades_of(net, metric="delta", every=2, total_steps=100)
    train(net, optimizer, 1)
    state = sum(previous.numel() for previous, _ in grades.state_dict()["filled"])
    total = sum(m.weight.numel() for block in net.blocks for m in (block.up, block.down))
    assert state <= total / 200
    small = network(width=128, depth=4)  # a block of each
    grades, optimizer = grades_of(small, metric="delta", every=2, total_steps=100)
    train(small, optimizer, 1)
    total = sum(p.numel() for p in small.parameters())
    assert sum(previous.numel() for previous, _ in grades.state_dict()["filled"]) <= total / 60


@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_a_sample_reads_what_the_whole_reads(metric):
    readings = []
    for sample in (None, 10**9):
        net = network(width=512, depth=2)
        grades, optimizer = grades_of(net, metric=metric, every=2, total_steps=100, sample=sample)
        train(net, optimizer, 3)
        readings.append(values_of(grades)[2])
    # 5 blocks of 256 neighbours out of 1024 in a matrix; neighbours are alike
    assert readings[0] == pytest.approx(readings[1], rel=0.25)


def test_the_model_trains_as_without():
    plain, gauged = network(), network()
    train(plain, OPTIMIZERS["ours"](plain.parameters()), 12)
    _, optimizer = grades_of(gauged, metric="delta", every=2, tau=1e-9)
    train(gauged, optimizer, 12)
    for p, q in zip(plain.parameters(), gauged.parameters(), strict=True):
        assert torch.equal(p, q)


# --- what follows from a reading --------------------------------------------------------------------------------------


def test_a_matrix_freezes_when_it_reads_less_than_tau_of_its_own_level():
    """Four matrices on four scales; two of them fall below half of what they were."""
    net = network()
    grades, optimizer = grades_of(net, alpha=0.5, total_steps=20)
    early = dict(zip(MATRICES, (1.0, 2.0, 30.0, 4e-3), strict=True))
    late = dict(zip(MATRICES, (0.51, 0.98, 16.0, 1e-3), strict=True))
    drive(net, optimizer, [early] * 10 + [late] * 2)
    assert grades.levels == pytest.approx(early)
    assert grades.frozen == {"blocks.0.down": 11, "blocks.1.down": 11}
    assert [r.froze for r in grades.history if r.froze] == [("blocks.0.down", "blocks.1.down")]
    assert not grades.done


@pytest.mark.parametrize(("scale", "tau"), [("element", 0.5), ("matrix", 64.0)])
def test_tau_can_be_absolute(scale, tau):
    """The sum over the 128 elements of a matrix is what the paper compares."""
    net = network()
    grades, optimizer = grades_of(net, scale=scale, tau=tau, alpha=0.0)
    drive(net, optimizer, [{"blocks.0.up": 0.49, "blocks.1.up": 0.51}] * 2)
    assert grades.frozen == {"blocks.0.up": 1}


def test_no_freezing_in_the_grace_period_or_before_the_level_is_known():
    net = network()
    grades, optimizer = grades_of(net, scale="element", tau=9.0, alpha=0.5, total_steps=9)
    drive(net, optimizer, [1.0] * 5)
    assert grades.frozen == {}
    drive(net, optimizer, [1.0])
    assert set(grades.frozen.values()) == {5}  # ceil(0.5 * 9)
    net = network()
    grades, optimizer = grades_of(net, alpha=0.0, warmup=4, tau=0.5)
    drive(net, optimizer, [1.0] * 4 + [0.1] * LEVEL_READINGS)
    assert set(grades.levels.values()) == {None}
    drive(net, optimizer, [0.01] * 2)
    assert grades.levels == pytest.approx(dict.fromkeys(MATRICES, 0.1))
    assert set(grades.frozen.values()) == {5 + LEVEL_READINGS}


def test_patience_counts_readings_in_a_row():
    net = network()
    grades, optimizer = grades_of(net, scale="element", alpha=0.0, patience=3)
    drive(net, optimizer, [0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1])
    assert set(grades.frozen.values()) == {6}


def test_the_first_reading_freezes_nothing():
    """Not even one made at the very first step, where released code finds a difference of 0."""
    net = network()
    grades, optimizer = grades_of(net, metric="delta", every=2, scale="element", tau=1e9, alpha=0.0)
    state = grades.state_dict() | {"step": 1}  # a run whose first step here is one to be read
    grades.load_state_dict(state)
    drive(net, optimizer, [1.0] * 2)
    assert all(map(math.isnan, grades.history[0].values))
    assert grades.frozen == {}
    drive(net, optimizer, [1.0] * 2)
    assert set(grades.frozen.values()) == {4}


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, 0.0], ids=["NaN", "infinite", "missing", "zero"])
@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_a_gradient_that_says_nothing_freezes_nothing(metric, bad):
    """Nor does it break the row that patience counts. With delta this holds for both steps of a reading."""
    quiet, loud, none = {"blocks.0.up": 0.01}, {"blocks.0.up": 0.02}, {"blocks.0.up": bad}
    for at in (0, 1) if metric == "delta" and bad != 0.0 else (1,):
        net = network()
        grades, optimizer = grades_of(
            net, OPTIMIZERS["torch AdamW"], metric=metric, every=2, scale="element", alpha=0.0, patience=2
        )
        pair = [quiet, loud]
        pair[at] = none
        drive(net, optimizer, [*pair, *pair, quiet, loud, *pair, quiet])
        assert "blocks.0.up" not in grades.frozen
        assert [math.isnan(values["blocks.0.up"]) for values in values_of(grades).values()] == [1, 1, 0, 1]
        drive(net, optimizer, [loud, quiet])
        assert grades.frozen["blocks.0.up"] == 10


def test_all_frozen_is_the_signal_to_stop_and_then_nothing_is_measured(monkeypatch):
    net = network()
    grades, optimizer = grades_of(net, OPTIMIZERS["torch AdamW"], scale="element", tau=9.0, alpha=0.0)
    train(net, optimizer, 1)
    assert not grades.done
    train(net, optimizer, 1, start=2)
    assert grades.done
    assert set(grades.frozen) == set(MATRICES)
    monkeypatch.setattr(gk, "measure_", lambda *args, **kwargs: pytest.fail("measured"))
    before = snapshot(net)
    train(net, optimizer, 3, start=3)
    rest = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert rest == {f"{name}.weight" for name in MATRICES}
    assert [reading.step for reading in grades.history] == [1]


def test_enough_is_a_share_of_elements():
    """Three of four matrices freeze; the last never comes to rest."""
    quiet, last = dict.fromkeys(MATRICES, 1e-3), MATRICES[-1]
    for enough, done in ((0.5, True), (0.75, True), (0.76, False), (1.0, False)):
        net = network()
        grades, optimizer = grades_of(net, alpha=0.0, scale="element", tau=1e-2, enough=enough, total_steps=20)
        drive(net, optimizer, [quiet | {last: 1.0}] * 4)
        assert set(grades.frozen) == set(MATRICES) - {last}
        assert grades.done == done
        measured = len(grades.history)
        drive(net, optimizer, [quiet | {last: 1.0}] * 2)
        assert len(grades.history) > measured  # who goes on is still told of the last


@PEFT
def test_training_goes_on_where_freezing_leaves_nothing_to_train():
    model = lora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grades = GradES(
        model, optimizer, tau=1e9, scale="element", total_steps=9, metric="norm", every=1, patience=1, alpha=0.0
    )
    tokens = torch.randint(32, (2, 8))
    for t in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if t == 1:
            assert grades.done
            before = snapshot(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_frozen_matrix_takes_part_again_when_its_gradient_rises():
    """It is looked at in every fourth reading, and at no other time is its gradient computed."""
    net = network()
    grades, optimizer = grades_of(net, scale="element", alpha=0.0, every=2, tau=0.5, thaw=2.0, metric="delta")
    weight = net.blocks[0].up.weight
    wanted = []
    for t in range(1, 22):
        wanted.append(weight.requires_grad)
        sign = (-1.0) ** t
        drive(net, optimizer, [dict.fromkeys(MATRICES, sign) | {"blocks.0.up": sign * (0.1 if t <= 8 else 4.0)}])
        if t == 12:
            still = weight.detach().clone()
    # read at 2, frozen in 3; looked at for the reading of 8 (0.2: rests) and that of 16 (8: thawed in 17)
    expected = [t <= 3 or t in (7, 8, 15, 16) or t >= 18 for t in range(1, 22)]
    assert wanted == expected
    assert [(r.step, r.thawed) for r in grades.history if r.thawed] == [(16, ("blocks.0.up",))]
    assert values_of(grades)[8]["blocks.0.up"] == pytest.approx(0.2)
    assert math.isnan(values_of(grades)[10]["blocks.0.up"])
    assert "blocks.0.up" not in grades.frozen
    assert not torch.equal(weight, still)


# --- a frozen matrix rests --------------------------------------------------------------------------------------------


FREEZE_UP = {"modules": "up", "scale": "element", "tau": 1e9, "alpha": 0.25, "total_steps": 12, "every": 1}


@EVERY_OPTIMIZER
def test_a_frozen_matrix_does_not_move_by_a_bit(make):
    """Neither momentum nor weight decay moves it, and its neighbours move on."""
    net = network()
    grades, optimizer = grades_of(net, make, **FREEZE_UP)
    train(net, optimizer, 3)
    assert grades.frozen == {}
    before = snapshot(net)
    train(net, optimizer, 8, start=4)
    assert grades.frozen == {"blocks.0.up": 3, "blocks.1.up": 3}
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == (name in ("blocks.0.up.weight", "blocks.1.up.weight")), name
        assert p.requires_grad != (name in ("blocks.0.up.weight", "blocks.1.up.weight"))


def backward_flops(net):
    loss = loss_of(net, 0)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_the_product_for_the_weight_gradient_is_saved():
    net = network()
    grades, optimizer = grades_of(net, **FREEZE_UP)
    full = backward_flops(net)
    train(net, optimizer, 5)
    assert len(grades.frozen) == 2
    product = 2 * 32 * 8 * 16  # 4 x 8 tokens, 8 in, 16 out
    assert full - backward_flops(net) == 2 * product


def test_a_compiled_model_has_the_names_of_the_plain_one_and_saves_the_same():
    net = torch.compile(network(), backend="eager")
    grades, optimizer = grades_of(net, **FREEZE_UP)
    assert grades.matrices == ("blocks.0.up", "blocks.1.up")
    full = backward_flops(net)
    train(net, optimizer, 5)
    assert full - backward_flops(net) == 2 * 2 * 32 * 8 * 16


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    ends = []
    for checkpointed in (None, reentrant):
        net = network(checkpointed=checkpointed)
        grades, optimizer = grades_of(net, **FREEZE_UP | {"metric": "delta", "every": 2})
        train(net, optimizer, 12)
        ends.append((snapshot(net), grades.frozen))
    assert ends[0][1] == ends[1][1] == {"blocks.0.up": 4, "blocks.1.up": 4}
    assert all(torch.equal(ends[0][0][name], p) for name, p in ends[1][0].items())


def test_a_tied_matrix_rests_in_all_its_places():
    net = network()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    full = backward_flops(net)
    grades, optimizer = grades_of(net, **FREEZE_UP)
    train(net, optimizer, 3)
    before = net.blocks[1].up.weight.detach().clone()
    train(net, optimizer, 5, start=4)
    assert grades.frozen == {"blocks.0.up": 3}
    assert torch.equal(net.blocks[1].up.weight, before)
    assert full - backward_flops(net) == 2 * 2 * 32 * 8 * 16


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "torch AdamW, fused"])
def test_grad_scaler(name):
    """Readings are of unscaled gradients; an overflow in either step of one voids it; frozen stays frozen."""
    net, plain = network(), network()
    options = {"metric": "delta", "every": 2, "modules": "up", "scale": "element", "tau": 1e9, "patience": 1}
    options |= {"alpha": 0.5, "total_steps": 16}
    grades, optimizer = grades_of(net, OPTIMIZERS[name], **options)
    reference, other = grades_of(plain, OPTIMIZERS[name], **options)
    train(plain, other, 7)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    before = None
    for t in range(1, 15):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(net, t))
        (loss * math.inf if t == 12 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if len(grades.frozen) == 2 and before is None:
            before = net.blocks[0].up.weight.detach().clone()
    for t in (2, 4, 6):
        assert values_of(grades)[t] == pytest.approx(values_of(reference)[t], rel=1e-4)
    assert set(grades.frozen.values()) == {8}
    assert torch.equal(net.blocks[0].up.weight, before)


@pytest.mark.parametrize("name", ["ours", "torch AdamW, fused"])
def test_a_step_that_grad_scaler_skips_voids_the_reading(name):
    for overflow in (3, 4):
        net = network()
        grades, optimizer = grades_of(
            net, OPTIMIZERS[name], metric="delta", every=2, scale="element", tau=1e9, alpha=0.2, patience=1
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for t in range(1, 6):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(net, t))
            (loss * math.inf if t == overflow else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(map(math.isnan, grades.history[1].values))
        assert grades.frozen == {}


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice a step, as sharpness-aware minimisation does."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    def step(self, closure):
        with torch.enable_grad():
            closure()
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice, AdamW])
def test_a_closure_is_read_once_and_cannot_move_a_frozen_matrix(kind):
    net = network()
    optimizer = kind(net.parameters(), lr=1e-2, weight_decay=0.1)
    grades = GradES(
        net, optimizer, tau=1e9, scale="element", total_steps=8, every=1, metric="norm", patience=1, alpha=0.0
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        for matrix in net.blocks[0].up, net.blocks[0].down:  # as DDP leaves one
            matrix.weight.grad = torch.ones_like(matrix.weight)
        return loss

    optimizer.step(closure)
    assert not grades.done
    before = snapshot(net)
    optimizer.step(closure)
    optimizer.step(closure)
    assert [reading.step for reading in grades.history] == [1]
    assert grades.done
    rest = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert rest == {f"{name}.weight" for name in MATRICES}


def test_an_optimizer_that_moves_parameters_without_a_gradient_is_refused():
    net = network()
    with pytest.raises(TypeError, match="optimizer is LBFGS"):
        grades_of(net, torch.optim.LBFGS)


def test_a_gauge_on_the_same_optimizer_goes_on():
    net = network()
    grades, optimizer = grades_of(net, **FREEZE_UP)
    gauge = Gauge(optimizer, 4, every=2)
    train(net, optimizer, 30)
    assert len(grades.frozen) == 2
    assert gauge.reading().step == 30
    assert gauge.reading().gr_t > 0


def test_removed_it_lets_everything_train_again():
    net = network()
    grades, optimizer = grades_of(net, **FREEZE_UP)
    train(net, optimizer, 6)
    grades.remove()
    before = snapshot(net)
    train(net, optimizer, 2, start=7)
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert [reading.step for reading in grades.history] == [1, 2, 3]


# --- resuming ---------------------------------------------------------------------------------------------------------


def history_of(grades):
    return [(r.step, tuple(map(str, r.values)), r.froze, r.thawed) for r in grades.history]


@pytest.mark.parametrize("cut", [3, 5, 6, 9, 13, 15, 16, 17])
@pytest.mark.parametrize("name", ["ours", "ours, flat", "torch AdamW"])
def test_a_resumed_run_continues_exactly(cut, name):
    """Cut while levels form, between the two steps of a reading, before it is acted on, after freezing, in a probe."""
    options = {"metric": "delta", "every": 2, "scale": "level", "tau": 0.95, "thaw": 1.02, "total_steps": 16}
    options |= {"alpha": 0.6, "patience": 1, "warmup": 0}
    whole, parts = network(), network()
    grades, optimizer = grades_of(whole, OPTIMIZERS[name], **options)
    train(whole, optimizer, 40)
    assert any(r.froze for r in grades.history)
    assert any(r.thawed for r in grades.history)

    before, optimizer = grades_of(parts, OPTIMIZERS[name], **options)
    train(parts, optimizer, cut)
    file = io.BytesIO()
    torch.save((parts.state_dict(), optimizer.state_dict(), before.state_dict()), file)
    file.seek(0)
    model_state, optimizer_state, state = torch.load(file, weights_only=True)
    resumed = network(seed=1)
    resumed.load_state_dict(model_state)
    after, optimizer = grades_of(resumed, OPTIMIZERS[name], **options)
    optimizer.load_state_dict(optimizer_state)
    after.load_state_dict(state)
    assert after.frozen == before.frozen
    train(resumed, optimizer, 40 - cut, start=cut + 1)
    assert history_of(after) == history_of(grades)
    assert after.frozen == grades.frozen
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    grades, _ = grades_of(network())
    others = (grades_of(network(), metric="delta", every=2)[0], grades_of(network(), modules="up")[0])
    for other, words in zip(others, ("metric is 'delta'", "2 other matrices"), strict=True):
        before = copy.deepcopy(grades.state_dict())
        with pytest.raises(ValueError, match=words):
            grades.load_state_dict(other.state_dict())
        assert grades.state_dict() == before


def test_it_says_what_it_does():
    assert repr(grades_of(network(), metric="delta", every=2)[0]) == (
        "GradES(0 of 4 matrices frozen; mean |g_t - g_(t-1)| < 0.5 of its own early level, from step 10 on)"
    )
