"""What advice rests on: the fit, and the numbers that come with the package."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from judge import calibrate
from judge.table import load

from grgauge.policy.calibration import calibration


def test_isotonic_regression_pools_what_is_out_of_order():
    values, weights = np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.0, 1.0, 3.0, 1.0])
    assert calibrate.isotonic(values, weights, True).tolist() == [1.0, 2.25, 2.25, 4.0]
    assert calibrate.isotonic(-values, weights, False).tolist() == [-1.0, -2.25, -2.25, -4.0]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_deviation_of_a_family_not_seen_has_no_bias_however_few_are_seen(count):
    drawn = np.random.default_rng(0).normal(scale=0.4, size=(20_000, count))
    found = np.mean([calibrate.between(means) for means in drawn])
    assert found == pytest.approx(0.4 * math.sqrt(1.0 + 1.0 / count), rel=0.02)


def families(rng, count, what):
    """Readings of families that differ by 0.4 decades, or by 0.15 in GR_S, with known standard errors."""
    rows = []
    for i in range(count):
        shift = rng.normal(scale=0.4 if what == "lr" else 0.15)
        for away in rng.uniform(-2.5, 2.5, 150):
            error = rng.uniform(0.05, 0.3)
            if what == "lr":
                value = 1.8 / (1.0 + math.exp(3.0 * (away + shift))) + rng.normal(scale=error)
            else:
                value = 0.5 + 0.3 * math.tanh(away) + shift + rng.normal(scale=error)
            summary = SimpleNamespace(signal=value, signal_error=error, gr_s=value, gr_s_error=error)
            rows.append({"family": f"family {i}", "summary": summary, what: away})
    return rows


@pytest.mark.parametrize("what", ["lr", "batch"])
def test_intervals_hold_on_families_that_were_not_fitted(what):
    rng, held = np.random.default_rng(0), []
    curve = calibrate.curve(families(rng, 12, what), what)
    for row in families(rng, 40, what)[::5]:
        found = curve.read(*calibrate.gauge(row, what))
        held.append(found.low <= row[what] <= found.high)
    assert 0.85 <= np.mean(held) <= 0.95


@pytest.mark.parametrize("what", ["lr", "batch"])
def test_the_package_holds_curves_that_are_monotone(what):
    spans = getattr(calibration(), what)
    assert set(spans) == {"early", "window", "late"}
    for curve in spans.values():
        steps = np.diff(curve.gauge)
        assert (steps <= 0.0).all() if what == "lr" else (steps >= 0.0).all()


def test_the_package_holds_what_the_command_makes_and_its_intervals_hold_on_families_left_out():
    """The command's very text; at steps 50 to 400, where the best learning rate is three times away or more."""
    known = calibrate.made_of(load())
    assert calibrate.lines(calibrate.plain(known)) == calibrate.PATH.read_text(encoding="utf-8")
    parts = [own["lr"] for own in known.provenance["held_out"].values()]
    assert len(parts) == 5
    for part in parts:
        assert part["held"] >= 0.85
        assert part["wrong"] <= 0.04
        assert part["right"] >= 0.9
    assert np.mean([part["right"] for part in parts]) >= 0.95


def test_the_page_says_how_well_it_holds():
    page = (Path(__file__).parents[2] / "docs" / "reading-the-plane.md").read_text(encoding="utf-8")
    for name, parts in calibration().provenance["held_out"].items():
        shares = [parts["lr"][share] for share in ("spoken", "wrong", "unknown", "held")]
        shares += [parts[f"step {step}"]["spoken"] for step in calibrate.AT]
        assert f"| {name} | {' | '.join(f'{100.0 * share:.0f} %' for share in shares)} |" in page


def test_a_rate_a_hundred_times_too_low_is_never_called_a_little_too_low():
    """On the recorded table, from the first advice on."""
    said = 0
    for name, rows in load().items():
        for case in calibrate.judged({name: rows}, calibration()):
            if case["what"] == "lr" and case["away"] >= 2.0:
                assert re.fullmatch(r"LR: cannot tell|raise LR ≥ [\d.]+×, look again", case["words"])
                said += case["words"] != "LR: cannot tell"
    assert said > 100
