"""The measured rules in thousands of simulated trainings, each in a closed loop with its policy."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import pairwise

import pytest
from policy.healthy import CONFIG, watch
from policy.simulated import EVERY, FATAL, Loop, Outcome, World, ideal_cost

from grgauge import Config, Continue, Policy, Retune
from grgauge.policy.gauge_rules import full_grown

STARTS = 600
PROGRESS = 3.0


def outcome(world=None, lr=1e-3, batch=64, seed=0, samples=3e5, progress=2.0, with_loss=True, **settings) -> Outcome:
    settings = {"min_batch": 4, "max_batch": 512, **settings}
    return Loop(Policy(**settings), world or World(), Config(lr, batch), seed, with_loss).run(samples, progress)


def test_the_simulator_kills_above_its_fatal_rate_and_looks_healthy_then():
    loop = Loop(Policy(max_moves=0), World(), Config(2 * FATAL * 3e-3, 64))
    for _ in range(30):
        loop.turn()
    assert loop.training.dead
    assert 12.0 < full_grown(loop.training.advance()[0].gr_t, 1.0) < 30.0


def test_warm_up_delays_the_search_and_does_not_mislead_it():
    loop = Loop(Policy(min_batch=4, max_batch=512), World(), Config(3e-3, 64))
    for i in range(40):
        loop.turn(min((i + 1) / 30, 1.0))
    assert loop.config.lr <= 3e-3 * 2


# --- the five ways in which simpler controllers failed ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_a_batch_far_too_large_is_left_after_one_reading(seed):
    """512 at 1e-5 with a noise scale of 20: not a warm-up of 20 steps, not even 10."""
    run = outcome(World(mu=20.0), lr=1e-5, batch=512, seed=seed)
    step, first = next((s, d) for s, d in run.decisions if isinstance(d, Retune))
    assert step == EVERY
    assert first.evidence.quantity == "GR_S"
    assert first.reuse
    assert first.config.batch_size <= 128
    assert first.config.lr == pytest.approx(1e-5 * math.sqrt(first.config.batch_size / 512))
    assert run.reached
    assert run.cost < 2.4 * ideal_cost(World(mu=20.0), 2.0)


@pytest.mark.parametrize("seed", range(5))
def test_b_a_dead_network_is_left_although_its_gauges_look_healthy(seed):
    """The very gauges of the zone; the loss exploded, then came back to that of untrained weights and stays there."""
    policy = Policy()
    assert isinstance(policy.observe(None, CONFIG, loss=2.3), Continue)
    losses = [3.4, 2.8] + [2.3 + 0.01 * (-1) ** i for i in range(18)]
    decision = watch(policy, losses=losses)
    assert isinstance(decision, Retune)
    assert not decision.reuse
    assert decision.evidence.quantity == "loss"
    assert decision.config.lr == pytest.approx(1e-3 / 30)
    run = outcome(lr=0.3, seed=seed)
    assert run.reached
    assert not run.training.dead
    assert not run.moves[0].reuse


def test_d_a_noise_scale_far_above_the_batch_is_no_reason_for_a_large_one():
    """A batch grows early to 16 at most, and later step by step: what it averages out costs more than it gains."""
    for seed in range(10):
        run = outcome(World(mu=1000.0), lr=1e-4, batch=16, seed=seed, samples=1e6, progress=3.0)
        sizes = [16] + [move.config.batch_size for move in run.moves]
        assert all(b <= max(16, 2 * a) for a, b in pairwise(sizes))
        assert run.reached


# --- many starts -----------------------------------------------------------------------------------------------------


@cache
def journeys() -> tuple[tuple[World, Config, Outcome, float], ...]:
    """Random worlds and starts, log-uniform over lr 1e-5..1 and batch 8..512, until the excess loss is e^-3."""
    rng, runs = random.Random(3), []
    for seed in range(STARTS):
        world = World(best=10 ** rng.uniform(-3.5, -1.5), mu=10 ** rng.uniform(1.0, 2.5), drift=rng.random())
        start = Config(10 ** rng.uniform(-5, 0), round(8 * 64 ** rng.random()))
        ideal = ideal_cost(world, PROGRESS)
        policy = Policy(min_batch=4, max_batch=512)
        runs.append((world, start, Loop(policy, world, start, seed).run(6 * ideal, PROGRESS), ideal))
    return tuple(runs)


def test_nearly_every_start_arrives_at_little_more_than_the_cost_of_an_ideal_run():
    """High starts pay for a comparison with untrained weights, and raised ones wait: of no use here, where no weights
    stay damaged and a higher learning rate is as good later as it looks at first."""
    ratios = sorted(run.cost / ideal if run.reached else math.inf for _, _, run, ideal in journeys())
    assert ratios[len(ratios) // 2] < 1.0
    assert ratios[int(0.9 * len(ratios))] < 1.7
    assert ratios[int(0.98 * len(ratios))] < 2.5


def test_nearly_every_start_ends_near_the_best_learning_rate():
    near = [
        0.4 < run.config.lr / world.best_lr(run.config.batch_size, run.training.progress) < 3.0
        for world, _, run, _ in journeys()
    ]
    assert sum(near) >= 0.95 * len(near)


def test_nothing_oscillates_for_ever():
    """Few moves in all, no configuration proposed again and again, and hardly any once the search is over."""
    for _, _, run, _ in journeys():
        assert len(run.moves) <= 25
        configs = [move.config for move in run.moves]
        assert all(configs.count(config) <= 3 for config in configs)


@pytest.mark.parametrize("seed", range(12))
def test_once_found_a_configuration_stays(seed):
    """In 200 000 samples, moves in the second half are a few at most."""
    rng = random.Random(seed)
    run = outcome(
        World(mu=10 ** rng.uniform(1.0, 2.5), drift=0.1),
        lr=10 ** rng.uniform(-5, 0),
        batch=round(8 * 64 ** rng.random()),
        seed=seed,
        samples=200_000,
        progress=math.inf,
    )
    late = [decision for _, decision in run.decisions[len(run.decisions) // 2 :] if isinstance(decision, Retune)]
    assert len(late) <= 6


def test_gr_t_moves_nothing_while_it_is_blind():
    for _, _, run, _ in journeys():
        for move in run.moves:
            if move.evidence.quantity == "GR_T":
                assert move.evidence.rule == "learning rate"


def test_every_decision_says_why_in_one_line():
    seen = set()
    for _, _, run, _ in journeys()[:100]:
        for _, decision in run.decisions:
            assert decision.reason
            assert decision.evidence.rule
            text = str(decision)
            assert "\n" not in text
            assert decision.reason in text
            seen.add(decision.evidence.rule)
    assert {"waiting", "learning rate", "batch", "explosion", "blind"} <= seen


def test_the_measured_rules_beat_the_published_ones_from_bad_starts():
    """Learning rates ten times off and more; same worlds, starts, seeds and bounds, compared at equal samples.

    The published rules go back to untrained weights whenever 20 steps have not brought the gauges into the zone.
    """
    ahead, arrived, bad = 0, 0, 0
    for seed, (world, start, run, ideal) in enumerate(journeys()[:200]):
        if 0.1 < start.lr / world.best_lr(start.batch_size) < 10.0:
            continue
        published = Loop(Policy.paper(min_batch=4, max_batch=512), world, start, seed)
        other = published.run(run.cost)
        bad += 1
        ahead += run.training.progress > other.training.progress + 1.0
        arrived += published.run(6 * ideal, PROGRESS).reached
    assert bad > 80
    assert ahead >= 0.95 * bad, "an excess loss smaller by a factor e or more"
    assert arrived < 0.5 * bad
