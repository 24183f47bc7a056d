"""What the page says of rows whose meaning is known."""

import math

import numpy as np
import pandas as pd
import pytest
from judge.findings import ablations, against, costs_table, of_costs, reuse
from judge.summaries import curvature, lemma1, lemma2, noise_scale, within

from grgauge import theory


def tuners(other):
    return {"GR-Gauge": {"images": [1.0, 1.1, 1.2, 1.3, 1.4]}, "other": {"images": other}}


def test_who_never_arrives_has_no_ratio():
    verdict, cell = against("other", tuners([math.inf] * 5))
    assert verdict == "no ratio"
    assert cell == "no ratio: other met it in 0 of 5 on images"


def test_half_of_the_starts_missing_is_no_ratio_either():
    assert against("other", tuners([1.0, 1.0, math.inf, math.inf]))[0] == "no ratio"
    ours = {**tuners([1.0] * 5), "GR-Gauge": {"images": [math.inf] * 3 + [1.0] * 2}}
    assert against("other", ours) == ("no ratio", "no ratio: GR-Gauge met it in 2 of 5 on images")


def test_a_difference_that_the_interval_carries_is_said():
    verdict, cell = against("other", tuners([3.0] * 5))
    assert verdict == "cheaper"
    assert cell.startswith("0.40 (0.33 to 0.47): cheaper")
    assert against("other", tuners([3.0] * 4))[0] == "undecided"
    assert "4 starts" in against("other", tuners([3.0] * 4))[1]
    assert "cheaper" not in against("other", tuners([3.0] * 5), judged=False)[1]


def test_what_was_run_on_no_common_family_is_not_compared():
    assert against("other", {"GR-Gauge": {"images": [1.0]}, "other": {"language": [9.0]}}) == ("", "–")


def rows(**costs):
    return pd.DataFrame(
        [
            {
                "family": "images",
                "weights": "raw",
                "target": "best",
                "tuner": tuner.replace("_", "-"),
                "reached": value < math.inf,
                "samples": value * 10_000,
                "unit_samples": 10_000,
            }
            for tuner, values in costs.items()
            for value in values
        ]
    )


def test_the_table_counts_who_met_the_target_and_who_did_so_soon():
    lines = costs_table(rows(GR_Gauge=[1, 1, 2, 2, 3], other=[2, 5, 6, 30, math.inf]), "raw", "best")
    assert any("| other | 6.00 | 4 of 5 | 1 |" in line for line in lines)
    assert lines[-2] == "1 of 5 families: too few to name a winner."


def test_sentences_name_no_tuner_as_dearer_that_has_no_ratio():
    holds, not_so = of_costs(rows(GR_Gauge=[1, 1, 1, 1, 1], never=[math.inf] * 5, slow=[3, 3, 3, 3, 3]), "raw")
    assert holds.startswith("On images GR-Gauge needs fewer samples than slow; within 4 static runs")
    assert holds.endswith("GR-Gauge 5 of 5, slow 5 of 5, never 0 of 5.")
    assert not_so == "On images GR-Gauge has no ratio to never."


def test_lemmas_are_recovered_from_what_they_predict():
    plane = pd.DataFrame([(lr, batch) for lr in np.geomspace(1e-4, 1e-1, 7) for batch in (64, 128, 512)])
    plane.columns = ["lr", "batch"]
    plane["noise_scale"] = 60.0
    plane["gr_t"] = [theory.expected_gr_t(3.0 * lr, 60.0 / batch) for lr, batch in plane[["lr", "batch"]].to_numpy()]
    plane["gr_s"] = [theory.expected_gr_s(float(batch), 60.0) for batch in plane["batch"]]
    assert curvature(plane) == pytest.approx(3.0, rel=0.1)
    assert within(lemma1(plane, curvature(plane)), plane["gr_t"]) == (21, 21)
    assert within(lemma2(plane["batch"], noise_scale(plane)), plane["gr_s"]) == (21, 21)
    assert within(lemma2(plane["batch"], 600.0), plane["gr_s"])[0] < 21
    assert lemma1(plane.assign(noise_scale=1000.0), 3.0).isna().all()


def test_ablations_are_compared_on_the_starts_that_both_were_run_from():
    every = rows(**{"GR_Gauge, blind starts": [1, 2, math.inf], "GR_Gauge, no_R": [3, math.inf, math.inf]})
    every["start"] = ["blind 0", "blind 1", "blind 2", "blind 0", "blind 1", "blind 7"]
    lines = ablations(every)
    row = next(line for line in lines if "without state reuse:" in line)
    assert row.endswith("| best | 2 | 1.50 (2) | inf (1) |")
    assert ablations(every.head(3)) == ["Not measured yet.", ""]


def test_pairs_of_reuse_are_reported_with_their_number():
    pairs = pd.DataFrame({"family": "images", "reused": [0.9, 0.91], "from_scratch": [0.92, 0.93]})
    assert any("| 2 | 0.905 | 0.925 | -0.020 (-0.020 to -0.020): too few pairs |" in line for line in reuse(pairs))
