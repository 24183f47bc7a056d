"""The model moves: other memory, dtypes and layouts."""

from __future__ import annotations

import gc
import io
import weakref

import torch
from parity.training import Net, backward, program, started, train
from torch import nn


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
