"""Divergences of two swapped models: they equal those of plain models and make no logits.

In the tables `a` are the student's logits, `b` the teacher's, and `o` what `make_inputs` returns.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import (
    F64,
    IGNORED,
    MARKS,
    B,
    C,
    T,
    assert_agree,
    assert_divergence_is_fused,
    assert_fused,
    compute_divergence,
    make_inputs,
    make_pair,
    make_params,
    make_teachers,
    make_terms_of_jsd,
)
from torch import nn

from torch_nnmath import functional

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both"),
]


# The spellings


def make_mask(o):
    return o.y != IGNORED


def mean_over_mask(loss, o):
    mask = make_mask(o).to(loss.dtype)
    return (loss * mask).sum() / mask.sum()


def use_modules(a, b, o):
    log_softmax = nn.LogSoftmax(-1)
    return nn.KLDivLoss(reduction="batchmean", log_target=True)(log_softmax(a), log_softmax(b))


def sum_jeffreys_divergence(a, b, o):
    l, lt = a.log_softmax(-1), b.log_softmax(-1)
    return ((lt.exp() - l.exp()) * (lt - l)).sum(-1)


def use_two_temperatures(a, b, o):
    """The student's temperature is not the teacher's."""
    l, p = (a * o.s).log_softmax(-1), (b / 3).softmax(-1)
    return F.kl_div(l, p, reduction="none").sum(-1)


def slice_logits(loss):
    """The loss of the logits that predict the completion's tokens, as trainers slice them."""
    return lambda a, b, o: loss(a[:, 2:-1, :], b[:, 2:-1, :], o)


def select_rows(a, b, o):
    mask = make_mask(o)
    p = b[mask].softmax(-1)
    return (p * (b[mask].log_softmax(-1) - a[mask].log_softmax(-1))).sum(-1)


