"""Loss modules in a training step, and their state dicts beside PyTorch's."""

import copy

import pytest
import torch
from entry_points import C, D, make_class_weight

from torch_nnmath import nn

needs_pytorch_head = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"),
    reason="nn.LinearCrossEntropyLoss came with PyTorch 2.13",
)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("has_head", [True, False])
def test_step_on_ignored_labels_moves_no_parameter(has_head, reduction):
    torch.manual_seed(17)
    model = torch.nn.Sequential(nn.Linear(D, 5), nn.Tanh())
    if has_head:
        criterion = nn.LinearCrossEntropyLoss(5, C, bias=True, reduction=reduction)
    else:
        model.append(nn.Linear(5, C))
        criterion = nn.CrossEntropyLoss(reduction=reduction)
    parameters = [*model.parameters(), *criterion.parameters()]
    before = [p.detach().clone() for p in parameters]
    criterion(model(torch.randn(6, D)), torch.full((6,), -100)).backward()
    torch.optim.SGD(parameters, lr=1.0, weight_decay=0.0).step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("weight", [None, make_class_weight(torch.float32)])
@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        pytest.param("CrossEntropyLoss", (), {}, id="CrossEntropyLoss"),
        *(
            pytest.param(
                "LinearCrossEntropyLoss",
                (D, C),
                {"bias": bias},
                id=f"LinearCrossEntropyLoss-bias-{bias}",
                marks=needs_pytorch_head,
            )
            for bias in (False, True)
        ),
    ],
)
def test_state_dicts_load_strictly_both_ways(name, args, options, weight):
    ours, theirs = (getattr(m, name)(*args, weight=weight, **options) for m in (nn, torch.nn))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    changed = {key: value + 1 for key, value in theirs.state_dict().items()}
    assert not any(ours.load_state_dict(copy.deepcopy(changed), strict=True))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, changed[key])
    assert not any(theirs.load_state_dict(ours.state_dict(), strict=True))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, changed[key])


def test_checkpoint_without_class_weights_is_refused_as_by_pytorch():
    weight = make_class_weight(torch.float32)
    for module in (nn, torch.nn):
        with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
            module.CrossEntropyLoss(weight=weight).load_state_dict({})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
            module.CrossEntropyLoss().load_state_dict({"weight": weight})
