"""Hooks and everything else that observes the gradient of logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import (
    MARKS,
    assert_agree,
    ce,
    compute_results,
    make_inputs,
    make_pair,
    make_params,
)
from torch import nn
from torch.autograd.graph import register_multi_grad_hook

pytestmark = MARKS


def record(o, g):
    o.recorded.append(g.clone())


def make_loss_after(observe, steps=lambda z: z):
    """Returns a loss that is computed after `observe` of the logits, or of `steps` of them."""

    def loss(z, o):
        v = steps(z)
        observe(v, o)
        return ce(v, o.y)

    return loss


def retain_grad(z, o):
    z.retain_grad()
    o.after = lambda: record(o, z.grad)


def hook_logits_after_view(z, o):
    """Computes the loss of a view that was made before the logits got a hook."""
    v = z[:, 1:]
    z.register_hook(lambda g: record(o, g))
    return ce(v, o.y[:, 1:])


def hook_logits_after_transpose(z, o):
    """Computes the loss of a transpose that was made before the logits got a hook."""
    v = z.mT
    z.register_hook(lambda g: record(o, g))
    return F.cross_entropy(v, o.y)


def hook_input_of_loss(z, o):
    v = z.mT
    v.register_hook(lambda g: record(o, g) or 2 * g)
    return F.cross_entropy(v, o.y)


def hook_logits_and_scaled_logits(z, o):
    z.register_hook(lambda g: 2 * g)
    v = z * 3
    v.register_hook(lambda g: record(o, g))
    return ce(v, o.y)


def hook_on_a_deep_node(z, o):
    (z * 2)[:, 1:].grad_fn.next_functions[0][0].register_hook(lambda gi, go: record(o, gi[0]))
    return ce((z * 2)[:, 1:], o.y[:, 1:])


def hook_node_below(z, o):
    v = (z * 2)[:, 1:]
    v.grad_fn.next_functions[0][0].register_hook(lambda gi, go: record(o, gi[0]))
    return ce(v, o.y[:, 1:])


OBSERVERS: dict[str, Any] = {
    "hook": make_loss_after(lambda z, o: z.register_hook(lambda g: record(o, g))),
    "hook that changes": make_loss_after(
        lambda z, o: z.register_hook(lambda g: record(o, g) or 5 * g)
    ),
    "hook on a view": make_loss_after(
        lambda z, o: z.register_hook(lambda g: record(o, g) or -g), lambda z: z.mT.mT
    ),
    "hook on the scaled": make_loss_after(
        lambda z, o: z.register_hook(lambda g: record(o, g)), lambda z: z / 3
    ),
    "hook on the capped": make_loss_after(
        lambda z, o: z.register_hook(lambda g: record(o, g)), torch.tanh
    ),
    "hooks on both": hook_logits_and_scaled_logits,
    "hook after a view": hook_logits_after_view,
    "hook after a transpose": hook_logits_after_transpose,
    "hook on the loss's own": hook_input_of_loss,
    "retain_grad": make_loss_after(retain_grad),
    "retain_grad of the scaled": make_loss_after(retain_grad, lambda z: z * 0.5),
    "node's hook": make_loss_after(
        lambda z, o: z.grad_fn.register_hook(lambda gi, go: record(o, go[0]))
    ),
    "node's prehook": make_loss_after(
        lambda z, o: z.grad_fn.register_prehook(lambda go: record(o, go[0]) or (go[0] * 2,))
    ),
    "view's node's prehook": make_loss_after(
        lambda z, o: z.grad_fn.register_prehook(lambda go: record(o, go[0]) or (go[0] * 2,)),
        lambda z: z[:, :],
    ),
    "node below's hook": hook_node_below,
    "multi-grad hook": make_loss_after(
        lambda z, o: register_multi_grad_hook((z,), lambda gs: record(o, gs[0]))
    ),
    "multi-grad hook, any": make_loss_after(
        lambda z, o: register_multi_grad_hook((z, o.x), lambda g: record(o, g), mode="any")
    ),
    "gradient of logits": lambda z, o: (
        record(o, torch.autograd.grad(z.exp().sum(), z, retain_graph=True)[0]) or z.exp().mean()
    ),
    "edge of logits": lambda z, o: (
        lambda edge, l: record(o, torch.autograd.grad(l, edge, retain_graph=True)[0]) or l
    )(torch.autograd.graph.get_gradient_edge(z), ce(z, o.y)),
}


@pytest.mark.parametrize("name", make_params(OBSERVERS))
def test_observers_of_deferred_logits_get_plain_gradients(name):
    plain, swapped, log = make_pair()
    results = []
    for model in (swapped, plain):
        o = make_inputs()
        o.recorded, o.after = [], lambda: None
        results.append(compute_results(model, OBSERVERS[name], o, backward=True))
        o.after()
        assert o.recorded
        results[-1] += o.recorded
    assert_agree(*results)
    assert not log.fused
    assert log.materialized


HOOKS: dict[str, Any] = {
    "full backward hook": lambda m, s: m.lm_head.register_full_backward_hook(
        lambda mod, gi, go: s.extend([*gi, *go]) or (gi[0] * 2,)
    ),
    "full backward pre-hook": lambda m, s: m.lm_head.register_full_backward_pre_hook(
        lambda mod, go: s.extend(go) or (go[0] * 2,)
    ),
    "full backward hook of the model": lambda m, s: m.register_full_backward_hook(
        lambda mod, gi, go: s.extend([*gi, *go]) or (gi[0] * 2,)
    ),
    "full backward pre-hook of the model": lambda m, s: m.register_full_backward_pre_hook(
        lambda mod, go: s.extend(go) or (go[0] * 2,)
    ),
    "forward hook": lambda m, s: m.lm_head.register_forward_hook(
        lambda mod, args, z: s.extend([*args, z + 0]) or z * 2
    ),
    "forward hook that only looks": lambda m, s: m.lm_head.register_forward_hook(
        lambda mod, args, z: s.append(z.sum())
    ),
    "forward hook of the model": lambda m, s: m.register_forward_hook(
        lambda mod, args, z: s.append(z.exp()) or z * 2
    ),
    "forward pre-hook": lambda m, s: m.lm_head.register_forward_pre_hook(
        lambda mod, args: s.extend(args) or (args[0] * 2,)
    ),
    "forward hook for all": lambda m, s: nn.modules.module.register_module_forward_hook(
        lambda mod, args, z: s.append(z + 0) if mod is m.lm_head else None
    ),
    "full backward hook for all": lambda m, s: nn.modules.module.register_module_full_backward_hook(
        lambda mod, gi, go: s.extend([*gi, *go]) if mod is m.lm_head else None
    ),
}


@pytest.mark.parametrize("name", make_params(HOOKS))
def test_module_hooks_get_plain_values(name):
    plain, swapped, log = make_pair()
    results = []
    for model in (swapped, plain):
        recorded: list[Any] = []
        handle = HOOKS[name](model, recorded)
        results.append(
            compute_results(model, lambda z, o: F.cross_entropy(z.mT, o.y), backward=True)
        )
        handle.remove()
        assert recorded
        results[-1] += recorded
    assert_agree(*results)
    assert bool(log.fused) == (name == "forward pre-hook")
    assert bool(log.materialized) == (name != "forward pre-hook")


def test_observer_after_a_fused_loss_raises():
    _, swapped, _ = make_pair()
    o = make_inputs()
    late = {
        "register_hook": lambda z, l: z.register_hook(lambda g: g),
        "retain_grad": lambda z, l: z.retain_grad(),
        "the gradient of the logits": lambda z, l: torch.autograd.grad(l, z),
        "the gradient of the  logits": lambda z, l: torch.autograd.grad(
            inputs=[o.x, z], outputs=[l]
        ),
    }
    for name, observe in late.items():
        z = swapped(o.x)
        loss = ce(z, o.y)
        with pytest.raises(RuntimeError) as raised:
            observe(z, loss)
        message = str(raised.value)
        assert name.replace("  ", " ") in message
        assert "head 'lm_head'" in message
        assert "before the loss, or swap(model, head=None)" in message


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
def test_grad_of_logits_after_a_fused_loss_warns(backward):
    plain, swapped, _ = make_pair()
    o = make_inputs()
    z = swapped(o.x)
    backward(ce(z, o.y), inputs=[z])
    with pytest.warns(UserWarning, match=r"call logits.retain_grad\(\) before the loss"):
        assert z.grad is None
    results = []
    for model in (swapped, plain):
        z = model(o.x)
        z.retain_grad()
        backward(ce(z, o.y), inputs=[z])
        results.append([z.grad])
    assert_agree(*results)


@pytest.mark.parametrize("name", ["hook", "retain_grad"])
def test_observer_after_a_loss_without_gradient_gets_plain_gradients(name):
    plain, swapped, _ = make_pair()
    results = []

    def loss(z, o):
        with torch.no_grad():
            ce(z, o.y)
        return OBSERVERS[name](z, o)

    for model in (swapped, plain):
        o = make_inputs()
        o.recorded, o.after = [], lambda: None
        results.append(compute_results(model, loss, o, backward=True))
        o.after()
        results[-1] += o.recorded
    assert_agree(*results)
