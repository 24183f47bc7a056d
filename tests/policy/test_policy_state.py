"""The policy under any input: bounds, determinism, its state, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.healthy import CONFIG, READING, watch
from policy.simulated import Loop, World

from grgauge import Config, Continue, Policy, Reading, Retune, Stop
from grgauge.policy import Probe

POLICIES = st.fixed_dictionaries(
    {
        "rules": st.sampled_from(["measured", "published"]),
        "lr_bounds": st.sampled_from([(1e-6, 1.0), (1e-4, 3e-2), (1e-3, 1e-3)]),
        "min_batch": st.sampled_from([1, 8, 30]),
        "max_batch": st.sampled_from([48, 200, 512]),
        "batch_multiple": st.sampled_from([1, 6, 16]),
        "max_lr_factor": st.sampled_from([1.5, 4.0]),
        "max_batch_factor": st.sampled_from([1.5, 4.0]),
        "max_moves": st.sampled_from([0, 3, 40]),
    }
)
MAYBE = st.one_of(st.none(), st.floats(), st.floats(0.0, 400.0))
ANY_READING = st.builds(
    Reading,
    step=st.integers(0, 400),
    batch_size=st.just(64),
    gr_t=MAYBE,
    gr_t_error=MAYBE,
    finite_time_factor=st.floats(0.0, 1.0),
    gr_s=st.one_of(MAYBE, st.floats(0.0, 1.0)),
    gr_s_error=MAYBE,
    noise_scale=MAYBE,
    noise_scale_error=MAYBE,
    grad_norm=st.floats(),
    nonfinite=st.just(0),
    ready=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    POLICIES,
    st.lists(st.tuples(st.none() | ANY_READING, st.none() | st.floats(), st.floats(0.0, 1.0)), max_size=60),
    st.floats(1e-7, 10.0),
    st.integers(1, 4096),
)
def test_no_reading_whatever_leads_out_of_bounds(arguments, seen, lr, batch):
    policy, config, moves = Policy(**arguments), Config(lr, batch), 0
    low, high = arguments["lr_bounds"]
    for reading, loss, lr_factor in seen:
        decision = policy.observe(reading, config, loss=loss, lr_factor=lr_factor)
        if isinstance(decision, Stop):
            break
        if isinstance(decision, Probe):
            assert low <= decision.configs[1].lr <= high
            decision = policy.judge(((1.0, 1.0), (0.5, 0.5)))
        if isinstance(decision, Retune):
            config, moves = decision.config, moves + 1
            assert low <= config.lr <= high
            assert config.batch_size % arguments["batch_multiple"] == 0
            assert arguments["min_batch"] <= config.batch_size <= arguments["max_batch"]
        json.dumps(policy.state_dict(), allow_nan=False)
    assert moves <= arguments["max_moves"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([None, math.nan]), min_size=6, max_size=6), st.sampled_from(["measured", "published"]))
def test_what_is_missing_or_not_a_number_moves_nothing(values, rules):
    names = ("gr_t", "gr_t_error", "gr_s", "gr_s_error", "noise_scale", "noise_scale_error")
    assert isinstance(watch(Policy(rules=rules), **dict(zip(names, values, strict=True))), Continue)


@pytest.mark.parametrize("rules", ["measured", "published"])
def test_gr_s_alone_and_gr_t_alone_are_acted_on_as_far_as_they_go(rules):
    only_t = watch(Policy(rules=rules), gr_t=2.0, gr_s=None, gr_s_error=None, noise_scale=None)
    only_s = watch(Policy(rules=rules), gr_t=None, gr_t_error=None, gr_s=0.1, noise_scale=6.0, noise_scale_error=1.0)
    if rules == "published":
        assert isinstance(only_t, Continue)
        assert isinstance(only_s, Continue)
    else:
        assert only_t.config.lr > CONFIG.lr
        assert only_t.config.batch_size == 32, "where the rate is far too low, steps count"
        assert only_s.config.batch_size < 64
        assert only_s.config.lr < CONFIG.lr


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 120),
    st.sampled_from([Policy.default, Policy.paper]),
    st.floats(-5, 0),
    st.integers(8, 512),
)
def test_a_policy_continues_bit_for_bit_from_its_state(seed, at, make, log_lr, batch):
    def path(interrupted: bool) -> list[str]:
        loop = Loop(make(max_batch=512, min_batch=4, lr_bounds=(1e-6, 2.0)), World(), Config(10**log_lr, batch), seed)
        for i in range(150):
            if interrupted and i == at:
                state = json.loads(json.dumps(loop.policy.state_dict(), allow_nan=False))
                loop.policy = make(max_batch=512, min_batch=4, lr_bounds=(1e-6, 2.0))
                loop.policy.load_state_dict(state)
                for part in state.values():  # the policy has its own copy
                    if isinstance(part, (dict, list)):
                        part.clear()
            loop.turn()
        return [repr(decision) for _, decision in loop.decisions]

    assert path(False) == path(True) == path(False)


def test_a_state_that_does_not_fit_changes_nothing():
    policy = Policy()
    watch(policy, checks=3, losses=[2.0, 1.9, 1.8])
    before = policy.state_dict()
    for state, part in (
        ({**before, "more": 1}, "state"),
        ({**before, "losses": {}}, "state['losses']"),
        ({**before, "course": [1e-3, 64]}, "state['course']"),
        ({**before, "saved": [1e-3, 64, 640.0, 1.8, 0.1]}, "state['saved']"),
        ({**before, "rival": {"losses": {}, "lr": 1e-3}}, "state['rival']['losses']"),
        ({}, "state['rules']"),
        (Policy.paper().state_dict(), "state['rules']"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(part)} must be .*, got "):
            policy.load_state_dict(state)
        assert policy.state_dict() == before


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Policy(rules="free"), "rules"),
        (lambda: Policy(every=0), "every"),
        (lambda: Policy(warm_up=-1), "warm_up"),
        (lambda: Policy(grace=1.5), "grace"),
        (lambda: Policy(window=math.nan), "window"),
        (lambda: Policy(lr_bounds=(1.0, 0.1)), "lr_bounds"),
        (lambda: Policy(lr_bounds=(0.0, 0.1)), "lr_bounds"),
        (lambda: Policy(min_batch=0), "min_batch"),
        (lambda: Policy(max_batch=4, min_batch=8), "max_batch"),
        (lambda: Policy(max_batch=60, min_batch=50, batch_multiple=48), "max_batch"),
        (lambda: Policy(max_batch=40, min_batch=33, batch_multiple=32), "max_batch"),
        (lambda: Policy(batch_multiple=0), "batch_multiple"),
        (lambda: Policy(max_lr_factor=1.0), "max_lr_factor"),
        (lambda: Policy(max_batch_factor=0.5), "max_batch_factor"),
        (lambda: Policy(gain=0.0), "gain"),
        (lambda: Policy(coupling=1.1), "coupling"),
        (lambda: Policy(confidence=1.0), "confidence"),
        (lambda: Policy(blind=0.0), "blind"),
        (lambda: Policy(max_moves=-1), "max_moves"),
        (lambda: Config(0.0, 8), "lr"),
        (lambda: Config(math.inf, 8), "lr"),
        (lambda: Config(1e-3, 0), "batch_size"),
        (lambda: Config(1e-3, 8.5), "batch_size"),
        (lambda: Config(1e-3, 8, -1.0), "weight_decay"),
        (lambda: Policy().observe(READING, CONFIG, samples=-1.0), "samples"),
        (lambda: Policy().observe(READING, CONFIG, lr_factor=math.nan), "lr_factor"),
        (lambda: Policy().judge(((1.0, 1.0), (1.0, 1.0))), "losses"),
        (lambda: Policy.paper().judge(((1.0, 1.0), (1.0, 1.0))), "losses"),
    ],
)
def test_malformed_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be .*, got "):
        make()


def test_a_refused_observation_changes_nothing():
    policy = Policy()
    watch(policy, checks=3)
    before = policy.state_dict()
    with pytest.raises(ValueError, match="lr_factor"):
        policy.observe(READING, Config(1.0, 8), lr_factor=-1.0)
    assert policy.state_dict() == before


@pytest.mark.parametrize("losses", [((1.0, 1.0), (1.0, 1.0, 1.0)), ((1.0,), (1.0,)), ((), ())])
def test_losses_of_a_probe_that_do_not_make_pairs_are_refused_and_change_nothing(losses):
    policy = Policy()
    for step in range(5, 105, 5):
        reading = replace(READING, step=step, gr_s=0.9, gr_s_error=0.3)
        if isinstance(policy.observe(reading, CONFIG, loss=2.0 - 0.01 * step), Probe):
            break
    before = policy.state_dict()
    with pytest.raises(ValueError, match="losses must be two times the same number"):
        policy.judge(losses)
    assert policy.state_dict() == before
    assert isinstance(policy.judge(((1.0, 1.0), (0.5, 0.5))), Retune)
