"""What advice rests on: the fit, and the numbers that come with the package."""

from __future__ import annotations

import numpy as np
import pytest
from judge import calibrate
from judge.table import load

from grgauge.policy.calibration import LEVELS, calibration


def test_isotonic_regression_pools_what_is_out_of_order():
    values, weights = np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.0, 1.0, 3.0, 1.0])
    assert calibrate.isotonic(values, weights, True).tolist() == [1.0, 2.25, 2.25, 4.0]
    assert calibrate.isotonic(-values, weights, False).tolist() == [-1.0, -2.25, -2.25, -4.0]


def test_quantiles_of_equal_weights_are_numpys():
    values = np.random.default_rng(0).normal(size=101)
    found = calibrate.weighted_quantiles(values, np.ones(101), LEVELS)
    assert found == pytest.approx(np.quantile(values, LEVELS, method="hazen"))


@pytest.mark.parametrize("what", ["lr", "batch"])
def test_the_package_holds_quantiles_in_order_that_are_monotone_inside(what):
    spans = getattr(calibration(), what)
    assert set(spans) == {"early", "window", "late"}
    for curve in (curve for curves in spans.values() for curve in curves):
        rows = np.array(curve.quantiles)
        assert (np.diff(rows, axis=1) >= -1e-9).all()
        inner = np.diff(rows[:, 1:-1], axis=0)
        assert (inner <= 1e-9).all() if what == "lr" else (inner >= -1e-9).all()


def test_directions_on_families_that_were_not_fitted():
    """At steps 50 to 400, where the best learning rate is three times away or more; "cannot tell" counts half."""
    shares = {name: own["right"] for name, own in calibration().provenance["held_out"]["lr"].items()}
    assert len(shares) >= 4
    assert np.mean(list(shares.values())) >= 0.9
    assert min(shares.values()) >= 0.8


def test_the_packages_advice_on_the_recorded_table():
    """The table's own families, as a check of the numbers against the recorded readings: they were fitted on them."""
    for name, rows in load().items():
        seen = calibrate.pd.DataFrame(calibrate.judged({name: rows}, calibration(), (50, 400)))
        lr = seen[seen["what"] == "lr"]
        assert calibrate.right(lr) >= 0.85
        assert lr[lr["given"]]["held"].mean() >= 0.85
