"""Uses that need the logits: values, gradients, errors and the recorded reasons."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import (
    F64,
    IGNORED,
    MARKS,
    C,
    T,
    assert_agree,
    ce,
    compute_results,
    make_inputs,
    make_pair,
    make_params,
    run_seeded,
)
from torch import nn

from torch_nnmath import functional, swap

pytestmark = MARKS


class TripledGradient(torch.autograd.Function):
    """The identity, a view, a cast, or the double in place, with the gradient times -3."""

    @staticmethod
    def forward(ctx, z, kind):
        ctx.dtype = z.dtype
        if kind == "in place":
            ctx.mark_dirty(z)
            return z.mul_(2)
        return {"as it is": lambda: z, "view": lambda: z.view_as(z), "cast": z.float}[kind]()

    @staticmethod
    def backward(ctx, g):
        return -3 * g.to(ctx.dtype), None


def apply_function(kind):
    return lambda z, o: ce(TripledGradient.apply(z, kind), o.y)


def edit_before_loss(edit):
    """Returns a loss after an edit in place, which may return other logits for the loss."""

    def loss(z, o):
        other = edit(z, o)
        return ce(z if other is None else other, o.y)

    return loss


def set_first_class(z, o):
    z[:, :, 0] = -1e9


def set_rows(z, o):
    z[o.y == IGNORED] = 0.0


def edit_of_view(z, o):
    v, w = z.view(-1, C), z.float()
    v[:, 1] = 0
    return z + w + v.view(z.shape)


def edit_after_views_and_copies(z, o):
    v = z[:, :-1]
    u, w = v.transpose(1, 2), z.clone()
    z.mul_(2)
    return u.mT.repeat(1, 2, 1)[:, :T] + w


def edit_of_a_clone(z, o):
    z.clone().mul_(2)


def edit_of_a_part(z, o):
    z[:, 2:4].div_(3)


def edit_of_data(z, o):
    z.data.mul_(2)


def edit_without_gradient(z, o):
    with torch.no_grad():
        z[0] *= 2


def edit_after_a_loss(z, o):
    before = ce(z, o.y)
    z.mul_(2)
    return before + ce(z, o.y)


def use_results_of_steps(z, o):
    """After one deferred tensor is materialised, those of other forms have the right values."""
    v, w, u = z.flatten(0, 1), (z + o.row) * o.s, 3 * torch.tanh(z.mT / 3)
    l = u.log_softmax(1)
    total = w.exp().mean()
    return total + ce(z, o.y) + F.cross_entropy(v, o.y.flatten()) + F.nll_loss(l, o.y) + u.sum()


def compute_entropy_with_hook(z, o):
    l = z.log_softmax(-1)
    p = l.exp()
    p.register_hook(lambda gradient: 2 * gradient)
    return -(p * l).sum(-1)


def add_other_logits(z, o):
    return ce(z + z.detach().roll(1, 0).requires_grad_(), o.y)


def write_out_argument(z, o):
    return ce(z, o.y) + torch.add(z.detach(), 1, out=torch.empty_like(z.detach())).sum()


MATERIALIZED: dict[str, tuple[str, Any]] = {
    # the operation that the log names, and the use
    "exp": ("exp", lambda z, o: z.exp().mean()),
    "softmax": ("select", lambda z, o: z.softmax(-1)[..., 0]),
    "softmax, function": ("pow", lambda z, o: F.softmax(z, dim=2).square().sum(-1)),
    "softmax over rows": ("_softmax", lambda z, o: (z.softmax(1) * z).sum(-1)),
    "softmax, then scaled": ("mul", lambda z, o: (3 * z.softmax(-1) * z).sum(-1)),
    "softmax twice": ("_softmax", lambda z, o: (z.softmax(-1).softmax(-1) * o.probs).sum(-1)),
    "sum of probabilities": (
        "_softmax_backward_data",
        lambda z, o: z.softmax(-1).sum(-1) + z.softmax(-1).gather(-1, o.all_y[..., None])[..., 0],
    ),
    "entropy with a hook": ("register_hook", compute_entropy_with_hook),
    "entropy over rows and classes": (
        "sum",
        lambda z, o: (z.softmax(-1) * z.log_softmax(-1)).sum((1, 2)),
    ),
    "entropy, squared terms": (
        "pow",
        lambda z, o: (z.softmax(-1) * z.log_softmax(-1)).square().sum(-1),
    ),
    "logsumexp of rows": ("logsumexp|amax", lambda z, o: z.logsumexp(1)),
    "logsumexp of all": ("logsumexp|amax", lambda z, o: z.logsumexp((1, 2))),
    "logsumexp of logarithms": ("logsumexp|amax", lambda z, o: z.log_softmax(-1).logsumexp(-1)),
    "cat": ("cat", lambda z, o: ce(torch.cat([z, z]), torch.cat([o.y, o.y]))),
    "stack": ("stack|cat|unsqueeze", lambda z, o: torch.stack([z, 2 * z]).square().mean(-1)),
    "mean of all logarithms": (
        "_log_softmax_backward_data",
        lambda z, o: z.log_softmax(-1).mean(),
    ),
    "sum over rows and classes": ("sum", lambda z, o: z.log_softmax(-1).sum((1, 2))),
    "sum over rows": ("sum", lambda z, o: z.log_softmax(-1).sum(1)),
    "sum by axis": (
        "_log_softmax_backward_data",
        lambda z, o: z.log_softmax(-1).sum(axis=-1),
    ),
    "a product": ("expand", lambda z, o: z @ z.mT),
    "sums of logits": ("cumsum", lambda z, o: z.cumsum(1)[..., 5]),
    "log of sums": ("logcumsumexp", lambda z, o: z.logcumsumexp(-1)[..., -1]),
    "gather of few logits": ("gather", lambda z, o: z.gather(-1, o.all_y[:, :3, None])),
    "gather of several": (
        "_log_softmax_backward_data",
        lambda z, o: z.log_softmax(-1).gather(-1, (o.all_y[..., None] + torch.arange(2)) % C),
    ),
    "gather over rows": (
        "gather",
        lambda z, o: z.log_softmax(-1).gather(1, o.all_y[..., None] % T),
    ),
    "some classes": ("slice", lambda z, o: ce(z[..., :-1], o.y.clamp(max=C - 2))),
    "every other class": ("slice", lambda z, o: ce(z[..., ::2], o.y.clamp(max=99))),
    "one class": ("select", lambda z, o: z[..., 7]),
    "classes reversed": ("flip", lambda z, o: ce(z.flip(-1), o.y)),
    "classes moved": ("index_select", lambda z, o: ce(z.index_select(2, torch.randperm(C)), o.y)),
    "classes by index": ("index", lambda z, o: ce(z[..., torch.arange(C).flip(0)], o.y)),
    "classes split": ("split", lambda z, o: ce(z.split(200, -1)[0], o.y.clamp(max=199))),
    "rows moved": ("roll", lambda z, o: ce(z.roll(1, 1), o.y)),
    "rows expanded": ("expand", lambda z, o: ce(z[:1].expand(3, -1, -1), o.y[:1].repeat(3, 1))),
    "rows repeated": ("repeat", lambda z, o: ce(z.repeat(2, 1, 1), o.y.repeat(2, 1))),
    "no rows": ("slice", lambda z, o: ce(z[:0], o.y[:0], reduction="sum")),
    "no rows, by mask": ("index", lambda z, o: z[o.y == 1000].sum()),
    "classes as rows": (
        "_log_softmax",
        lambda z, o: F.cross_entropy(z, o.all_y[:, :1].repeat(1, C) % T),
    ),
    "a narrower type": ("_to_copy", lambda z, o: ce(z.float(), o.y).double()),
    "narrower and back": ("_to_copy", lambda z, o: ce(z.half().double(), o.y)),
    "a number less": ("sub", lambda z, o: ce(z - 1.0, o.y)),
    "a number more": ("add", lambda z, o: ce(z + 1.0, o.y)),
    "a row less": ("sub", lambda z, o: ce(z - o.row, o.y)),
    "a row and a factor": ("add", lambda z, o: ce(torch.add(z, o.row, alpha=2), o.y)),
    "a row of scaled logits": ("add", lambda z, o: ce(z * 2 + o.row, o.y)),
    "a row of capped logits": ("add", lambda z, o: ce(z.tanh() + o.row, o.y)),
    "a row times": ("mul", lambda z, o: ce(z * o.row, o.y)),
    "as many": ("add", lambda z, o: ce(z + o.probs, o.y)),
    "temperatures with a bias": ("div", lambda z, o: ce(z / o.t, o.y)),
    "temperatures, a row; no bias": ("add", lambda z, o: ce(z / o.t + o.row, o.y)),
    "temperatures, a cap; no bias": ("tanh", lambda z, o: ce((z / o.t).tanh(), o.y)),
    "a row, temperatures; no bias": ("div", lambda z, o: ce((z + o.row) / o.t, o.y)),
    "number over": ("reciprocal", lambda z, o: ce(2 / z, o.y)),
    "power": ("pow", lambda z, o: ce(z**1, o.y)),
    "complex": ("mul", lambda z, o: ce((z[:, :7] * (2 + 0j)).real, o.y[:, :7])),
    "times 0": ("mul", lambda z, o: ce(z * 0, o.y)),
    "times nan": ("mul", lambda z, o: ce(z * math.nan, o.y)),
    "times inf": ("mul", lambda z, o: ce(z * math.inf, o.y)),
    "over 0": ("div", lambda z, o: ce(z / 0.0, o.y)),
    "rounded": ("div", lambda z, o: ce(torch.div(z, 3, rounding_mode="floor"), o.y)),
    "capped twice": ("tanh", lambda z, o: ce((2 * (z / 2).tanh()).tanh(), o.y)),
    "capped, times a learnt number": ("mul", lambda z, o: ce(z.tanh() * o.s, o.y)),
    "capped, of nnmath capped": (
        "masked_fill",
        lambda z, o: functional.cross_entropy(2 * z.mT.tanh(), o.y, softcap=3.0),
    ),
    "capped, of nnmath scaled": (
        "masked_fill",
        lambda z, o: functional.cross_entropy(2 * z.mT.tanh(), o.y, logit_scale=o.s / o.s.item()),
    ),
    "clamp": ("clamp", lambda z, o: ce(z.clamp(-5, 5), o.y)),
    "where": ("where", lambda z, o: ce(torch.where(o.fixed_row > 0, z, -100.0), o.y)),
    "masked_fill": ("masked_fill", lambda z, o: ce(z.masked_fill(o.fixed_row > 1, -1e4), o.y)),
    "dropout": ("empty_like", lambda z, o: ce(F.dropout(z, 0.5), o.y)),
    "logarithms twice": ("_log_softmax", lambda z, o: F.cross_entropy(z.mT.log_softmax(1), o.y)),
    "logarithms over rows": (
        "nll_loss|_log_softmax",
        lambda z, o: F.nll_loss(z.mT.log_softmax(2), o.y),
    ),
    "nll_loss of logits": ("nll_loss2d_forward", lambda z, o: F.nll_loss(z.mT, o.y)),
    "nll_loss of the negated": (
        "nll_loss2d_forward",
        lambda z, o: F.nll_loss(-z.mT.log_softmax(1), o.y),
    ),
    "mse_loss": ("mse_loss", lambda z, o: F.mse_loss(z, o.probs)),
    "multi_margin_loss": (
        "multi_margin_loss",
        lambda z, o: F.multi_margin_loss(z.flatten(0, 1), o.all_y.flatten()),
    ),
    "binary_cross_entropy": (
        "binary_cross_entropy_with_logits",
        lambda z, o: F.binary_cross_entropy_with_logits(z, o.fixed_probs),
    ),
    "a second term": ("mul", lambda z, o: ce(z, o.y) + 1e-2 * (z * z).mean()),
    "topk of many": ("topk", lambda z, o: ce(z, o.y) + z.topk(C // 2)[0].mean()),
    "sorting": ("sort", lambda z, o: z.sort(-1)[0][..., ::30]),
    "after steps": ("exp", use_results_of_steps),
    "sum of logits and targets": ("roll", add_other_logits),
    "out": ("empty_like", write_out_argument),
    "as_strided": ("as_strided", lambda z, o: z[1].as_strided((T,), (C,))),
    # in place
    "add_": ("add_", edit_before_loss(lambda z, o: z.add_(1))),
    "iadd": ("add_", edit_before_loss(lambda z, o: z.__iadd__(o.row))),
    "mul_": ("mul_", edit_before_loss(lambda z, o: z.mul_(o.s))),
    "tanh_": ("tanh_", edit_before_loss(lambda z, o: z.tanh_())),
    "setitem": ("select|slice|fill_|copy_", edit_before_loss(set_first_class)),
    "setitem, mask": ("index_put_|masked_fill_", edit_before_loss(set_rows)),
    "masked_fill_": (
        "masked_fill_",
        edit_before_loss(lambda z, o: z.masked_fill_(o.fixed_row > 1, -1e4)),
    ),
    "zero_": ("zero_", edit_before_loss(lambda z, o: z.zero_())),
    "copy_": ("copy_", edit_before_loss(lambda z, o: z.copy_(o.probs))),
    "index_fill_": (
        "index_fill_",
        edit_before_loss(lambda z, o: z.index_fill_(2, torch.tensor([3]), -5)),
    ),
    "scatter_": ("scatter_", edit_before_loss(lambda z, o: z.scatter_(2, o.all_y[..., None], 0.0))),
    "of a view": ("_to_copy", edit_before_loss(edit_of_view)),
    "of a part": ("div_", edit_before_loss(edit_of_a_part)),
    "of a clone": ("mul_", edit_before_loss(edit_of_a_clone)),
    "seen by relatives": ("mul_", edit_before_loss(edit_after_views_and_copies)),
    "without gradient": ("mul_|select", edit_before_loss(edit_without_gradient)),
    "after a loss": ("mul_", edit_after_a_loss),
    "of data": ("mul_", edit_before_loss(edit_of_data)),
    # a Function of the user between head and loss
    "Function, the same": ("TripledGradientBackward stands between", apply_function("as it is")),
    "Function, a view": ("TripledGradientBackward stands between", apply_function("view")),
    "Function, a cast": ("_to_copy", lambda z, o: apply_function("cast")(z, o).double()),
    "Function, in place": ("mul_", apply_function("in place")),
}


ALSO_FUSED = ["topk of many", "a second term", "out", "after a loss"]


@pytest.mark.parametrize("name", make_params(MATERIALIZED))
def test_uses_that_need_logits_agree_and_are_logged(name):
    operation, use = MATERIALIZED[name]
    plain, swapped, log = make_pair(bias="no bias" not in name)
    results, truth = (run_seeded(compute_results, model, use) for model in (swapped, plain))
    assert_agree(results, truth)
    assert bool(log.fused) == (name in ALSO_FUSED)
    assert log.materialized
    for reason in log.materialized:
        assert re.fullmatch(rf"({operation})\b.* at .*/tests/deferred/\w+.py:\d+ in .*", reason), (
            reason
        )


# Errors


INVALID: dict[str, Any] = {
    "a class too large": lambda z, o: ce(z, o.all_y.fill_(C)),
    "a negative class": lambda z, o: ce(z, o.all_y.fill_(-1)),
    "gather of a class too large": lambda z, o: z.log_softmax(-1).gather(
        -1, o.all_y[..., None] + C
    ),
    "gather of a negative class": lambda z, o: z.log_softmax(-1).gather(-1, o.y[..., None]),
    "types of targets": lambda z, o: ce(z, o.all_y.int()),
    "float targets": lambda z, o: ce(z, o.all_y.double()),
    "shapes": lambda z, o: F.cross_entropy(z.flatten(0, 1), o.y.flatten()[1:]),
    "other shapes": lambda z, o: F.cross_entropy(z, o.y),
    "reduction": lambda z, o: ce(z, o.y, reduction="some"),
    "smoothing": lambda z, o: ce(z, o.y, label_smoothing=2.0),
    "class weights": lambda z, o: ce(z, o.y, weight=o.weight[1:]),
    "types of class weights": lambda z, o: ce(z, o.y, weight=o.weight.float()),
    "ignored probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT, ignore_index=3),
    "an axis": lambda z, o: z.log_softmax(5),
    "a view": lambda z, o: z.view(-1, C + 1),
    "an index": lambda z, o: z[:, torch.tensor([T])],
    "a mask": lambda z, o: z[o.y[:1] > 0],
    "a row": lambda z, o: z + o.row[1:],
    "no target": lambda z, o: F.cross_entropy(z.flatten(0, 1), None),
    "an edit of what is saved": lambda z, o: ce(z.tanh().mul_(2), o.y),
    "an edit of a saved view": lambda z, o: (lambda t: t[0].zero_() + ce(t, o.y))(z.tanh()),
}


@pytest.mark.parametrize("name", make_params(INVALID))
def test_invalid_use_raises_the_type_that_pytorch_raises(name):
    plain, swapped, _ = make_pair()
    errors = []
    for model in (plain, swapped):
        with pytest.raises(Exception) as raised:  # noqa: PT011
            compute_results(model, INVALID[name])
        errors.append(raised.type)
    assert errors[0] is errors[1]


RESHAPED: dict[str, Any] = {
    "unsqueeze_": lambda v: v.unsqueeze_(1),
    "squeeze_": lambda v: v.squeeze_(),
    "t_": lambda v: v.t_(),
    "transpose_": lambda v: v.transpose_(0, 1),
    "as_strided_": lambda v: v.as_strided_((2, 2), (1, 2)),
}


@pytest.mark.parametrize("name", make_params(RESHAPED))
@pytest.mark.parametrize("is_computed", [True, False])
def test_change_of_shape_in_place_raises(is_computed, name):
    _, swapped, _ = make_pair()
    z = swapped(make_inputs().x)
    v = z[0]
    if is_computed:
        z.exp()
    with pytest.raises(RuntimeError, match=rf"in place by {name}: use {name[:-1]}$"):
        RESHAPED[name](v)
    assert v.shape == (T, C)


def test_invalid_operands_of_the_head_raise_at_once():
    head = nn.Sequential(nn.Linear(4, C, dtype=F64))
    swap(head)
    x = torch.randn(3, 4, dtype=F64)
    for bad in (x.float(), x[..., 1:], x[0, 0]):
        with pytest.raises(RuntimeError) as expected:
            functional.linear(bad, head[0].weight, head[0].bias)
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(expected.value))}$"):
            head(bad)


# Changed operands


def test_logits_read_before_an_optimizer_step_keep_their_values():
    plain, swapped, _ = make_pair()
    for model in (plain, swapped):
        o = make_inputs()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        z = model(o.x)
        ce(z, o.y).backward()
        truth = z.detach().clone()
        optimizer.step()
        assert_agree([z.detach(), z[1:].exp()], [truth, truth[1:].exp()])


STALE: dict[str, Any] = {
    "weight": lambda m, z, o: m.lm_head.weight.mul_(2),
    "bias": lambda m, z, o: m.lm_head.bias.zero_(),
    "SGD": lambda m, z, o: torch.optim.SGD(m.parameters(), 1.0).step(),
    "SGD, each": lambda m, z, o: torch.optim.SGD(m.parameters(), 1.0, foreach=True).step(),
    "SGD, fused": lambda m, z, o: torch.optim.SGD(m.parameters(), 1.0, fused=True).step(),
    "AdamW": lambda m, z, o: torch.optim.AdamW(m.parameters(), 1.0).step(),
    "AdamW, fused": lambda m, z, o: torch.optim.AdamW(m.parameters(), 1.0, fused=True).step(),
    "Adagrad, fused": lambda m, z, o: torch.optim.Adagrad(m.parameters(), 1.0, fused=True).step(),
    "features": lambda m, z, o: o.features.add_(1),
    "learnt scale": lambda m, z, o: o.s.mul_(2),
    "learnt row": lambda m, z, o: o.row.mul_(2),
}


@pytest.mark.parametrize("use", ["read", "loss", "read of the head"])
@pytest.mark.parametrize("name", make_params(STALE))
def test_logits_of_changed_operands_raise(name, use):
    _, swapped, log = make_pair()
    o = make_inputs()
    o.features = swapped.body(o.x).tanh()
    z = swapped.lm_head(o.features)
    v = (z + o.row) * o.s
    ce(z, o.y).backward()
    with torch.no_grad():
        STALE[name](swapped, z, o)
    with pytest.raises(
        RuntimeError, match=r"head 'lm_head' .* changed in place .* optimizer's step"
    ):
        v.sum() if use == "read" else z.sum() if use == "read of the head" else ce(v, o.y)
    assert log.fused == 1


@pytest.mark.parametrize(
    "use", [lambda z: z.sum(), lambda z: F.cross_entropy(z, z.new_zeros(4).long())]
)
def test_weight_that_is_partitioned_after_the_forward_raises(use):
    """As ZeRO-3 does: the parameter stays, with an empty tensor as its data."""
    head = nn.Linear(5, 30, bias=False)
    swap(head)
    logits = head(torch.randn(4, 5))
    head.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"memory has since been freed, as FSDP .* ZeRO-3"):
        use(logits)
