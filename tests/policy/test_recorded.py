"""The measured rules on recorded trainings: where the first move goes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from policy.healthy import READING

from grgauge import Config, Continue, Policy
from grgauge.policy import Probe, advise

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
"""First 80 steps of real trainings with `grgauge.AdamW` at constant configurations: a character transformer, a CNN on
shifted patterns, regression onto a random network, and classification of noisy labels; `best_lr` has the lowest final
loss of the sweep at that batch, `untrained` is the loss before the first step."""


def readings(run, count=16):
    names = ("gr_t", "gr_t_error", "finite_time_factor", "gr_s", "gr_s_error", "noise_scale", "grad_norm")
    return [
        replace(
            READING,
            step=5 * i + 5,
            batch_size=run["batch"],
            noise_scale_error=None,
            **{name: run[name][i] for name in names},
        )
        for i in range(count)
    ]


def replay(run, **settings):
    """The first decision other than Continue about a recorded training."""
    policy, config = Policy(**settings), Config(run["lr"], run["batch"])
    policy.observe(None, config, loss=run["untrained"])
    for reading, loss in zip(readings(run), run["loss"], strict=True):
        decision = policy.observe(reading, config, loss=loss)
        if isinstance(decision, Probe):  # nobody has recorded its other side: undecided
            decision = policy.judge(((1.0, 1.0), (1.0, 1.0)))
        if not isinstance(decision, Continue):
            return decision
    return decision


MOVES = {
    "char-32": "+++00--",
    "char-128": "++++0--",
    "img-32": "+++000-",
    "img-128": "++++0--",
    "reg-32": "+++00--",
    "reg-128": "++++0--",
    "noisy-32": "+++000-",
    "noisy-128": "++++00-",
}
"""Where the first move of each recorded sweep goes, from its lowest learning rate to its highest."""


def change(decision, run):
    """What the learning rate is multiplied by."""
    return 1.0 if isinstance(decision, Continue) else decision.config.lr / run["lr"]


@pytest.mark.parametrize("sweep", MOVES)
def test_a_real_training_is_moved_up_by_steps_and_down_from_scratch(sweep):
    """At a batch that is held: up with its weights by a factor of 1.6 to 4, or within 45 steps to a sixth or less."""
    runs = sorted((run for run in RECORDED if f"{run['task']}-{run['batch']}" == sweep), key=lambda run: run["lr"])
    for run, move in zip(runs, MOVES[sweep], strict=True):
        decision = replay(run, min_batch=run["batch"], max_batch=run["batch"])
        factor = change(decision, run)
        assert move == ("+" if factor > 1.0 else "-" if factor < 1.0 else "0"), (run["lr"], decision)
        if move == "+":
            assert decision.reuse
            assert 1.6 < factor < 4.001
        if move == "-":
            assert not decision.reuse
            assert factor < 0.17
            assert decision.evidence.step <= 45


def test_real_trainings_are_moved_towards_the_best_learning_rate():
    """Those that are three times off or more: 39 of 48, and none of those thirty times too high is kept."""
    right = []
    for run in RECORDED:
        away = run["lr"] / run["best_lr"]
        factor = change(replay(run, min_batch=run["batch"], max_batch=run["batch"]), run)
        if away < 0.4 or away > 2.5:
            right.append((factor - 1.0) * (1.0 - away) > 0.0)
        if away > 29.0:
            assert factor < 0.17
    assert (sum(right), len(right)) == (39, 48)


@pytest.mark.parametrize("run", [run for run in RECORDED if run["task"] == "char" and run["batch"] == 128])
def test_a_real_batch_far_too_large_is_left_after_five_steps(run):
    decision = replay(run)
    assert decision.config.batch_size <= 32
    assert decision.evidence.step == 5


def test_advice_on_models_that_it_was_not_fitted_on():
    """At step 60, where the best rate is three times away or more: one direction of forty is wrong, and in four cases
    of five there is one. Nine intervals of ten hold."""
    said, held = [], []
    for run in RECORDED:
        advice, away = advise(readings(run, 12)).lr, run["best_lr"] / run["lr"]
        held.append(advice.interval[0] <= away <= advice.interval[1])
        if max(away, 1.0 / away) >= 2.99:
            said.append((advice.direction, away > 1.0))
    right = [say for say in said if say in (("raise", True), ("lower", False))]
    wrong = [say for say in said if say in (("raise", False), ("lower", True))]
    assert (len(right), len(wrong), len(said)) == (39, 1, 48)
    assert sum(held) / len(held) == pytest.approx(0.929, abs=0.001)