def select_terms(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    return terms[make_mask(o)].sum()


def compute_jsd_by_interpolation(a, b, o):
    l, lt = a.log_softmax(-1), b.log_softmax(-1)
    lm = torch.stack([l + math.log(0.25), lt + math.log(0.75)], 1).logsumexp(1)
    terms = [F.kl_div(lm, v, reduction="none", log_target=True) for v in (l, lt)]
    return torch.lerp(*terms, 0.75).sum(-1)


def compute_jsd_by_logaddexp(a, b, o):
    l, lt = a.log_softmax(-1), b.log_softmax(-1)
    beta = torch.tensor(0.6, dtype=F64)
    lm = torch.logaddexp(l + torch.log1p(-beta), lt + beta.log())
    terms = 0.6 * lt.exp() * (lt - lm)
    return (terms + (1.0 - 0.6) * l.exp() * (l - lm)).sum(dim=-1)


def average_jsd(a, b, o):
    terms = [
        F.kl_div((0.5 * (b.softmax(-1) + a.softmax(-1))).log(), v.softmax(-1), reduction="none")
        for v in (a, b)
    ]
    return ((terms[0] + terms[1]) / 2).mean()


def mask_jsd(a, b, o):
    """The label mask and the divisor of TRL's trainer."""
    mask = make_mask(o)
    return make_terms_of_jsd(a, b, 0.3, 2.0)[mask].sum() / mask.sum().clamp_min(1)


FUSED: dict[str, Any] = {
    # forward and reverse
    "probabilities": lambda a, b, o: F.kl_div(
        F.log_softmax(a, -1), F.softmax(b, -1), reduction="batchmean"
    ),
    "log target": lambda a, b, o: F.kl_div(
        a.log_softmax(-1), torch.log_softmax(b, -1), reduction="batchmean", log_target=True
    ),
    "modules": use_modules,
    "reverse": lambda a, b, o: F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="sum"),
    "reverse, log target": lambda a, b, o: F.kl_div(
        input=b.log_softmax(-1), target=a.log_softmax(-1), reduction="sum", log_target=True
    ),
    # temperatures
    "temperature": lambda a, b, o: (
        F.kl_div(F.log_softmax(a / 2.0, dim=-1), F.softmax(b / 2.0, dim=-1), reduction="batchmean")
        * 2.0**2
    ),
    "temperature, times": lambda a, b, o: F.kl_div(
        F.log_softmax(a * (1 / 3), -1), F.softmax(b * (1 / 3), -1), reduction="none"
    ).sum(-1),
    "temperature of a tensor": lambda a, b, o: F.kl_div(
        F.log_softmax(a / torch.tensor(1.7), -1), F.softmax(b / 1.7, -1), reduction="sum"
    ),
    "two temperatures": use_two_temperatures,
    "negated": lambda a, b, o: F.kl_div(F.log_softmax(-a, -1), F.softmax(-b, -1), reduction="sum"),
    "rows": lambda a, b, o: F.kl_div(
        F.log_softmax(a + o.row, -1), F.softmax((b + o.fixed_row) / 2, -1), reduction="sum"
    ),
    # reductions
    "sum": lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum"),
    "mean": lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1)),
    "legacy sum": lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), size_average=False),
    "operator": lambda a, b, o: torch.kl_div(a.log_softmax(-1), b.softmax(-1), 2),
    "terms, sum": lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(
        -1
    ),
    "terms, kept": lambda a, b, o: torch.sum(
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none"), 2, keepdim=True
    ),
    "terms, mean": lambda a, b, o: F.kl_div(
        a.log_softmax(-1), b.softmax(-1), reduction="none"
    ).mean(-1),
    "terms, mean of all": lambda a, b, o: torch.mean(
        F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True)
    ),
    "terms, sum by axis": lambda a, b, o: F.kl_div(
        a.log_softmax(-1), b.softmax(-1), reduction="none"
    ).sum(axis=-1),
    "terms, sum of axes": lambda a, b, o: F.kl_div(
        a.log_softmax(-1), b.softmax(-1), reduction="none"
    ).sum((1, 2)),
    "classes at the second axis": lambda a, b, o: F.kl_div(
        F.log_softmax(a.mT, 1), F.softmax(b.mT, 1), reduction="none"
    ).sum(1),
    # masks and weights
    "mask": lambda a, b, o: mean_over_mask(
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(-1), o
    ),
    "mask of terms": lambda a, b, o: (
        (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") * make_mask(o)[..., None]
        ).sum()
        / make_mask(o).sum()
    ),
    "mask of terms, expanded": lambda a, b, o: (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
        * make_mask(o)[..., None].double().expand(B, T, C)
    ).sum(),
    "terms of a mask": select_terms,
    "rows of a mask": select_rows,
    "learnt weights": lambda a, b, o: (
        o.t * F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    ).sum(),
    "learnt divisors, shifted": lambda a, b, o: (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") / o.t
    )[:, 1:].sum(-1),
    "counts": lambda a, b, o: (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
        / (1 + torch.arange(T))[:, None]
    ).sum(-1),
    "a learnt factor": lambda a, b, o: (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") * o.s
    ).sum(),
    "views of terms": lambda a, b, o: (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")[:, :-1]
        .reshape(-1, C)
        .sum(dim=-1)
    ),
    "shifted": slice_logits(
        lambda a, b, o: F.kl_div(
            F.log_softmax(a, -1), F.log_softmax(b, -1), reduction="none", log_target=True
        ).sum(-1)
    ),
    "flattened": lambda a, b, o: F.kl_div(
        F.log_softmax(a.view(-1, C), 1), F.softmax(b.view(-1, C), 1), reduction="batchmean"
    ),
    "wider": lambda a, b, o: F.kl_div(
        F.log_softmax(a.double(), -1), F.softmax(b.double(), -1), reduction="sum"
    ),
    # by hand
    "by hand": lambda a, b, o: (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1),
    "by hand, exp": lambda a, b, o: (
        b.log_softmax(-1).exp() * (b.log_softmax(-1) - a.log_softmax(-1))
    ).sum(-1),
    "by hand, log": lambda a, b, o: (b.softmax(-1) * (b.softmax(-1).log() - a.log_softmax(-1))).sum(
        -1
    ),
    "by hand, reverse": lambda a, b, o: (
        -(a.log_softmax(-1).exp() * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1)
    ),
    "by hand, alpha": lambda a, b, o: (
        b.softmax(-1) * torch.sub(b.log_softmax(-1), a.log_softmax(-1), alpha=0.5)
    ).sum(-1),
    "by hand, two sums": lambda a, b, o: (
        b.softmax(-1) * b.log_softmax(-1) - b.softmax(-1) * a.log_softmax(-1)
    ).sum(-1),
    "cross entropy of probabilities": lambda a, b, o: -(b.softmax(-1) * a.log_softmax(-1)).sum(-1),
    "soft targets": lambda a, b, o: torch.sum(-F.softmax(b, 2) * F.log_softmax(a, 2), dim=2).mean(),
    "probabilities as targets": lambda a, b, o: F.cross_entropy(
        (a / 2).flatten(0, 1), (b / 2).softmax(-1).flatten(0, 1)
    ),
    "probabilities as targets, none": lambda a, b, o: F.cross_entropy(
        a.mT, b.mT.softmax(1), reduction="none"
    ),
    "probabilities as targets, module": lambda a, b, o: nn.CrossEntropyLoss(reduction="sum")(
        a.mT, 0.5 * (b.mT.softmax(1) + (b.mT / 3).softmax(1))
    ),
    "probabilities as targets of nnmath": lambda a, b, o: functional.cross_entropy(
        a.mT, b.mT.softmax(1)
    ),
    "Jeffreys": sum_jeffreys_divergence,
    "difference of logarithms": lambda a, b, o: (a.log_softmax(-1) - b.log_softmax(-1)).sum(-1),
    # Jensen and Shannon
    "JSD": lambda a, b, o: make_terms_of_jsd(a, b, 0.3, 2.0).sum(-1),
    "JSD, of 0": lambda a, b, o: make_terms_of_jsd(a, b, 0, 2.0).sum(),
    "JSD, of 1": lambda a, b, o: make_terms_of_jsd(a, b, 1, 2.0).mean(),
    "JSD, mean": lambda a, b, o: make_terms_of_jsd(a, b, 0.9).mean(),
    "JSD, labels": mask_jsd,
    "JSD, shifted": slice_logits(lambda a, b, o: make_terms_of_jsd(a, b, 0.3, 2.0).sum()),
    "JSD, weights": lambda a, b, o: (
        make_terms_of_jsd(a, b, 0.3, 2.0) * make_mask(o).unsqueeze(-1)
    ).sum(),
    "JSD, interpolated": compute_jsd_by_interpolation,
    "JSD, logaddexp": compute_jsd_by_logaddexp,
    "JSD, average": average_jsd,
}
FUSED_WITHOUT_BIAS: dict[str, Any] = {
    "temperatures of rows": lambda a, b, o: F.kl_div(
        F.log_softmax(a / o.t, -1), F.softmax(b / o.fixed_t, -1), reduction="sum"
    ),
}


