"""What only sharded parameters have: FSDP2 on two processes, HSDP on four."""

import pytest
import torch

SHARDED = pytest.mark.parametrize(("world", "kind"), [("two", "FSDP2"), ("four", "HSDP")])


@SHARDED
def test_a_sample_is_the_same_reading_on_all_ranks(request, world, kind):
    first, *others = request.getfixturevalue(world)["sampled"]
    whole, part = first[kind, 50_000_000], first[kind, 20_000]
    for other in others:
        assert other[kind, 20_000] == part
    assert part["gr_s"] != whole["gr_s"]
    for gauge in ("gr_t", "gr_s", "grad_norm"):
        assert part[gauge] == pytest.approx(whole[gauge], rel=0.1)


@pytest.mark.parametrize("most", [0.3, 1e3])
@pytest.mark.parametrize("world", ["two", "four"])
def test_clipping_inside_the_step_is_torchs(request, world, most):
    for results in request.getfixturevalue(world)["clipping"]:
        norms = results[most]["norms"]
        for ours, theirs in norms:
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert all(norm > 0.3 for norm, _ in norms)  # so one of the two clips at every step, and the other never
        assert norms[0][0] != norms[1][0]
        torch.testing.assert_close(results[most]["ours"], results[most]["theirs"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("what", ["flat", "adamw", "sgd", "divide factor"])
def test_refusals(two, what):
    texts = {
        "flat": "flat=True needs parameters in one piece; these are sharded",
        "adamw": "is sharded over ranks: call gauge.attach(module) before the first step",
        "sgd": "is sharded over ranks: call gauge.attach(module) before the first step",
        "divide factor": "GR_S needs gradients reduced by AVG or SUM",
    }
    for messages in two["refusals"]:
        assert texts[what] in messages[what]


def test_a_mesh_that_shards_nothing_is_refused(four):
    assert all("use DistributedDataParallel" in message for message in four["replicated_only"])


def test_reducing_over_shards_every_time_is_seen(four):
    for reading in four["hsdp_reduced_over_replicas_last"]:
        assert reading["gr_s"] is None
        assert any("gradients were reduced 2 times in the step" in note for note in reading["notes"])


def test_our_optimizer_in_torchs_distributed_state_dicts(two):
    for results in two["checkpointed_optimizer"]:
        assert len(results["names"]) == 8
        assert "layers.0.weight" in results["names"]
        assert torch.equal(results["ours"], results["straight"])
        torch.testing.assert_close(results["torch's"], results["straight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", ["two", "four"])
def test_shards_round_as_the_whole_parameters_do(request, world, dtype):
    """So no two shards draw the same random bits, and replicas do."""
    for results in request.getfixturevalue(world)["rounded"]:
        assert torch.equal(results[dtype, "sharded"], results[dtype, "whole"])
