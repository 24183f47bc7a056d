"""Rules in any order, after each of which ours has to be where torch's AdamW is; and its gauge where a float64 twin is.

Both train the same parameters with the same gradients. A rule does something to both of them: a step, an edit of
groups or states, another place in memory, a save and a load.
"""

from __future__ import annotations

import collections
import copy
import io
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from grgauge import AdamW, Gauge

SHAPES = [(4, 3, 2, 2), (5,), (), (3, 4), (6, 2), (0, 3)]
STEPS = 30
"""Rules of one example."""
OPTIONS = [("lr", 5e-2), ("lr", 0.0), ("eps", 1e-4), ("maximize", True), ("weight_decay", 0.5)]
BETA = 0.9

counted = collections.Counter()


def values(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Side:
    """Parameters and the optimizer that trains them."""

    def __init__(self, make):
        self.make = make
        self.params = [nn.Parameter(values(i, shape)) for i, shape in enumerate(SHAPES)]
        self.optimizer = make([{"params": self.params[:3]}, {"params": self.params[3:], "lr": 3e-2}], lr=1e-2)

    def trained(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class Machine(RuleBasedStateMachine):
    """What both optimizers are put through."""

    @initialize(flat=st.booleans())
    def begin(self, flat):
        self.sides = [Side(torch.optim.AdamW), Side(lambda params, **options: AdamW(params, flat=flat, **options))]
        self.seed = 1000

    def on_both(self, change):
        counted["rules"] += 1
        for side in self.sides:
            change(side)

    def next_seed(self):
        self.seed += 1
        return self.seed

    @property
    def count(self):
        return len(self.sides[0].trained())

    # --- steps and gradients

    @rule(present=st.lists(st.booleans(), min_size=16, max_size=16), scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0]))
    def backward_and_step(self, present, scale):
        seed = self.next_seed()

        def change(side):
            for i, p in enumerate(side.trained()):
                if present[i % 16] and p.requires_grad:
                    grad = values(seed + 31 * i, p.shape) * scale
                    if p.grad is None:
                        p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)
                    else:
                        p.grad.add_(grad)
            side.optimizer.step()

        self.on_both(change)
        self.stepped()

    def stepped(self):
        """For the machine that has a gauge."""

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.on_both(lambda side: side.optimizer.zero_grad(set_to_none=set_to_none))

    @rule(pick=st.integers(0, 15), how=st.sampled_from(["none", "data", "transposed"]))
    def gradients_by_hand(self, pick, how):
        seed = self.next_seed()

        def change(side):
            p = side.trained()[pick % self.count]
            if how == "none":
                p.grad = None
            elif how == "data" and p.grad is not None:
                p.grad.data = p.grad.data.clone() * 2.0
            elif how == "transposed":
                p.grad = values(seed, p.shape[::-1]).permute(list(reversed(range(p.ndim))))

        self.on_both(change)

    @rule(pick=st.integers(0, 15))
    def freeze_or_thaw(self, pick):
        def change(side):
            p = side.trained()[pick % self.count]
            p.requires_grad_(not p.requires_grad)

        self.on_both(change)

    # --- where parameters are

    @rule(pick=st.integers(0, 15), how=st.sampled_from(["clone", "double", "channels_last", "scaled", "strided"]))
    def move(self, pick, how):
        def change(side):
            p = side.trained()[pick % self.count]
            if how == "clone":
                p.data = p.data.clone()
            elif how == "double":
                p.data = p.data.double()
                p.data = p.data.float()
            elif how == "scaled":
                with torch.no_grad():
                    p.mul_(0.5)
            elif how == "strided" and p.ndim == 2:
                p.data = p.data.t().contiguous().t()
            elif how == "channels_last" and p.ndim == 4:
                p.data = p.data.to(memory_format=torch.channels_last)

        self.on_both(change)

    @rule()
    def gather_in_one_vector(self):
        def change(side):
            vector = torch.cat([p.detach().reshape(-1) for p in side.trained()])
            nn.utils.vector_to_parameters(vector, side.trained())

        self.on_both(change)

    # --- groups

    @rule(
        pick=st.integers(0, 15), option=st.sampled_from([("lr", 5e-2), ("lr", 0.0), ("eps", 1e-4), ("maximize", True)])
    )
    def set_option(self, pick, option):
        def change(side):
            groups = side.optimizer.param_groups
            groups[pick % len(groups)][option[0]] = option[1]

        self.on_both(change)

    @rule()
    def copy_groups(self):
        def change(side):
            side.optimizer.param_groups = [dict(group) for group in side.optimizer.param_groups]
            for group in side.optimizer.param_groups:
                group["lr"] = group["lr"] * 0.9

        self.on_both(change)

    @precondition(lambda self: self.count < 10)
    @rule(how=st.sampled_from(["append", "group"]))
    def add_parameter(self, how):
        seed = self.next_seed()

        def change(side):
            p = nn.Parameter(values(seed, (3, 3)))
            side.params.append(p)
            if how == "append":
                side.optimizer.param_groups[0]["params"].append(p)
            else:
                side.optimizer.add_param_group({"params": [p], "weight_decay": 0.2})

        self.on_both(change)

    @precondition(lambda self: self.count > 3)
    @rule(pick=st.integers(0, 15), with_state=st.booleans())
    def remove_parameter(self, pick, with_state):
        def change(side):
            groups = [group for group in side.optimizer.param_groups if len(group["params"]) > 1]
            if groups:
                params = groups[pick % len(groups)]["params"]
                p = params.pop(pick % len(params))
                if with_state:
                    side.optimizer.state.pop(p, None)

        self.on_both(change)

    @rule()
    def rotate_groups(self):
        def change(side):
            groups = side.optimizer.param_groups
            params = [group["params"] for group in groups]
            for group, own in zip(groups, params[1:] + params[:1], strict=True):
                group["params"] = own

        self.on_both(change)

    @rule(pick=st.integers(0, 15))
    def reverse_a_group(self, pick):
        def change(side):
            groups = side.optimizer.param_groups
            groups[pick % len(groups)]["params"].reverse()

        self.on_both(change)


