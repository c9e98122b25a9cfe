"""Gradients disabled for some tensors: which tensors get one, and its value, agree with PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import MARKS, C, assert_agree, ce, make_inputs, make_pair, make_params

pytestmark = MARKS


def compute_logits_without_gradient(model, o):
    with torch.no_grad():
        return model(o.x)


def compute_loss_without_gradient(model, o):
    z = model(o.x)
    with torch.no_grad():
        return ce(z, o.y)


def compute_loss_of_view_without_gradient(model, o):
    z = model(o.x)
    with torch.no_grad():
        v = z.view(-1, C)
    return ce(v, o.y)


def compute_gradient_of_leaf(model, o):
    z = compute_logits_without_gradient(model, o).requires_grad_()
    ce(z, o.y).backward()
    return z.grad


def compute_loss_in_inference_mode(model, o):
    with torch.inference_mode():
        z = model(o.x)
        return ce(z, o.y), z.exp()


def compute_part_of_loss_in_inference_mode(model, o):
    z = model(o.x)
    with torch.inference_mode():
        v = z[:, 1:]
        out = [ce(v, o.y[:, 1:]).clone(), v.sum().clone()]
    return [ce(z, o.y), z.exp().mean(), *(x.clone() for x in out)]


def compute_frozen_logits(model, o):
    model.requires_grad_(False)
    return model(o.x.detach())


def compute_loss_of_frozen_head(model, o):
    model.lm_head.requires_grad_(False)
    return ce(model(o.x), o.y)


def compute_loss_of_trainable_bias(model, o):
    model.requires_grad_(False)
    model.lm_head.bias.requires_grad_()
    return ce(model(o.x.detach()), o.y)


def pass_gradient_by_hand(model, o):
    z = model(o.x)
    d = z.detach().requires_grad_()
    ce(d, o.y).backward()
    z.backward(d.grad)
    return model.lm_head.weight.grad, o.x.grad


def run_backward_twice(model, o):
    loss = ce(model(o.x), o.y)
    loss.backward(retain_graph=True)
    loss.backward()
    return model.lm_head.weight.grad, o.x.grad


def save_for_backward_by(hooks):
    def f(model, o):
        with hooks():
            z = model(o.x)
            return ce(3 * torch.tanh(z / 3), o.y) + z.tanh().log_softmax(-1).exp().mean()

    return f


class Labels(torch.Tensor):
    pass


def compute_loss_under_default_device(model, o):
    with torch.device("cpu"):
        return ce(3 * torch.tanh(model(o.x) / 3), o.y)


CASES: dict[str, Any] = {
    "head without gradient": lambda m, o: ce(compute_logits_without_gradient(m, o), o.y),
    "head without, scale with": lambda m, o: ce(compute_logits_without_gradient(m, o) * o.s, o.y),
    "head without, row with": lambda m, o: ce(compute_logits_without_gradient(m, o) + o.row, o.y),
    "head without, cap of scaled": lambda m, o: ce(
        torch.tanh(compute_logits_without_gradient(m, o) / o.s), o.y
    ),
    "loss without gradient": compute_loss_without_gradient,
    "view without gradient": compute_loss_of_view_without_gradient,
    "made a leaf": compute_gradient_of_leaf,
    "inference mode": compute_loss_in_inference_mode,
    "loss in inference mode": compute_part_of_loss_in_inference_mode,
    "frozen": lambda m, o: ce(compute_frozen_logits(m, o), o.y),
    "frozen, scale with": lambda m, o: ce(compute_frozen_logits(m, o) * o.s, o.y),
    "frozen, row with": lambda m, o: ce((compute_frozen_logits(m, o) + o.row).mT.mT, o.y),
    "frozen, view, scale with": lambda m, o: ce(compute_frozen_logits(m, o)[:, :] * o.s, o.y),
    "frozen, learnt targets": lambda m, o: F.cross_entropy(
        compute_frozen_logits(m, o).mT, o.probs.mT
    ),
    "frozen, made a leaf": lambda m, o: ce(compute_frozen_logits(m, o).requires_grad_(), o.y),
    "detached in place": lambda m, o: ce((2 * m(o.x)).detach_(), o.y),
    "frozen head": compute_loss_of_frozen_head,
    "only the bias": compute_loss_of_trainable_bias,
    "chunked by hand": pass_gradient_by_hand,
    "twice": run_backward_twice,
    "logits as targets": lambda m, o: F.cross_entropy(m(o.x).mT, m(2 * o.x).mT),
    "two calls": lambda m, o: ce(m(o.x), o.y) + ce(m(o.x.flip(1)), o.y.flip(1)),
    "two calls, one sum": lambda m, o: ce(m(o.x) + m(2 * o.x), o.y),
    "saved on the CPU": save_for_backward_by(torch.autograd.graph.save_on_cpu),
    "saved as copies": save_for_backward_by(
        lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x)
    ),
    "in a device's context": compute_loss_under_default_device,
    "targets of another class": lambda m, o: ce(m(o.x), o.y.as_subclass(Labels)).as_subclass(
        torch.Tensor
    ),
    "tied": lambda m, o: ce(m(F.embedding(o.all_y, m.lm_head.weight)), o.y),
}


@pytest.mark.parametrize("name", make_params(CASES))
def test_gradients_agree_and_exist_where_they_do_in_pytorch(name):
    plain, swapped, _ = make_pair()
    results = []
    for model in (swapped, plain):
        o = make_inputs()
        out = CASES[name](model, o)
        out = [*out] if isinstance(out, list | tuple) else [out]
        if out[0].requires_grad:
            out[0].backward()
        leaves = [*model.parameters(), *(getattr(o, leaf) for leaf in o.learnt)]
        results.append([*out, *(leaf.grad for leaf in leaves)])
        assert [x.requires_grad for x in out] == [x.requires_grad for x in results[0][: len(out)]]
    assert_agree(*results)


def test_setting_data_raises_and_copy_works():
    _, swapped, _ = make_pair()
    o = make_inputs()
    z = swapped(o.x)
    with pytest.raises(RuntimeError, match=r"no memory .* use copy_\(\)"):
        z.data = o.probs.detach()
    with torch.no_grad():
        z.copy_(o.probs)
    assert_agree([z + 0], [o.probs])
