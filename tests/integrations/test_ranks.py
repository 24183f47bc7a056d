"""The callbacks under DDP, on two processes: ranks are the groups, as in a plain loop over both ranks' batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines.plain import assert_reads, plain_loop
from engines.test_lightning import MICRO, NORM, OPTIMIZERS, network
from integrations.test_transformers import NORM as TRAINERS_NORM
from integrations.test_transformers import llama
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torchrun import torchrun

from grgauge import AdamW, Reading

SCRIPT = Path(__file__).parent / "trainers.py"


def trained(folder, *runs):
    """Run -> what both ranks say of it."""
    torchrun(2, SCRIPT, str(folder), *runs)
    return {run: [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(2)] for run in runs}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trainers"), "transformers", "grades")


def readings(done):
    return [Reading.from_dict(values) for values in done["readings"]]


def test_transformers_with_accumulation_clipping_and_padding(trainers):
    ranks = trainers["transformers"]
    assert ranks[0]["readings"] == ranks[1]["readings"]
    assert ranks[0]["batch_size"] == 8
    assert len(ranks[0]["lines"]) == 2
    assert ranks[1]["lines"] == []  # rank 0 prints
    assert ranks[0]["state"] == 10
    model = llama()

    def group(inputs, total):
        rows, labels = (torch.tensor([row for micro in inputs for row in micro[k]]) for k in ("input_ids", "labels"))
        n = int((labels[:, 1:] != -100).sum())

        def loss():
            logits = model(input_ids=rows).logits[:, :-1]
            return nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])

        return loss, 8 * n / total, n / total

    steps = []
    for t in range(0, 2 * 20, 2):
        step = [rank["seen"][t : t + 2] for rank in ranks]
        total = sum(label != -100 for own in step for micro in own for row in micro["labels"] for label in row[1:])
        steps.append([group(own, total) for own in step])
    truths = plain_loop(
        model, AdamW(model.parameters(), lr=1e-3), steps, 8, lambda params: clip_grad_norm_(params, TRAINERS_NORM)
    )
    assert_reads(readings(ranks[0]), truths, raw=True, rel=1e-3)


def test_grades_freezes_alike_on_both_ranks_and_ends_the_run(trainers):
    ranks = trainers["grades"]
    assert ranks[0]["frozen"] == ranks[1]["frozen"] != {}
    assert ranks[0]["steps"] == ranks[1]["steps"] < 61


def test_lightning_with_clipping(tmp_path):
    ranks = trained(tmp_path, "lightning")["lightning"]
    assert ranks[0]["readings"] == ranks[1]["readings"]
    assert ranks[0]["batch_size"] == 2 * MICRO
    assert len(ranks[0]["lines"]) == 2
    assert ranks[1]["lines"] == []
    net = network()

    def group(rows, labels):
        x, y = torch.tensor(rows), torch.tensor(labels)
        return lambda: nn.functional.cross_entropy(net(x), y), MICRO, 0.5

    steps = [[group(*rank["seen"][t]) for rank in ranks] for t in range(20)]
    truths = plain_loop(
        net, OPTIMIZERS["SGD"](net.parameters()), steps, 2 * MICRO, lambda params: clip_grad_norm_(params, NORM)
    )
    assert [reading.step for reading in readings(ranks[0])] == [5, 10, 15, 20]
    for reading, truth in zip(readings(ranks[0]), truths, strict=True):
        assert reading.gr_t == pytest.approx(truth.raw_gr_t, rel=1e-4)
        assert reading.grad_norm == pytest.approx(truth.raw_grad_norm, rel=1e-4)
        assert reading.gr_s == pytest.approx(truth.gr_s, rel=1e-4)
    assert ranks[0]["logged"] == pytest.approx(readings(ranks[0])[-1].gr_s)
