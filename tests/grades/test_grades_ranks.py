"""GradES on two ranks: DDP and FSDP2 over gloo, against one process with the batches of both."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from grgauge import AdamW, GradES

RANKS, STEPS, WIDTH = 2, 24, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu_(self.up(input=x)))


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(WIDTH, 1)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def batch(t, ranks):
    """The rows of step t that the ranks are to see; noise falls in the course, so that gradients do."""
    x = torch.randn(4 * RANKS, 5, WIDTH, generator=torch.Generator().manual_seed(t))
    rows = torch.cat([x[4 * rank : 4 * rank + 4] for rank in ranks])
    return rows, rows.sum(-1, keepdim=True)


def train(model, optimizer, ranks, start, stop):
    for t in range(start, stop + 1):
        optimizer.zero_grad()
        x, y = batch(t, ranks)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def plain(net):
    return net


def ddp(**options):
    return lambda net: DistributedDataParallel(net, **options)


def fsdp(net):
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def ours(params):
    return AdamW(params, lr=1e-2, weight_decay=0.1)


# What is wrapped how, and whether with activation checkpointing.
RUNS = {
    "DDP": (ddp(), adamw, False),
    "DDP, checkpointing, our AdamW": (ddp(), ours, True),
    "DDP, static graph, gradients as views": (ddp(static_graph=True, gradient_as_bucket_view=True), adamw, False),
    "FSDP2": (fsdp, adamw, False),
    "FSDP2, checkpointing, our AdamW": (fsdp, ours, True),
}
OPTIONS = {"tau": 0.8, "total_steps": STEPS, "alpha": 0.5, "patience": 1, "every": 2, "warmup": 0, "thaw": 1.05}
COUNTED = 13  # matrices are frozen, and not looked at in the next step
CUT = 15  # between the two steps of a reading that looks at frozen matrices as well
BY_SIGNAL = {"metric": "signal", "epsilon": 0.2, "total_steps": 60, "patience": 1, "every": 2, "warmup": 4}
CUT_BY_SIGNAL = 45  # some matrices are frozen, and others later


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()


def values_of(model):
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: full(p).detach().clone() for name, p in model.named_parameters()}


def backward_flops(model, ranks):
    x, y = batch(0, ranks)
    loss = nn.functional.mse_loss(model(x), y)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def run(wrap, make, checkpointed, ranks, options=OPTIONS, cut=CUT):
    """A whole run; and one that is cut, and continued by other objects."""
    torch.manual_seed(0)
    model = wrap(Net(checkpointed))
    optimizer = make(model.parameters())
    grades = GradES(model, optimizer, **options)
    flops = backward_flops(model, ranks)
    trace = []
    for t in range(1, options["total_steps"] + 1):
        train(model, optimizer, ranks, t, t)
        trace.append((dict(grades.frozen), values_of(model)))
        if t == COUNTED:
            fewer_flops = backward_flops(model, ranks)
        if t == cut:
            parameters = values_of(model)
            saved = copy.deepcopy((optimizer.state_dict(), grades.state_dict()))
    torch.manual_seed(0)
    net = Net(checkpointed)
    net.load_state_dict(parameters)
    resumed = wrap(net)
    optimizer = make(resumed.parameters())
    after = GradES(resumed, optimizer, **options)
    optimizer.load_state_dict(saved[0])
    after.load_state_dict(saved[1])
    train(resumed, optimizer, ranks, cut + 1, options["total_steps"])
    return {
        "matrices": grades.matrices,
        "history": [(r.step, r.values, r.froze, r.thawed) for r in grades.history],
        "resumed": [(r.step, r.values, r.froze, r.thawed) for r in after.history],
        "trace": trace,
        "end": values_of(resumed),
        "flops": (flops, fewer_flops),
    }


def work(rank, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    results = {name: run(*how, [rank]) for name, how in RUNS.items()}
    results |= {f"signal, {name}": run(*how, [rank], BY_SIGNAL, CUT_BY_SIGNAL) for name, how in RUNS.items()}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    by_delta = run(plain, adamw, False, range(RANKS))
    by_signal = run(plain, adamw, False, range(RANKS), BY_SIGNAL, CUT_BY_SIGNAL)
    return dict.fromkeys(RUNS, by_delta) | dict.fromkeys((f"signal, {name}" for name in RUNS), by_signal)


EVERY_RUN = pytest.mark.parametrize("name", [*RUNS, *(f"signal, {name}" for name in RUNS)])


def text(history):
    return [(step, tuple(map(str, values)), froze, thawed) for step, values, froze, thawed in history]


@EVERY_RUN
def test_ranks_decide_alike_in_the_same_step(ranks, name):
    one, other = (results[name] for results in ranks)
    assert text(one["history"]) == text(other["history"])
    for (frozen, values), (other_frozen, other_values) in zip(one["trace"], other["trace"], strict=True):
        assert frozen == other_frozen
        assert all(torch.equal(p, other_values[key]) for key, p in values.items())
    assert any(froze for *_, froze, _ in one["history"])
    assert any(thawed for *_, thawed in one["history"]) or name.startswith("signal")  # which freezes for good


@EVERY_RUN
def test_ranks_decide_as_one_process_does_with_the_batches_of_all(ranks, alone, name):
    result, alone = ranks[0][name], alone[name]
    assert result["matrices"] == alone["matrices"]
    for (step, values, froze, thawed), expected in zip(result["history"], alone["history"], strict=True):
        assert (step, froze, thawed) == (expected[0], *expected[2:])
        assert values == pytest.approx(expected[1], rel=1e-3, nan_ok=True)
    for key, p in result["trace"][-1][1].items():
        if "in_proj_bias" not in key:  # a key's bias has no gradient but rounding errors, which AdamW makes much of
            torch.testing.assert_close(p, alone["trace"][-1][1][key], rtol=1e-3, atol=1e-4)


@EVERY_RUN
def test_a_frozen_matrix_does_not_move_by_a_bit(ranks, name):
    trace = ranks[0][name]["trace"]
    compared = 0
    for (before, old), (after, new) in itertools.pairwise(trace):
        for matrix in after:
            key = matrix if matrix in new else f"{matrix}.weight"
            if before.get(matrix) == after[matrix]:
                compared += 1
                assert torch.equal(old[key], new[key]), matrix
    assert compared > 10


@pytest.mark.parametrize("name", RUNS)
def test_the_product_for_a_frozen_weights_gradient_is_saved(ranks, name):
    """All of it but that of an attention's output projection under DDP, which its module never calls."""
    before, after = ranks[0][name]["flops"]
    frozen, values = ranks[0][name]["trace"][COUNTED - 1]
    keys = [m if m in values else f"{m}.weight" for m in frozen if not (name.startswith("DDP") and "out_proj" in m)]
    rows = batch(0, [0])[0][..., 0].numel()
    assert keys
    assert before - after == sum(2 * rows * values[key].numel() for key in keys)


@EVERY_RUN
def test_a_resumed_run_continues_exactly(ranks, name):
    for results in ranks:
        assert text(results[name]["resumed"]) == text(results[name]["history"])
        assert all(torch.equal(p, results[name]["trace"][-1][1][key]) for key, p in results[name]["end"].items())
