"""What gauges read in every way to train, against float64; of ranks that torchrun has started."""

import pytest
import setups
from setups import GROWTH, RUNS, SETUPS, STEPS


@pytest.fixture(scope="module")
def rows(two, four):
    ranks = {1: [setups.readings_of(1)], 2: two["table"], 4: four["table"]}
    return {
        (row.configuration, row.precision, row.optimizer): row
        for world in (1, 2, 4)
        for row in setups.rows_of(ranks[world])
    }


@pytest.mark.parametrize(("precision", "optimizer"), RUNS)
@pytest.mark.parametrize("configuration", SETUPS)
def test_a_row_of_the_table(rows, configuration, precision, optimizer):
    row = rows[configuration, precision, optimizer]
    assert row.gr_t == pytest.approx(row.gr_t_truth, rel=row.tolerance)
    assert row.gr_s == pytest.approx(row.gr_s_truth, rel=row.tolerance)
    assert abs(row.gr_s - row.gr_s_per_sample) < 2 * row.gr_s_standard_error < row.gr_s
    assert row.ranks_alike
    assert row.passed
    if precision == "fp16":  # has grown after 8 and 16 steps, was halved for the one that was skipped, and grew again
        assert row.scale == 2.0 ** (10 + 2 - 1 + (STEPS - setups.OVERFLOW - 1) // GROWTH)


def test_the_table_has_every_row(rows):
    assert len(rows) == len(SETUPS) * len(RUNS) == 32
    truths = {setups.truth(n, frozenset()) for n in (2, 4)}
    assert len({truth.gr_t for truth in truths}) == 1  # whatever the groups are, the mean gradient is the same
    assert len({truth.gr_s for truth in truths}) == 2


def test_a_wrong_reading_fails_its_row(rows):
    from dataclasses import replace

    row = rows["DDP 2", "fp32", "grgauge.AdamW"]
    assert row.passed
    assert not replace(row, gr_t=row.gr_t * 1.0001).passed
    assert not replace(row, gr_s=row.gr_s * 1.0001).passed
    assert not replace(row, ranks_alike=False).passed
    assert not replace(row, gr_s_per_sample=row.gr_s + 3 * row.gr_s_standard_error).passed
