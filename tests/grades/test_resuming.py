"""GradES: a resumed run continues exactly."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from blocks import OPTIMIZERS, grades_of, history_of, network, train


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
