"""What programs do to an optimizer: a table. Each row gets a way to make one, and hands back what a program can see.

A row is a function of `make`, which is torch.optim.AdamW or ours, loose or flat. It returns (optimizer, parameters), or
with a third member anything else that is to be the same. An exception that it raises is to be of the same class.
"""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler, swa_utils

PROGRAMS = {}


def program(function):
    PROGRAMS[function.__name__] = function
    return function


class Net(nn.Module):
    """Convolution, norm, two experts and a head, of which no batch meets both experts."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, expert=0):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.experts[expert](x)) * self.scale


def data(t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float32)
    y = torch.randint(0, 3, (6,), generator=generator)
    return x.to(dtype), y


def backward(net, t, expert=0):
    x, y = data(t, net.head.weight.dtype)
    loss = F.cross_entropy(net(x, expert), y)
    loss.backward()
    return loss


def train(net, optimizer, steps, expert=lambda t: 0, start=0):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        backward(net, t, expert(t))
        optimizer.step()


def started(make, steps=3, **options):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2, **options)
    train(net, optimizer, steps)
    return net, optimizer


# --- parameters and groups change -----------------------------------------------------------------------------------


@program
def a_parameter_is_replaced_and_its_state_moved(make):
    net, optimizer = started(make)
    old = net.head.weight
    new = nn.Parameter(old.detach() * 1.5)
    group = optimizer.param_groups[0]
    i = next(i for i, p in enumerate(group["params"]) if p is old)
    state = optimizer.state.pop(old)
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(new), torch.zeros_like(new)
    group["params"][i], optimizer.state[new], net.head.weight = new, state, new
    train(net, optimizer, 3, start=3)
    return optimizer, [*net.parameters(), old]


@program
def a_layer_grows_with_its_state(make):
    net, optimizer = started(make)
    group = optimizer.param_groups[0]
    old = net.experts[0].weight
    new = nn.Parameter(torch.cat([old.detach(), 0.01 * torch.ones(2, 8)]))
    state = optimizer.state.pop(old)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.cat([state[name], torch.zeros(2, 8)])
    group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state[new] = state
    for t in range(3):
        new.grad = torch.full_like(new, 0.1 * t)
        optimizer.step()
    return optimizer, [new, old]


@program
def a_parameter_is_cut_in_place_with_its_state(make):
    net, optimizer = started(make)
    p = net.experts[0].weight
    p.grad, p.data = None, p.data[:5]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name][:5]
    for t in range(3):
        p.grad = torch.full_like(p, 0.1 + t)
        optimizer.step()
    return optimizer, [p]


@program
def columns_are_cut_which_leaves_gaps(make):
    net, optimizer = started(make)
    p = net.experts[0].weight
    p.grad, p.data = None, p.data[:, 2:5]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name][:, 2:5].clone()
    for t in range(3):
        p.grad = torch.full((8, 3), 0.1 + t)
        optimizer.step()
    return optimizer, [p]


@program
def a_parameter_with_gaps_from_the_start(make):
    whole = torch.arange(24.0).reshape(4, 6)
    p = nn.Parameter(whole[:, ::2])
    optimizer = make([p], lr=0.1)
    for t in range(4):
        p.grad = torch.cos(torch.arange(12.0) + t).reshape(4, 3)
        optimizer.step()
    return optimizer, [p], whole


@program
def a_parameter_is_appended_to_a_group(make):
    net = Net()
    optimizer = make([net.conv.weight, net.conv.bias], lr=1e-2)
    train(net, optimizer, 3)
    optimizer.param_groups[0]["params"].append(net.head.weight)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_parameter_is_taken_from_a_group(make):
    net, optimizer = started(make)
    del optimizer.param_groups[0]["params"][2]
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_group_is_deleted(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "lr": 1e-1}], lr=1e-2)
    train(net, optimizer, 3)
    del optimizer.param_groups[1]
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def groups_are_replaced_by_copies_and_then_given_another_lr(make):
    net, optimizer = started(make)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 1e-1
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def groups_swap_their_parameters(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "lr": 1e-1}], lr=1e-2)
    train(net, optimizer, 3)
    a, b = optimizer.param_groups
    a["params"], b["params"] = b["params"], a["params"]
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_group_is_added_in_mid_run(make):
    net = Net()
    optimizer = make(net.conv.parameters(), lr=1e-2)
    train(net, optimizer, 3)
    optimizer.add_param_group({"params": net.head.parameters(), "lr": 1e-1, "betas": (0.5, 0.9), "weight_decay": 0.3})
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def options_of_a_group_change(make):
    net, optimizer = started(make)
    group = optimizer.param_groups[0]
    for changes in ({"lr": 1e-1}, {"betas": (0.5, 0.7)}, {"weight_decay": 0.5}, {"eps": 1e-2}, {"maximize": True}):
        group.update(changes)
        train(net, optimizer, 1, start=len(changes))
    return optimizer, list(net.parameters())


@program
def named_parameters_in_groups(make):
    net = Net()
    named = list(net.named_parameters())
    optimizer = make([{"params": named[:3]}, {"params": named[3:], "lr": 1e-1}], lr=1e-2)
    train(net, optimizer, 3)
    return optimizer, list(net.parameters())


@program
def a_parameter_given_twice(make):
    p = nn.Parameter(torch.ones(3))
    make([{"params": [p]}, {"params": [p]}])


@program
def no_parameters(make):
    make([])


@program
def a_tensor_where_a_list_is_due(make):
    make(torch.ones(3, requires_grad=True))


@program
def what_is_no_leaf(make):
    make([torch.ones(3, requires_grad=True) * 2])


# --- states change --------------------------------------------------------------------------------------------------


@program
def one_state_is_emptied(make):
    net, optimizer = started(make)
    optimizer.state[net.conv.weight] = {}
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def one_state_is_popped(make):
    net, optimizer = started(make)
    optimizer.state.pop(net.conv.weight)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def all_states_are_cleared(make):
    net, optimizer = started(make)
    optimizer.state.clear()
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def state_is_a_new_dict(make):
    net, optimizer = started(make)
    optimizer.state = collections.defaultdict(dict)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_moment_is_replaced(make):
    net, optimizer = started(make)
    moment = torch.full_like(net.conv.weight, 0.01)
    optimizer.state[net.conv.weight]["exp_avg"] = moment
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters()), [moment, optimizer.state[net.conv.weight]["exp_avg"] is moment]


@program
def a_moment_is_replaced_by_one_of_another_layout(make):
    net, optimizer = started(make)
    state = optimizer.state[net.head.weight]
    state["exp_avg_sq"] = state["exp_avg_sq"].t().contiguous().t()
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_moment_is_written_to(make):
    net, optimizer = started(make)
    for state in optimizer.state.values():
        state["exp_avg"].mul_(-1.0)
        state["exp_avg_sq"][...] = state["exp_avg_sq"] * 4.0
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_moment_is_given_other_memory(make):
    net, optimizer = started(make)
    for state in optimizer.state.values():
        state["exp_avg"].data = state["exp_avg"].data * 2.0
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def steps_are_set(make):
    net, optimizer = started(make)
    optimizer.state[net.conv.weight]["step"] = torch.tensor(500.0)
    optimizer.state[net.conv.bias]["step"] += 20
    optimizer.state[net.head.weight]["step"].fill_(7.0)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_state_has_something_of_the_users(make):
    net, optimizer = started(make)
    for state in optimizer.state.values():
        state["mine"] = torch.ones(2)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters()), sorted({name for s in optimizer.state.values() for name in s})


@program
def states_are_as_lazy_as_torchs(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    before = len(optimizer.state)
    train(net, optimizer, 2, expert=lambda t: 1)
    return optimizer, list(net.parameters()), [before, len(optimizer.state), net.experts[0].weight in optimizer.state]


# --- saved and loaded -----------------------------------------------------------------------------------------------


@program
def its_own_state_is_loaded_back(make):
    net, optimizer = started(make)
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 3, start=3)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 3, start=6)
    return optimizer, list(net.parameters())


@program
def a_state_dict_shares_memory_with_its_optimizer(make):
    net, optimizer = started(make)
    saved = optimizer.state_dict()
    train(net, optimizer, 2, start=3)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 2, start=5)
    return optimizer, list(net.parameters()), [saved["state"][0]["exp_avg"]]


@program
def a_new_process_goes_on(make):
    net, optimizer = started(make)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Net(seed=5)
    fresh = make(other.parameters(), lr=1.0)
    other.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["optimizer"])
    train(other, fresh, 3, start=3)
    return fresh, list(other.parameters()), list(net.parameters())


@program
def hooks_change_what_is_loaded(make):
    net, optimizer = started(make)
    saved = copy.deepcopy(optimizer.state_dict())

    def double(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"] *= 2.0
        return state_dict

    def negate(loading):
        for state in loading.state.values():
            state["exp_avg"] = -state["exp_avg"]

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(negate)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def hooks_change_what_is_saved(make):
    net, optimizer = started(make)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    return optimizer, list(net.parameters()), sorted(optimizer.state_dict())


@program
def a_state_of_other_groups_is_refused(make):
    net, optimizer = started(make)
    other = make([{"params": net.conv.parameters()}, {"params": net.head.parameters()}])
    other.load_state_dict(optimizer.state_dict())


@program
def optimizer_and_model_are_copied(make):
    net, optimizer = started(make)
    twin, other = copy.deepcopy((net, optimizer))
    train(twin, other, 3, start=3)
    train(net, optimizer, 1, start=3)
    return other, [*twin.parameters(), *net.parameters()]


@program
def optimizer_and_model_are_pickled(make):
    net, optimizer = started(make)
    twin, other = pickle.loads(pickle.dumps((net, optimizer)))
    train(twin, other, 3, start=3)
    return other, list(twin.parameters())


# --- gradients ------------------------------------------------------------------------------------------------------


@program
def experts_take_turns(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    train(net, optimizer, 8, expert=lambda t: t // 2 % 2)
    return optimizer, list(net.parameters())


@program
def experts_take_turns_under_clipping_by_torch(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(8):
        optimizer.zero_grad()
        backward(net, t, t % 2)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def gradients_are_none_after_zero_grad(make):
    net, optimizer = started(make)
    optimizer.zero_grad()
    nones = [p.grad is None for p in net.parameters()]
    backward(net, 3)
    optimizer.zero_grad(set_to_none=False)
    return optimizer, list(net.parameters()), [*nones, *(p.grad for p in net.parameters())]


@program
def gradients_are_kept_as_zeros(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(6):
        optimizer.zero_grad(set_to_none=False)
        backward(net, t, t % 2)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def both_ways_of_zero_grad_in_turn(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(8):
        optimizer.zero_grad(set_to_none=t % 3 == 0)
        backward(net, t, t % 2)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def the_models_zero_grad(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(6):
        net.zero_grad(set_to_none=t % 2 == 0)
        backward(net, t, t % 2)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def gradients_accumulate_and_are_never_zeroed(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(4):
        backward(net, t)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def a_parameter_is_frozen_and_thaws(make):
    net, optimizer = started(make)
    net.conv.requires_grad_(False)
    train(net, optimizer, 3, start=3)
    net.conv.requires_grad_(True)
    train(net, optimizer, 3, start=6)
    return optimizer, list(net.parameters())


@program
def a_frozen_parameter_keeps_its_gradient(make):
    net, optimizer = started(make)
    net.conv.requires_grad_(False)
    optimizer.step()
    optimizer.step()
    return optimizer, list(net.parameters())


@program
def a_gradient_is_given_other_memory(make):
    net, optimizer = started(make)
    for t in range(3, 6):
        optimizer.zero_grad(set_to_none=False)
        backward(net, t)
        for p in net.parameters():
            if p.grad is not None:
                p.grad.data = p.grad.data * 3.0
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def gradients_are_set_by_hand(make):
    p, q = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 3, 2))
    optimizer = make([p, q], lr=0.1)
    for t in range(5):
        p.grad = torch.arange(12.0).reshape(4, 3).t() - t
        q.grad = None if t == 2 else torch.arange(24.0).reshape(2, 3, 4).permute(2, 1, 0) + t
        optimizer.step()
    del q.grad
    optimizer.step()
    return optimizer, [p, q]


@program
def gradients_are_expanded(make):
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = make([p], lr=0.1)
    for t in range(3):
        p.grad = torch.full((1,), 0.5 + t).expand(3, 4)
        optimizer.step()
    return optimizer, [p]


@program
def gradients_are_not_finite(make):
    net, optimizer = started(make)
    backward(net, 3)
    net.head.weight.grad[0, 1] = float("nan")
    net.head.bias.grad[1] = float("inf")
    optimizer.step()
    train(net, optimizer, 1, start=4)
    return optimizer, list(net.parameters())


@program
def gradients_have_a_graph_of_their_own(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(3):
        optimizer.zero_grad()
        x, y = data(t)
        F.cross_entropy(net(x), y).backward(create_graph=True)
        optimizer.step()
        for p in net.parameters():
            p.grad = None
    return optimizer, list(net.parameters())


@program
def a_sparse_gradient_is_refused(make):
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = make(net.parameters())
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@program
def no_gradient_at_all(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    optimizer.step()
    return optimizer, list(net.parameters()), [len(optimizer.state)]


@program
def hooks_change_gradients_before_the_step(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)

    def halve(hooked, args, kwargs):
        for group in hooked.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = 0.5 * p.grad

    seen = []
    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda *_: seen.append(len(seen)))
    train(net, optimizer, 4)
    return optimizer, list(net.parameters()), seen


@program
def a_closure_that_is_called_again(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    losses = []

    def closure():
        optimizer.zero_grad()
        return backward(net, len(losses))

    for _ in range(4):
        losses.append(optimizer.step(closure).detach())
    return optimizer, list(net.parameters()), losses


@program
def an_optimizer_in_every_backward_hook(make):
    net = Net()
    optimizers = {p: make([p], lr=1e-2) for p in net.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    for t in range(4):
        backward(net, t, t % 2)
    return optimizers[net.conv.weight], list(net.parameters()), [p.grad is None for p in net.parameters()]


@program
def sam_climbs_and_comes_back(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(3):
        optimizer.zero_grad()
        backward(net, t)
        moved = [(p, p.detach().clone(), p.grad) for p in net.parameters() if p.grad is not None]
        for p, _, grad in moved:
            p.data.add_(grad, alpha=0.1)
        optimizer.zero_grad()
        backward(net, t)
        for p, before, _ in moved:
            p.data = before
        optimizer.step()
    return optimizer, list(net.parameters())


# --- the model moves ------------------------------------------------------------------------------------------------


@program
def the_model_goes_to_double_and_back(make):
    net, optimizer = started(make)
    net.double()
    net.float()
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def gradients_go_to_double_and_back_with_the_model(make):
    net, optimizer = started(make)
    optimizer.zero_grad(set_to_none=False)
    backward(net, 3)
    net.double()
    net.float()
    optimizer.step()
    return optimizer, list(net.parameters())


@program
def the_model_becomes_channels_last(make):
    net, optimizer = started(make)
    net.to(memory_format=torch.channels_last)
    train(net, optimizer, 3, start=3)
    net.to(memory_format=torch.contiguous_format)
    train(net, optimizer, 3, start=6)
    return optimizer, list(net.parameters())


@program
def parameters_are_given_other_memory(make):
    net, optimizer = started(make)
    for p in net.parameters():
        p.data = p.data.clone() * 0.9
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def parameters_become_parts_of_one_vector(make):
    net, optimizer = started(make)
    vector = nn.utils.parameters_to_vector(net.parameters()).detach() * 0.5
    nn.utils.vector_to_parameters(vector, net.parameters())
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters()), vector


@program
def parameters_are_swapped_on_conversion(make):
    net = nn.Linear(4, 3)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.arange(p.numel()).reshape(p.shape) + i)
    optimizer = make(net.parameters(), lr=1e-2)
    other = nn.Linear(4, 3)
    for t in range(4):
        if t == 2:
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                q.data = p.data * 2.0
                optimizer.zero_grad()
                torch.utils.swap_tensors(p, q)
        optimizer.zero_grad()
        net(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def weights_are_loaded_in_mid_run(make):
    net, optimizer = started(make)
    net.load_state_dict(Net(seed=3).state_dict())
    train(net, optimizer, 2, start=3)
    net.load_state_dict(Net(seed=4).state_dict(), assign=True)
    for p in net.parameters():
        p.requires_grad_()
    train(net, optimizer, 2, start=5)  # of tensors that the optimizer has never seen
    return optimizer, list(net.parameters())


@program
def the_model_is_shared_between_processes(make):
    net, optimizer = started(make)
    net.share_memory()
    train(net, optimizer, 2, start=3)
    return optimizer, list(net.parameters()), [p.is_shared() for p in net.parameters()]


@program
def a_layer_saves_itself_alone(make):
    net, optimizer = started(make)
    file = io.BytesIO()
    torch.save(net.head.state_dict(), file)
    return optimizer, list(net.parameters()), [file.tell()]


@program
def parameters_keep_memory_of_their_own(make):
    net, optimizer = started(make)
    own = [p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in net.parameters()]
    return optimizer, list(net.parameters()), own


@program
def a_lazy_layer(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = make(net.parameters(), lr=1e-2)
    torch.manual_seed(1)
    for t in range(4):
        optimizer.zero_grad()
        net(torch.full((2, 5), 0.1 * t)).square().sum().backward()
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def a_removed_parameter_is_freed(make):
    net, optimizer = started(make)
    old = net.head.weight
    optimizer.state.pop(old)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not old]
    gone = weakref.ref(old)
    net.head = nn.Linear(8, 3)
    del old
    train(net, optimizer, 2, start=3)
    gc.collect()
    return optimizer, group["params"], [gone() is None]


# --- dtypes ---------------------------------------------------------------------------------------------------------


def _under_default(dtype, make):
    before = torch.get_default_dtype()
    net = Net()
    try:
        torch.set_default_dtype(dtype)
        optimizer = make(net.parameters(), lr=1e-2)
        train(net, optimizer, 3)
    finally:
        torch.set_default_dtype(before)
    return optimizer, list(net.parameters())


@program
def the_default_dtype_is_double(make):
    return _under_default(torch.float64, make)


@program
def the_default_dtype_is_bfloat16(make):
    return _under_default(torch.bfloat16, make)


@program
def parameters_of_double_and_complex(make):
    p, q = nn.Parameter(torch.ones(5, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    r = nn.Parameter(torch.ones(4))
    optimizer = make([p, q, r], lr=1e-2)
    for t in range(4):
        optimizer.zero_grad()
        loss = (p * (t + 1)).square().sum() + (q * (1 + 2j)).abs().sum() + (r - t).square().sum()
        loss.backward()
        optimizer.step()
    return optimizer, [p, q, r]


@program
def empty_and_single_elements(make):
    params = [nn.Parameter(torch.ones(shape)) for shape in ((0, 7), (), (1,), (1, 1, 1))]
    optimizer = make(params, lr=1e-2)
    for t in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.1 + t)
        optimizer.step()
    return optimizer, params


# --- options, schedulers, scaling, averages -------------------------------------------------------------------------


@program
def amsgrad(make):
    net, optimizer = started(make, steps=6, amsgrad=True)
    return optimizer, list(net.parameters())


@program
def amsgrad_in_one_group(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "amsgrad": True}], lr=1e-2)
    train(net, optimizer, 5)
    return optimizer, list(net.parameters())


@program
def amsgrad_switched_on_too_late(make):
    net, optimizer = started(make)
    optimizer.param_groups[0]["amsgrad"] = True
    train(net, optimizer, 2, start=3)
    return optimizer, list(net.parameters())


@program
def amsgrad_switched_off(make):
    net, optimizer = started(make, amsgrad=True)
    optimizer.param_groups[0]["amsgrad"] = False
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def lr_is_a_tensor_that_changes_in_place(make):
    net = Net()
    lr = torch.tensor(1e-2)
    optimizer = make(net.parameters(), lr=lr)
    for t in range(4):
        lr.mul_(1.5)
        train(net, optimizer, 1, start=t)
    return optimizer, list(net.parameters())


@program
def betas_are_tensors(make):
    net, optimizer = started(make, betas=(torch.tensor(0.8), torch.tensor(0.95)))
    return optimizer, list(net.parameters())


@program
def lr_below_zero_in_a_group(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters(), "lr": -1e-2}, {"params": net.head.parameters()}], lr=1e-2)
    train(net, optimizer, 3)
    return optimizer, list(net.parameters())


def _scheduled(make, schedule):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "lr": 3e-2}], lr=1e-2)
    scheduler = schedule(optimizer)
    for t in range(8):
        train(net, optimizer, 1, start=t)
        scheduler.step(*((1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()))
    return optimizer, list(net.parameters())


SCHEDULES = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[1e-1, 2e-1], total_steps=12),
    "cosine_with_warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "warm_up_then_decay": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[3]
    ),
    "cyclic_momentum": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=2, cycle_momentum=True),
    "swa_lr": lambda o: swa_utils.SWALR(o, swa_lr=5e-2, anneal_epochs=4),
}
for _name, _schedule in SCHEDULES.items():
    PROGRAMS[f"scheduler_{_name}"] = lambda make, schedule=_schedule: _scheduled(make, schedule)


@program
def weights_are_averaged(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for t in range(5):
        train(net, optimizer, 1, start=t)
        averaged.update_parameters(net)
    return optimizer, [*net.parameters(), *averaged.module.parameters()]


def _scaled(make, unscale):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for t in range(8):
        optimizer.zero_grad()
        x, y = data(t)
        scaler.scale(F.cross_entropy(net(x, t % 2), y)).backward()
        if t in (2, 5):
            net.head.bias.grad[0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()  # ours and torch's fused one unscale inside the step, and leave p.grad as it was
    return optimizer, list(net.parameters()), [scaler.get_scale()]


@program
def gradients_are_scaled(make):
    return _scaled(make, unscale=False)


@program
def gradients_are_scaled_unscaled_and_clipped(make):
    return _scaled(make, unscale=True)


@program
def weights_are_tied(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    net[1].weight = net[0].weight
    optimizer = make(net.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.arange(7)).square().mean().backward()
        optimizer.step()
    return optimizer, list(net.parameters()), [net[1].weight is net[0].weight]


@program
def weights_are_tied_by_memory(make):
    base = torch.arange(6.0)
    p, q = nn.Parameter(base), nn.Parameter(base[3:])
    optimizer = make([p], lr=1e-2)
    p.grad = torch.ones(6)
    optimizer.step()
    return optimizer, [p, q]


@program
def a_subclass_is_an_adamw(make):
    optimizer = make([nn.Parameter(torch.ones(2))])
    return optimizer, [], [isinstance(optimizer, torch.optim.AdamW), isinstance(optimizer, torch.optim.Optimizer)]
