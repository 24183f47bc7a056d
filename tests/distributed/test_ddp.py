"""Ranks as groups, on two and four processes over gloo, against one process with the batches of all."""

import copy

import pytest
import torch
import torch.distributed as dist
from network import BATCH, batch, network, samples
from one_process import Branching, micro_batches, weighted_truth
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grgauge import AdamW, Gauge

MAKE = {
    "adamw": lambda params: AdamW(params, lr=1e-3),
    "clipped": lambda params: AdamW(params, lr=1e-3, max_grad_norm=0.3),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}
EITHER = pytest.mark.parametrize("make", MAKE)
KINDS = pytest.mark.parametrize("kind", ["DDP", "FSDP2"])


@pytest.fixture(scope="module")
def alone():
    """The last reading of twelve steps of 2 or 4 micro-batches."""
    return {(n, name): micro_batches(make, n)[2].reading() for n in (2, 4) for name, make in MAKE.items()}


def assert_reads(seen, expected, rel=1e-5):
    assert seen["step"] == expected.step
    for gauge in ("gr_t", "gr_s", "noise_scale", "grad_norm"):
        assert seen[gauge] == pytest.approx(getattr(expected, gauge), rel=rel), gauge
    assert seen["notes"] == expected.notes


@pytest.mark.parametrize("hook", ["none", "bf16", "PowerSGD"])
def test_training_is_the_same_bit_for_bit_with_the_users_hook(two, hook):
    for results in two["hooks"]:
        assert torch.equal(results[hook]["weights"], results[hook]["plain"])
    assert not torch.equal(two["hooks"][0][hook]["weights"], torch.cat([p.flatten() for p in network().parameters()]))


@pytest.mark.parametrize("name", ["DDP", "FSDP2", "HSDP"])
def test_training_is_the_same_bit_for_bit_on_four_ranks(four, alone, name):
    for results in four["plain_and_gauged"]:
        assert torch.equal(results[name]["weights"], results[name]["plain"])
        assert_reads(results[name]["last"], alone[4, "adamw"])


@pytest.mark.parametrize("hook", ["none", "bf16", "PowerSGD"])
def test_all_ranks_hold_identical_readings_after_every_step(two, hook):
    first, *others = (results[hook] for results in two["hooks"])
    assert [seen and seen["step"] for seen in first["seen"]] == [None, *range(1, 12)]
    for other in others:
        assert (other["seen"], other["last"]) == (first["seen"], first["last"])


def test_all_ranks_hold_identical_readings_on_four(four):
    first, *others = four["plain_and_gauged"]
    for name, result in first.items():
        for other in others:
            assert (other[name]["seen"], other[name]["last"]) == (result["seen"], result["last"])


def test_compression_that_keeps_the_mean_keeps_the_reading(two, alone):
    assert_reads(two["hooks"][0]["none"]["last"], alone[2, "adamw"])
    assert_reads(two["hooks"][0]["bf16"]["last"], alone[2, "adamw"], rel=5e-3)


def test_compression_that_does_not_says_so(two):
    """PowerSGD averages in full for its first steps; then what comes back is no mean, and GR_S would read anything."""
    seen = two["hooks"][0]["PowerSGD"]["seen"]
    assert seen[3]["gr_s"] == two["hooks"][0]["none"]["seen"][3]["gr_s"]
    for reading in seen[4:]:
        assert reading["gr_s"] is None
        assert reading["gr_t"] > 1
        assert any("comm_hook does not return the mean" in note for note in reading["notes"])


@EITHER
@pytest.mark.parametrize(
    ("options", "buckets"),
    [
        ("one bucket", 1),
        ("small buckets", 3),
        ("static graph", 3),
        ("bucket views", 1),
        ("unused parameters looked for", 3),
    ],
)
def test_buckets_of_any_kind(two, alone, options, buckets, make):
    for results in two["buckets"]:
        assert results[options, make]["buckets"] == buckets
        assert_reads(results[options, make]["last"], alone[2, make])


def test_unused_parameters(two):
    torch.manual_seed(0)
    _, _, gauge = micro_batches(MAKE["adamw"], 2, net=Branching(), loss_of=lambda net, x, k: net(x, k == 1))
    expected = gauge.reading()
    for results in two["unused"]:
        assert_reads(results["last"], expected)
        assert [gr_t is None for _, gr_t, _ in results["last"]["segments"]] == [False] * 10 + [True] * 2


@KINDS
def test_accumulation(two, alone, kind):
    for results in two["accumulation"]:
        assert_reads(results[kind, "last"], alone[2, "adamw"])
        each = results[kind, "each"]
        assert each["gr_s"] is None
        assert each["gr_t"] == pytest.approx(alone[2, "adamw"].gr_t, rel=1e-5)
        assert any("gradients were reduced 2 times in the step; keep all" in note for note in each["notes"])


@KINDS
@pytest.mark.parametrize("weighted", [False, True])
def test_unequal_ranks(two, kind, weighted):
    """24 and 40 samples: as they are, the mean of the ranks' gradients is no mean over samples; with weights it is."""
    sizes = [24, 40]
    gr_t, gr_s = weighted_truth(sizes, sizes if weighted else [1, 1], map(batch, range(12)))
    for results in two["unequal"]:
        assert results[kind, weighted]["gr_t"] == pytest.approx(gr_t, rel=1e-5)
        assert results[kind, weighted]["gr_s"] == pytest.approx(gr_s, rel=1e-5)
    _, equal = weighted_truth([32, 32], [1, 1], map(batch, range(12)))
    assert gr_s != pytest.approx(equal, rel=1e-3)