class Editing(Machine):
    """States are edited, saved and loaded as well."""

    @rule(pick=st.integers(0, 15), how=st.sampled_from(["pop", "empty", "replace", "scale", "data", "layout", "step"]))
    def edit_state(self, pick, how):
        seed = self.next_seed()

        def change(side):
            p = side.trained()[pick % self.count]
            state = side.optimizer.state
            if not state.get(p):
                return
            if how == "pop":
                state.pop(p)
            elif how == "empty":
                state[p] = {}
            elif how == "replace":
                state[p]["exp_avg"] = torch.empty_like(p, requires_grad=False).copy_(values(seed, p.shape))
            elif how == "scale":
                state[p]["exp_avg_sq"].mul_(3.0)
            elif how == "data":
                state[p]["exp_avg"].data = state[p]["exp_avg"].data.clone()
            elif how == "layout" and p.ndim == 2:
                state[p]["exp_avg_sq"] = state[p]["exp_avg_sq"].t().contiguous().t()
            elif how == "step":
                state[p]["step"] = torch.tensor(float(seed % 7), dtype=torch.float32)

        self.on_both(change)

    @rule(how=st.sampled_from(["clear", "new"]))
    def drop_all_states(self, how):
        def change(side):
            if how == "clear":
                side.optimizer.state.clear()
            else:
                side.optimizer.state = collections.defaultdict(dict)

        self.on_both(change)

    @precondition(lambda self: self.orphans == 0)
    @rule(how=st.sampled_from(["itself", "deepcopied", "file", "fresh"]))
    def save_and_load(self, how):
        def change(side):
            saved = side.optimizer.state_dict()
            if how == "deepcopied":
                saved = copy.deepcopy(saved)
            elif how in ("file", "fresh"):
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file)
            if how == "fresh":
                groups = [{"params": list(group["params"])} for group in side.optimizer.param_groups]
                side.optimizer = side.make(groups, lr=7.0)
            side.optimizer.load_state_dict(saved)

        self.on_both(change)

    @property
    def orphans(self):
        """States of parameters that no group has: torch's state_dict() then raises."""
        side = self.sides[0]
        return len(set(side.optimizer.state) - set(side.trained()))

    @invariant()
    def both_are_alike(self):
        theirs, ours = self.sides
        for p, q in zip(ours.params, theirs.params, strict=True):
            close(p.detach(), q.detach())
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                close(p.grad, q.grad)
            own, other = (side.optimizer.state.get(r) for side, r in ((ours, p), (theirs, q)))
            assert (own is None) == (other is None)
            assert (own or {}).keys() == (other or {}).keys()
            for name, value in (other or {}).items():
                close(own[name].float(), value.float())