@pytest.mark.parametrize("is_learnt", [False, True], ids=["frozen", "learnt"])
@pytest.mark.parametrize("name", make_params(FUSED | FUSED_WITHOUT_BIAS))
def test_divergences_agree_and_make_no_logits(name, is_learnt):
    loss = (FUSED | FUSED_WITHOUT_BIAS)[name]
    assert_divergence_is_fused(loss, is_learnt, bias=name in FUSED)


# Parts without gradient


def detach_probabilities(a, b, o):
    """The student's probabilities get no gradient, as in a policy gradient."""
    l = a.log_softmax(-1)
    return (l.exp().detach() * (l - b.log_softmax(-1))).sum(-1)


def detach_log_probabilities(a, b, o):
    l, lt = a.log_softmax(-1), b.log_softmax(-1)
    return (l.exp() * (l.detach() - lt)).sum(-1)


def distil_into_itself(a, b, o):
    """The teacher is the student itself, without gradient."""
    p = (a.detach() / 2).softmax(-1)
    return F.kl_div(a.log_softmax(-1), p, reduction="none").sum(-1) + F.kl_div(
        a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True
    )


def make_terms_without_gradient(a, b, o):
    with torch.no_grad():
        difference = b.log_softmax(-1) - a.log_softmax(-1)
    return (a.softmax(-1) * difference).sum(-1)


