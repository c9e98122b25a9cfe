"""Deferred logits under checkpoints, `torch.func`, forward mode, tracers and compilers."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import (
    F64,
    MARKS,
    B,
    C,
    D,
    Model,
    T,
    assert_agree,
    assert_fused,
    ce,
    compute_results,
    make_inputs,
    make_pair,
    make_params,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from torch_nnmath import swap

pytestmark = MARKS


# Checkpoints


CHECKPOINTS: dict[str, Any] = {
    "head": lambda m, o, c: ce(c(m, o.x), o.y),
    "loss": lambda m, o, c: c(ce, m(o.x), o.y),
    "scaled loss": lambda m, o, c: c(lambda z: ce(3 * torch.tanh(z / 3), o.y), m(o.x)),
    "both": lambda m, o, c: c(lambda x: ce(m(x), o.y), o.x),
    "both in turn": lambda m, o, c: c(ce, c(m, o.x), o.y),
    "body": lambda m, o, c: ce(m.lm_head(c(m.body, o.x)), o.y),
    "a view of the logits": lambda m, o, c: ce(c(lambda x: m(x)[:, 1:], o.x), o.y[:, 1:]),
    "logits and loss": lambda m, o, c: (lambda z, l: l + z.exp().mean())(
        *c(lambda x: (lambda z: (z, ce(z, o.y)))(m(x)), o.x)
    ),
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", make_params(CHECKPOINTS))
def test_checkpoints_agree(name, use_reentrant):
    def make_case(model):
        def call(f, *args):
            return checkpoint(f, *args, use_reentrant=use_reentrant)

        def no_logits(x):
            return None

        no_logits.parameters = model.parameters
        return no_logits, lambda _, o: CHECKPOINTS[name](model, o, call)

    plain, swapped, log = make_pair()
    assert_agree(*(compute_results(*make_case(model), backward=True) for model in (swapped, plain)))
    if not use_reentrant and name != "logits and loss":
        assert_fused(log)


# Transforms and tracers


def detach_parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def call_functional(model, parameters, o):
    return ce(torch.func.functional_call(model, parameters, (o.x,)), o.y)


def double_parameters(model):
    return {name: 2 * p for name, p in model.named_parameters()}


def second_order(loss):
    """A Hessian-vector product in the head's weight, and through the features."""

    def f(model, o):
        leaves = [model.lm_head.weight, model.body.weight, o.x]
        first = torch.autograd.grad(loss(model(o.x), o), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    return f


def per_example(model, o):
    def loss(parameters, x, y):
        return ce(torch.func.functional_call(model, parameters, (x,)), y)

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        detach_parameters(model), o.x.detach(), o.all_y
    )


def unpack(x):
    return [v.detach() for v in forward_ad.unpack_dual(x)]


def forward_mode(model, o):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(o.x.detach(), torch.ones_like(o.x))
        return unpack(ce(model(x), o.y))


def forward_mode_of_scale(model, o):
    z = model(o.x)
    with forward_ad.dual_level():
        s = forward_ad.make_dual(o.s.detach(), torch.ones_like(o.s))
        return unpack(ce(z * s, o.y))


def forward_mode_of_logits(model, o):
    z = model(o.x)
    with forward_ad.dual_level():
        tangent = o.probs.detach()
        return unpack(ce(forward_ad.make_dual(z, tangent), o.y))


def hessian_of_logits(model, o):
    return torch.func.hessian(lambda z: F.cross_entropy(z, o.y[1, 0]))(model(o.x)[1, 0])


def trace_and_call_with_other_logits(trace):
    """Traces a loss on deferred logits, and calls it with other ones."""

    def f(model, o):
        g = trace(lambda z: ce(z, o.y), model(o.x))
        others = (3 * o.probs.detach()).requires_grad_()
        return g(others), torch.autograd.grad(g(others), others)[0]

    return f


def jit_trace(f, x):
    return torch.jit.trace(f, (x,), check_trace=False)