def test_sizes_from_one_rank_only(two):
    reading = two["unequal"][1]["one rank only"]
    assert reading["gr_s"] is None
    assert any("samples or weight on some ranks only" in note for note in reading["notes"])


def test_what_cannot_be_attached_is_refused(two):
    """The ranks have caught the exceptions; that all of them arrived here is what is left to see."""
    for messages in two["second_hooks"]:
        assert sorted(messages) == [
            "DDP with a gauge",
            "DDP with a hook",
            "FSDP2 and comm_hook",
            "FSDP2 with a gauge",
            "FSDP2 with a hook",
            "gauge attached twice",
            "neither",
            "split_backward",
        ]
        assert "attach(module, comm_hook=..., state=...)" in messages["DDP with a hook"]


@KINDS
def test_parameters_added_after_attach_are_refused(two, kind):
    for messages in two["late_parameters"]:
        assert messages[kind] == "1.0 is no parameter of the attached module, or came after attach(module)"


def test_an_overflow_behind_the_hook_is_no_reading(two):
    """fp16 compression made infinities of finite gradients; a |mean|^2 without them would be far too small."""
    for before, after in two["overflow_in_the_hook"]:
        assert before["gr_s"] == after["gr_s"] is not None
        assert "GR_S skipped a reading: non-finite gradients" in after["notes"]
        assert after["nonfinite"] > 0


@EITHER
def test_a_sample_of_the_buckets(two, make):
    whole, part = (two["sampled"][0]["DDP", sample] for sample in (50_000_000, 20_000))
    assert part["gr_s"] != whole["gr_s"]
    assert part["gr_s"] == pytest.approx(whole["gr_s"], rel=0.1)
    assert part["gr_t"] == pytest.approx(whole["gr_t"], rel=0.1)
    assert two["sampled"][0] == two["sampled"][1]


# Resuming

RESUMED = pytest.mark.parametrize(("world", "kind"), [("two", "DDP"), ("two", "FSDP2"), ("four", "HSDP")])


@EITHER
@RESUMED
def test_a_resumed_run_reads_the_same_bits(request, world, kind, make):
    for results in request.getfixturevalue(world)["resumed"]:
        straight, again, fresh = (results[kind, make][key] for key in ("straight", "again", "fresh"))
        assert fresh is None
        assert straight[1] == again[1]
        assert straight[1]["step"] == 30
        assert straight[1]["ready"]
        # The straight run still tells of step 10 until that of step 15 has come.
        assert [seen or straight[0][0] for seen in again[0]] == straight[0]


@EITHER
def test_one_process_continues_where_two_ranks_stopped(two, make):
    saved = copy.deepcopy(two["resumed"][0]["DDP", make]["saved"])
    net = network()
    net.load_state_dict({name.removeprefix("module."): p for name, p in saved["model"].items()})
    optimizer = MAKE[make](net.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    gauge = Gauge(optimizer, BATCH, every=5)
    gauge.load_state_dict(saved["gauge"])
    micro_batches(None, 2, net=net, optimizer=optimizer, gauge=gauge, start=13, steps=17)
    assert_reads(two["resumed"][0]["DDP", make]["straight"][1], gauge.reading())


@EITHER
def test_four_ranks_continue_where_two_stopped(two, four, make):
    """On the same batches GR_T is the same; groups are others, so GR_S is another estimate of the same thing."""
    expected = two["resumed"][0]["DDP", make]["straight"][1]
    for results in four["resumed_on_other_ranks"]:
        result = results["DDP", make]
        assert result["said"] == []
        assert result["last"]["gr_t"] == pytest.approx(expected["gr_t"], rel=1e-5)
        assert result["last"]["gr_s"] == pytest.approx(expected["gr_s"], abs=2 * expected["gr_s_error"])
        assert result["last"]["gr_s"] != expected["gr_s"]


def test_an_ema_spread_over_other_ranks_starts_cold_and_says_so(four):
    for results in four["resumed_on_other_ranks"]:
        for make in ("sgd", "clipped"):
            cold = results["FSDP2", make]
            assert len(cold["said"]) == 1
            assert "made of 2 shards, these are 4" in cold["said"][0]
            assert not cold["last"]["ready"]
            assert any("GR_T not ready" in note for note in cold["last"]["notes"])
        assert results["FSDP2", "adamw"]["said"] == []  # m is the optimizer's there, and comes with its state


# One rank


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@EITHER
@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_one_rank_is_one_group(world_of_one, wrap, make):
    model = wrap(network())
    optimizer = MAKE[make](model.parameters())
    gauge = Gauge(optimizer, BATCH, every=1)
    gauge.attach(model)
    for t in range(25):
        optimizer.zero_grad()
        x, y = batch(t)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    reading = gauge.reading()
    assert reading.gr_t > 1
    assert reading.gr_s is None
    assert reading.notes == ("GR_S not available: there is one rank, and GR_S needs at least two",)


def test_batches_differ_and_parts_make_up_the_whole():
    assert not torch.equal(batch(0)[0], batch(1)[0])
    assert torch.equal(torch.cat([batch(0, k, 4)[0] for k in range(4)]), batch(0)[0])
    assert len(samples()[0]) == 2000
