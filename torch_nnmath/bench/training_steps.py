"""Training steps of small networks as contenders: PyTorch's modules, ours and swapped ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_nnmath import swap
from torch_nnmath.bench.work import Contender, Problem, Results

ChangeClasses = Callable[[torch.nn.Module, torch.nn.Module], object]


def make_training_step(
    make_layers: Callable[..., Sequence[torch.nn.Module]],
    change_classes: ChangeClasses,
    problem: Problem,
) -> Callable[[], Results]:
    """Returns a step of SGD of a network.

    The step returns the loss and the gradients. `make_layers` gets the values of the parameters,
    `change_classes` the network and its loss.
    """
    x, y = problem.constants
    network = torch.nn.Sequential(*make_layers(*problem.leaves)).to(x)
    if x.dim() == 4:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), problem.leaves, strict=True):
            parameter.copy_(value)
    compute_loss = torch.nn.CrossEntropyLoss()
    change_classes(network, compute_loss)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> Results:
        loss = compute_loss(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in network.parameters()]
        return loss.detach(), *[g for g in gradients if g is not None]

    return step


def make_hidden_layer(W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> list[torch.nn.Module]:
    return [torch.nn.Linear(*W1.T.shape), torch.nn.ReLU(), torch.nn.Linear(*W2.T.shape)]


def make_convolutions(
    W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, W3: Tensor, b3: Tensor
) -> list[torch.nn.Module]:
    layers: list[torch.nn.Module] = []
    for W in (W1, W2):
        layers += [torch.nn.Conv2d(W.shape[1], len(W), 3, padding=1), torch.nn.ReLU()]
    pool = torch.nn.AdaptiveAvgPool2d(1)
    return [*layers, pool, torch.nn.Flatten(), torch.nn.Linear(*W3.T.shape)]


def make_step_contenders(
    make_layers: Callable[..., Sequence[torch.nn.Module]],
) -> dict[str, Contender]:
    changes: dict[str, ChangeClasses] = {
        "ours": lambda model, loss: (swap(model, head=None), swap(loss)),
        "eager": lambda model, loss: None,
        "modules": lambda model, loss: swap(model, head=None),
        "swapped": lambda model, loss: swap(model),
    }
    return {
        name: Contender(functools.partial(make_training_step, make_layers, change))  # type: ignore[arg-type]
        for name, change in changes.items()
    }