TRANSFORMS: dict[str, Any] = {
    "grad of parameters": lambda m, o: torch.func.grad(lambda p: call_functional(m, p, o))(
        detach_parameters(m)
    ),
    "functional_call": lambda m, o: call_functional(
        m, {n: 2 * p for n, p in m.named_parameters()}, o
    ),
    "grad of features": lambda m, o: torch.func.grad(lambda x: ce(m(x), o.y))(o.x),
    "vmap": lambda m, o: torch.func.vmap(lambda x: F.cross_entropy(m(x), o.all_y[0]))(o.x),
    "per-example gradients": per_example,
    "jvp": lambda m, o: torch.func.jvp(lambda x: ce(m(x), o.y), (o.x,), (torch.ones_like(o.x),)),
    "jacrev": lambda m, o: torch.func.jacrev(lambda x: ce(m(x), o.y, reduction="none"))(o.x),
    "jacfwd": lambda m, o: torch.func.jacfwd(lambda x: ce(m(x), o.y))(o.x),
    "forward mode": forward_mode,
    "forward mode of a scale": forward_mode_of_scale,
    "forward mode of logits": forward_mode_of_logits,
    "second order": second_order(lambda z, o: ce(z, o.y)),
    "second order, capped": second_order(lambda z, o: ce(4 * torch.tanh(z * o.s / 4), o.y)),
    "second order, gather": second_order(
        lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).square().mean()
    ),
    "second order, plain": second_order(lambda z, o: (z / 9).exp().mean()),
    "second order, both": second_order(lambda z, o: ce(z, o.y) + z.square().mean()),
    "second order, in place": second_order(lambda z, o: ce(z.mul_(0.3), o.y)),
    "vmap over scales": lambda m, o: (
        lambda z: torch.func.vmap(lambda s: ce(z * s, o.y))(torch.tensor([0.5, 2.0], dtype=F64))
    )(m(o.x)),
    "vmap over targets": lambda m, o: (
        lambda z: torch.func.vmap(lambda y: ce(z, y))(torch.stack([o.all_y, o.all_y.flip(0)]))
    )(m(o.x)),
    "vmap over logits": lambda m, o: torch.func.vmap(F.cross_entropy)(m(o.x), o.all_y),
    "grad of a scale": lambda m, o: (
        lambda z: torch.func.grad(lambda s: ce(z * s, o.y))(o.s.detach())
    )(m(o.x)),
    "jvp of a scale": lambda m, o: (
        lambda z: torch.func.jvp(lambda s: ce(z * s, o.y), (o.s,), (torch.ones_like(o.s),))
    )(m(o.x)),
    "grad of logits": lambda m, o: torch.func.grad(lambda z: ce(z, o.y))(m(o.x)),
    "vjp of logits": lambda m, o: (lambda value, pull: (value, *pull(torch.ones_like(value))))(
        *torch.func.vjp(lambda z: ce(z, o.y), m(o.x))
    ),
    "jvp of logits": lambda m, o: torch.func.jvp(
        lambda z: ce(z, o.y), (m(o.x),), (o.probs.detach(),)
    ),
    "Hessian of logits": hessian_of_logits,
    "trace of the model": lambda m, o: ce(jit_trace(m, o.x)(o.x), o.y),
    "make_fx of the model": lambda m, o: ce(make_fx(m)(o.x.detach())(o.x.detach()), o.y),
    "make_fx of both": lambda m, o: make_fx(lambda x: ce(m(x), o.y))(o.x.detach())(o.x.detach()),
    "trace of the loss": trace_and_call_with_other_logits(jit_trace),
    "make_fx of the loss": trace_and_call_with_other_logits(lambda f, x: make_fx(f)(x)),
    "export": lambda m, o: ce(torch.export.export(m, (o.x,)).module()(o.x), o.y),
    "symbolic trace": lambda m, o: ce(torch.fx.symbolic_trace(m)(o.x), o.y),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", make_params(TRANSFORMS))