def sum_without_gradient(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True)
    with torch.no_grad():
        constant = terms.sum(-1)
    assert not constant.requires_grad
    return constant + terms.sum(-1)


def detach_terms(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True)
    return terms.detach().sum(-1) * terms.sum(-1)


def detach_weight(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    return (terms * o.t.detach()).sum() + (terms.detach() * o.t).sum()


def weigh_without_gradient(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    with torch.no_grad():
        weighted_terms = terms * o.t
    return (terms + weighted_terms).sum(-1)


GRADIENTS: dict[str, Any] = {
    "detached probabilities": (detach_probabilities, (1, 1)),
    "detached log-probabilities": (detach_log_probabilities, (1, 1)),
    "detached teacher": (
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b.detach().softmax(-1), reduction="sum"),
        (1, 1),
    ),
    "detached student": (
        lambda a, b, o: F.kl_div(a.detach().log_softmax(-1), b.softmax(-1), reduction="sum"),
        (1, 1),
    ),
    "the student as teacher": (distil_into_itself, (2, 1)),
    "terms made without gradient": (make_terms_without_gradient, (1, 1)),
    "sum without gradient": (sum_without_gradient, (2, 2)),
    "detached terms": (detach_terms, (2, 2)),
    "detached weight": (detach_weight, (2, 2)),
    "weighted without gradient": (weigh_without_gradient, (1, 1)),
}


@pytest.mark.parametrize("is_learnt", [False, True], ids=["frozen", "learnt"])
@pytest.mark.parametrize("name", make_params(GRADIENTS))
def test_divergences_with_detached_parts_agree_and_make_no_logits(name, is_learnt):
    loss, counts = GRADIENTS[name]
    assert_divergence_is_fused(loss, is_learnt, counts=counts)


def prepare(loss, is_learnt=True):
    """Returns a function that computes a loss of plain or swapped models, and both logs."""
    plain, swapped, log = make_pair()
    plain_teacher, teacher, teacher_log = make_teachers()

    def compute(is_swapped, o):
        models = (swapped, teacher) if is_swapped else (plain, plain_teacher)
        with torch.set_grad_enabled(is_learnt and torch.is_grad_enabled()):
            b = models[1](o.x.flip(1))
        leaves = [*models[0].parameters(), *models[1].parameters(), o.x]
        return FUSED[loss](models[0](o.x), b, o), leaves

    return compute, log, teacher_log


@pytest.mark.parametrize("name", ["JSD", "sum", "JSD, weights", "reverse", "mask"])
def test_second_backward_and_second_order_agree(name):
    compute, log, _ = prepare(name)
    results = []
    for is_swapped in (True, False):
        loss, leaves = compute(is_swapped, make_inputs())
        total = loss.sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        again = torch.autograd.grad(total, leaves, retain_graph=True)
        squares = sum(g.square().sum() for g in first)
        results.append([*first, *again, *torch.autograd.grad(squares, leaves)])
    assert_agree(*results, rtol=1e-8, atol=1e-8)
    assert_fused(log, 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", make_params(FUSED))
def test_divergences_agree_without_gradient(name, mode):
    compute, log, teacher_log = prepare(name, is_learnt=False)
    o = make_inputs()
    with mode():
        results = [compute(is_swapped, o)[0] for is_swapped in (True, False)]
    assert results[0].is_inference() == results[1].is_inference()
    assert_agree(*([x.clone()] for x in results))
    assert_fused(log, 1)
    assert_fused(teacher_log, 1)


# A teacher or a student that is not swapped

ONE_SWAPPED: dict[str, Any] = {
    "forward": lambda a, b, o: F.kl_div(
        F.log_softmax(a / 2, -1), F.softmax(b / 2, -1), reduction="batchmean"
    ),
    "forward, log target": lambda a, b, o: F.kl_div(
        a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1),
    "reverse": lambda a, b, o: F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="sum"),
    "reverse, log target": lambda a, b, o: F.kl_div(
        b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True
    )[o.y != IGNORED].sum(),
    "by hand": lambda a, b, o: (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1),
    "by hand, reverse": lambda a, b, o: (
        a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))
    ).sum(-1),
    "cross entropy": lambda a, b, o: -(b.softmax(-1) * a.log_softmax(-1)).sum(-1),
    "other targets": lambda a, b, o: F.kl_div(a.log_softmax(-1), b.abs(), reduction="sum"),
    "zeros": lambda a, b, o: F.kl_div(
        a.log_softmax(-1), b.softmax(-1) * (b.detach() > 0), reduction="none"
    ).sum(-1),
}
LOSSES_OF_TEACHERS_LOGITS = ("other targets", "zeros")  # which read them directly