class Twin:
    """GR_T of the same gradients in float64, from its definition: V and m of each parameter that trains, summed.

    A parameter without a gradient keeps both. Where other parameters train than before, V begins anew; m is the
    optimizer's, and stays.
    """

    def __init__(self):
        self.m, self.ages, self.v, self.steps = {}, {}, {}, {}
        self.layout = None

    def step(self, optimizer, layout):
        norm = []
        trained = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.layout != layout and any(p.numel() for _, p in trained):  # a step without gradients trains nothing
            self.layout, self.v, self.steps = layout, {}, {}
        for group, p in trained:
            g = p.grad.double().flatten() * (-1.0 if group["maximize"] else 1.0)  # as the optimizer's moment has it
            square = float(g.square().sum())
            norm += [square] if p.numel() else []
            self.v[p] = BETA * self.v.get(p, 0.0) + (1 - BETA) * square
            self.m[p] = BETA * self.m.get(p, 0.0) + (1 - BETA) * g
            self.steps[p], self.ages[p] = self.steps.get(p, 0) + 1, self.ages.get(p, 0) + 1
        self.norm = math.sqrt(sum(norm)) if norm else math.nan
        v = sum(v / (1 - BETA ** self.steps[p]) for p, v in self.v.items())
        m = sum(float((self.m[p] / (1 - BETA ** self.ages[p])).square().sum()) for p in self.v)
        self.gr_t = v / m if m > 0.0 else None


class Gauged(Machine):
    """A gauge on ours reads what a float64 twin reads of the same gradients."""

    @initialize(flat=st.booleans())
    def begin(self, flat):
        super().begin(flat)
        self.gauge = Gauge(self.sides[1].optimizer, 8, every=1)
        self.twin, self.seen = Twin(), []
        self.sides[1].optimizer.observe(self.seen.append)

    def stepped(self):
        optimizer = self.sides[1].optimizer
        # Which parameters train is the optimizer's to say: the frozen ones that it has no state of do not.
        self.twin.step(optimizer, [id(p) for bucket in self.seen.pop() for p in bucket.params])
        reading = self.gauge.reading()
        assert reading.grad_norm == pytest.approx(self.twin.norm, rel=1e-5, abs=1e-12, nan_ok=True)
        counted["readings"] += 1
        if reading.gr_t is not None:
            counted["GR_T"] += 1
            assert reading.gr_t == pytest.approx(self.twin.gr_t, rel=1e-4)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6, equal_nan=True, check_stride=False)


@pytest.mark.parametrize("machine", [Editing, Gauged])
def test_whatever_is_done_ours_is_where_torchs_is(machine, request):
    counted.clear()
    examples = -(-request.config.getoption("rules") // (2 * STEPS))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{machine.__name__}: {dict(counted)}")
    assert counted["rules"] >= examples
    if machine is Gauged and examples >= 100:  # in fewer, chance decides how many readings there are
        assert counted["GR_T"] >= examples // 4