def test_transforms_agree(name):
    plain, swapped, _ = make_pair()
    results = []
    for model in (swapped, plain):
        o = make_inputs()
        out = tree_leaves(TRANSFORMS[name](model, o))
        leaves = [*model.parameters(), o.x]
        total = sum(x.sum() for x in out)
        if total.requires_grad:
            out += torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([None if x is None else x.detach() for x in out])
    assert_agree(*results)


class BreaksAroundHead(nn.Module):
    """A model and its loss with graph breaks around the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        h = self.model.body(x).tanh()
        torch._dynamo.graph_break()
        z = self.model.lm_head(h)
        torch._dynamo.graph_break()
        return ce(z, y)


def with_break(model, o):
    def f(x):
        z = model(x)
        torch._dynamo.graph_break()
        return ce(z, o.y)

    return compile_eager(f)(o.x)


def with_disabled_head(model, o):
    model.lm_head.forward = torch._dynamo.disable(model.lm_head.forward)
    return compile_eager(lambda x: ce(model(x), o.y))(o.x)


def compile_eager(f, **options):
    return torch.compile(f, backend="aot_eager", **options)


COMPILED: dict[str, Any] = {
    "all": lambda m, o: compile_eager(lambda x: ce(m(x), o.y), fullgraph=True)(o.x),
    "model": lambda m, o: ce(compile_eager(m, fullgraph=True)(o.x), o.y),
    "loss": lambda m, o: compile_eager(ce)(m(o.x), o.y),
    "capped loss": lambda m, o: compile_eager(lambda z: ce(2 * (z / 2).tanh(), o.y))(m(o.x)),
    "some function": lambda m, o: compile_eager(lambda z: z.exp().mean())(m(o.x)),
    "edit": lambda m, o: compile_eager(lambda z: ce(z.clone().mul_(2), o.y))(m(o.x)),
    "body": lambda m, o: ce(m.lm_head(compile_eager(m.body, fullgraph=True)(o.x).tanh()), o.y),
    "break": with_break,
    "breaks around the head": lambda m, o: compile_eager(BreaksAroundHead(m))(o.x, o.y),
    "disabled head": with_disabled_head,
    "in place": lambda m, o: (m.compile(backend="aot_eager"), ce(m(o.x), o.y))[1],
}
COMPILED |= {
    "loss of computed logits": lambda m, o: (lambda z: (z.argmax(), compile_eager(ce)(z, o.y))[1])(
        m(o.x)
    ),
    "loss of observed logits": lambda m, o: (lambda z: (z.grad_fn, compile_eager(ce)(z, o.y))[1])(
        m(o.x)
    ),
}
COMPILED_AND_FUSED = [
    *("loss", "body", "break", "breaks around the head", "disabled head", "in place"),
]
NOT_THROUGH_THE_HEAD = "loss", "body", "disabled head"  # fused by PyTorch 2.11, too


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", make_params(COMPILED))
def test_compiled_code_agrees(name):
    def run(model):
        o = make_inputs()
        loss = COMPILED[name](model, o)
        return [loss, *torch.autograd.grad(loss, [*model.parameters(), o.x])]

    plain, swapped, log = make_pair()
    torch.compiler.reset()
    results = run(swapped)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # PyTorch 2.12 says so of its own stance
        warnings.filterwarnings("ignore", ".*fullgraph=True found no compiled frames")
        assert_agree(results, run(plain))
    if name in COMPILED_AND_FUSED and (name in NOT_THROUGH_THE_HEAD or torch.__version__ >= "2.12"):
        assert_fused(log, 1)


def test_meta_and_fake_tensors_give_plain_logits():
    _, swapped, log = make_pair()
    o = make_inputs()
    loss = ce(swapped.to("meta")(o.x.detach().to("meta")), o.y.to("meta"))
    assert loss.is_meta
    loss.backward()
    with FakeTensorMode():
        model = Model()
        swap(model)
        loss = ce(model(torch.randn(B, T, D)), torch.zeros(B, T, dtype=torch.int64))
        assert type(loss) is FakeTensor
        loss.backward()
        assert model.lm_head.weight.grad.shape == (C, D)
    assert not log.fused
    assert not log.materialized