@pytest.mark.parametrize("is_learnt", [False, True], ids=["frozen", "learnt"])
@pytest.mark.parametrize("is_student", [True, False], ids=["student", "teacher"])
@pytest.mark.parametrize("name", make_params(ONE_SWAPPED))
def test_divergences_agree_if_one_model_is_swapped(name, is_student, is_learnt):
    plain, swapped, log = make_pair()
    plain_teacher, teacher, teacher_log = make_teachers()
    loss = ONE_SWAPPED[name]
    models = (swapped, plain_teacher) if is_student else (plain, teacher)
    truth = compute_divergence(plain, plain_teacher, loss, make_inputs(), is_learnt)
    results = compute_divergence(*models, loss, make_inputs(), is_learnt)
    assert_agree(results, truth, rtol=1e-9, atol=1e-9)
    if is_student:
        assert_fused(log, 1)
    elif name not in LOSSES_OF_TEACHERS_LOGITS:
        assert_fused(teacher_log, 1)


# Losses that need the logits, and the reasons in the log


def use_other_weights(a, b, o):
    l, lt = a.log_softmax(-1), b.log_softmax(-1)
    lm = torch.logaddexp(l + math.log(0.3), lt + math.log(0.7))
    return (0.5 * l.exp() * (l - lm) + 0.5 * lt.exp() * (lt - lm)).sum(-1)


def use_half_of_jsd(a, b, o):
    p, q = b.softmax(-1), a.softmax(-1)
    return F.kl_div((0.5 * (p + q)).log(), p, reduction="sum")


def double_terms(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    for _ in range(8):
        terms = terms + terms
    return terms.sum(-1)


def make_infinite(o):
    """Probabilities, but in some rows infinite numbers."""
    return torch.where(make_mask(o)[..., None], o.fixed_probs, -math.inf)


def chain_terms(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    for _ in range(700):
        terms = terms * 1.001
    return terms.sum(-1)


def average_terms_often(a, b, o):
    """The terms are reached in 2^50 ways."""
    first = second = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    for _ in range(50):
        first, second = 0.5 * first + 0.5 * second, 0.7 * first
    return first.sum(-1)


def detach_average(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    for _ in range(30):
        terms = 0.5 * terms + 0.5 * terms
    return terms.detach().sum(-1) + a.sum(-1)


def cap(z):
    return 3 * torch.tanh(z / 3)


def put_hook_between(a, b, o):
    l = a.log_softmax(-1)
    l.register_hook(lambda gradient: 2 * gradient)
    return F.kl_div(l, b.softmax(-1), reduction="sum")


def put_hook_on_terms(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
    if terms.requires_grad:
        terms.register_hook(lambda gradient: 2 * gradient)
    return terms.sum(-1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def make_leaf_of_terms(a, b, o):
    terms = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").detach()
    return terms.requires_grad_().sum(-1).detach() + a.sum(-1)


NOT_FUSED: dict[str, tuple[str, Any]] = {
    # the reason in the student's log, or several separated by |
    "capped": (
        "a divergence of capped logits",
        lambda a, b, o: F.kl_div(cap(a).log_softmax(-1), b.softmax(-1), reduction="sum"),
    ),
    "other weights of a mixture": ("a mixture whose weights", use_other_weights),
    "half of a divergence": ("a mixture in other terms", use_half_of_jsd),
    "squared terms": (
        "pow",
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").square().sum(),
    ),
    "sum over rows": (
        "sum",
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(1),
    ),
    "terms clipped": (
        "clamp",
        lambda a, b, o: (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").clamp(max=0.1).sum(-1)
        ),
    ),
    "terms masked in place": (
        "mul_",
        lambda a, b, o: (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
            .mul_(make_mask(o)[..., None])
            .sum(-1)
        ),
    ),
    "weights of classes": (
        "mul",
        lambda a, b, o: (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") * o.weight
        ).sum(-1),
    ),
    "largest term": (
        "max",
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").max(-1)[0],
    ),
    "one class": (
        "select",
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")[..., 3],
    ),
    "broadcast": (
        "sub|mul",
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b[:, :1].softmax(-1), reduction="sum"),
    ),
    "other axis": (
        "_softmax|_log_softmax|sub|mul",
        lambda a, b, o: F.kl_div(a.log_softmax(1), b.softmax(1), reduction="sum"),
    ),
    "smoothed logarithm": (
        "add|log|sub|mul",
        lambda a, b, o: (a.softmax(-1) * ((a.softmax(-1) + 1e-9).log() - b.log_softmax(-1))).sum(
            -1
        ),
    ),
    "terms that cancel": (
        "terms that cancel",
        lambda a, b, o: (lambda p, l: (p * l - p * l).sum(-1))(b.softmax(-1), a.log_softmax(-1)),
    ),
    "log-probabilities times 0": (
        "terms that cancel",
        lambda a, b, o: (b.softmax(-1) * (b.log_softmax(-1) - 0 * a.log_softmax(-1))).sum(-1),
    ),
    "weights of terms that cancel": (
        "terms that cancel",
        lambda a, b, o: (lambda p, l: o.t * (p * l - p * l) + p * (b.log_softmax(-1) - l))(
            b.softmax(-1), a.log_softmax(-1)
        ).sum(-1),
    ),
    "many terms": ("many terms", double_terms),
    "a chain of products": ("mul", chain_terms),
    "averages of averages": ("many terms|mul|add", average_terms_often),
    "detached averages": ("many terms", detach_average),
    "infinite tensor": (
        "terms times a tensor that is not finite",
        lambda a, b, o: (a.softmax(-1) * make_infinite(o)).sum(-1) + b.sum(-1),
    ),
    "infinite rows": (
        "terms times a number that is not finite",
        lambda a, b, o: (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") / make_mask(o)[..., None]
        ).sum(-1),
    ),
    "complex terms": (
        "_to_copy",
        lambda a, b, o: (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
            .to(torch.complex128)
            .sum(-1)
            .real
        ),
    ),
    "an axis that is a tensor": (
        "sum",
        lambda a, b, o: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(
            torch.tensor(-1)
        ),
    ),
    "infinite factor": (
        "terms times a number that is not finite",
        lambda a, b, o: (
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") * math.inf
        ).sum(),
    ),
    "division by 0": (
        "a division by 0",
        lambda a, b, o: (F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none") / 0).sum(),
    ),
    "sum of probabilities": (
        "a sum of terms that are not those of a divergence|_softmax_backward_data",
        lambda a, b, o: (a.softmax(-1) + b.softmax(-1)).sum(-1),
    ),
    "hook": ("register_hook of logits", put_hook_between),
    "hook on terms": ("register_hook of logits", put_hook_on_terms),
    "Function": (
        "DoubledBackward stands between",
        lambda a, b, o: F.kl_div(Doubled.apply(a.log_softmax(-1)), b.softmax(-1), reduction="sum"),
    ),
    "Function of terms": (
        "DoubledBackward stands between",
        lambda a, b, o: Doubled.apply(
            F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none")
        ).sum(-1),
    ),
    "probabilities as targets, smoothed": (
        "sum|neg|mul",
        lambda a, b, o: F.cross_entropy(a.mT, b.mT.softmax(1), label_smoothing=0.1),
    ),
    "probabilities as targets, learnt scale": (
        "slice|sum|neg|mul",
        lambda a, b, o: functional.cross_entropy(
            a.mT, b.mT.softmax(1), logit_scale=o.s / o.s.detach()
        ),
    ),
    "probabilities as targets, class weights": (
        "sum|neg|mul",
        lambda a, b, o: F.cross_entropy(a.mT, b.mT.softmax(1), o.weight),
    ),
    "logits as targets": ("sum|neg|mul", lambda a, b, o: F.cross_entropy(a.mT, b.mT)),
    "logits": ("sub", lambda a, b, o: (a - b).square().mean(-1)),
}


@pytest.mark.parametrize("name", make_params(NOT_FUSED))
def test_divergences_that_need_logits_agree_and_are_logged(name):
    reason, loss = NOT_FUSED[name]
    plain, swapped, log = make_pair()
    plain_teacher, teacher, _ = make_teachers()
    truth = compute_divergence(plain, plain_teacher, loss, make_inputs(), True)
    results = compute_divergence(swapped, teacher, loss, make_inputs(), True)
    assert_agree(results, truth)
    assert not log.fused
    assert log.materialized
    reasons = "|".join(log.materialized)
    assert any(option in reasons for option in reason.split("|")), reasons


@pytest.mark.parametrize("is_mixture", [False, True])
def test_numbers_that_nearly_cancel_in_bfloat16_are_as_exact_as_in_pytorch(is_mixture):
    plain, swapped, _ = make_pair(dtype=torch.bfloat16)
    plain_teacher, teacher, _ = make_teachers(torch.bfloat16)

    def loss(a, b):
        l, lt = a.log_softmax(-1), b.log_softmax(-1)
        if not is_mixture:
            return (l.exp() * torch.sub(l, lt, alpha=0.97)).sum(-1)
        lm = torch.logaddexp(l + math.log(0.5), lt + math.log(0.515))
        return (0.5 * l.exp() * (l - lm) + 0.5 * lt.exp() * (lt - lm)).sum(-1)

    def compute(student, teacher, x):
        with torch.no_grad():
            return loss(student(x), teacher(x.flip(1))).double()

    x = make_inputs(torch.bfloat16).x
    results = compute(swapped, teacher, x), compute(plain, plain_teacher, x)
    truth = compute(plain.double(), plain_teacher.double(), x.double())
    error, plain_error = ((result - truth).abs().mean() for result in results)
    assert error < 1.5 * plain_error


def test_boolean_alpha_raises_as_in_pytorch():
    _, swapped, _ = make_pair()
    _, teacher, _ = make_teachers()
    o = make_inputs()
    l, lt = swapped(o.x).log_softmax(-1), teacher(o.x).log_softmax(-1)
    with pytest.raises(RuntimeError, match="Boolean alpha"):
        torch.sub(l, lt, alpha=True)
