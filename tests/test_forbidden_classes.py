"""Classes that are forbidden by a logit of -inf, and probabilities of 0."""

import math

import pytest
import torch
import truth
from entry_points import (
    ENTRY_POINTS,
    REDUCTIONS,
    C,
    assert_close,
    assert_derivatives_match,
    draw_labels,
    draw_leaves,
    draw_probabilities,
    every_reduction,
    is_zero,
    make_class_weight,
    parametrize_entries,
)

import torch_nnmath.functional as F

pytestmark = pytest.mark.usefixtures("fixed_seed")


# a head forbids a class by its bias
every_forbidding_entry = parametrize_entries(
    {
        name: entry
        for name, entry in ENTRY_POINTS.items()
        if len(entry.shapes) == 1 or len(entry.shapes) == 3
    }
)


def forbid_class_0(entry, leaves):
    """Returns the leaves with -inf in the logits of class 0, or in the head's bias."""
    leaves = [x.detach().clone() for x in leaves]
    class_dim = entry.class_dim if len(leaves) == 1 else 0
    leaves[-1].select(class_dim, 0).fill_(-math.inf)
    return leaves


def select_class_0(entry, gradients):
    if len(gradients) == 1:
        return [gradients[0].select(entry.class_dim, 0)]
    return [d[0] for d in gradients[1:]]


@every_forbidding_entry
@pytest.mark.parametrize(
    "kind", ["indices", "weighted", "probabilities", "smoothed with weight 0 for class 0"]
)
def test_forbidden_class_matches_truth_without_the_class(entry, kind):
    leaves = forbid_class_0(entry, draw_leaves(entry.shapes))
    target = draw_labels(entry.batch).clamp(min=1)
    plain, options = target - 1, {}
    if kind == "weighted":
        options["weight"] = make_class_weight()
    if kind == "smoothed with weight 0 for class 0":
        weight = make_class_weight() * torch.tensor([0, 1, 1, 1])
        options = {"label_smoothing": 0.1, "weight": weight}
    if kind == "probabilities":
        target = draw_probabilities(entry)
        target.select(entry.class_dim, 0).fill_(0)
        plain = target.narrow(entry.class_dim, 1, C - 1)
    weight = options["weight"][1:] if "weight" in options else None

    for reduction in REDUCTIONS:

        def compute_loss(*leaves, reduction=reduction):
            return entry.compute_loss(leaves, target, reduction=reduction, **options)

        def compute_expected(*leaves, reduction=reduction):
            z = entry.compute_logits(*leaves).narrow(entry.class_dim, 1, C - 1)
            if "label_smoothing" not in options:
                return truth.cross_entropy(
                    z, plain, weight, reduction=reduction, class_dim=entry.class_dim
                )
            # the smoothed share is spread over all four classes, one of which weighs nothing
            s, l = 0.1, z.movedim(entry.class_dim, -1).log_softmax(-1)
            one_hot = (plain.unsqueeze(-1) == torch.arange(C - 1)).double()
            c = -(((1 - s) * one_hot + s / C) * weight * l).sum(-1)
            return truth.reduce_losses(c, reduction, (one_hot * weight).sum())

        assert_derivatives_match(compute_loss, compute_expected, leaves)
        loss = compute_loss(*[x.requires_grad_() for x in leaves])
        assert loss.isfinite().all()
        gradients = torch.autograd.grad(loss.sum(), leaves)
        assert all(map(is_zero, select_class_0(entry, gradients)))


@every_forbidding_entry
@pytest.mark.parametrize("kind", ["smoothed", "true class", "probabilities"])
def test_mass_on_a_forbidden_class_costs_infinity_and_no_gradient_is_nan(entry, kind):
    leaves = forbid_class_0(entry, draw_leaves(entry.shapes))
    leaves = [x.requires_grad_() for x in leaves]
    target = torch.full(entry.batch, 0 if kind == "true class" else 2)
    if kind == "probabilities":
        target = draw_probabilities(entry)
    label_smoothing = 0.1 if kind == "smoothed" else 0.0
    for reduction in REDUCTIONS:
        loss = entry.compute_loss(
            leaves, target, reduction=reduction, label_smoothing=label_smoothing
        )
        assert (loss == math.inf).all()
        assert not any(d.isnan().any() for d in torch.autograd.grad(loss.sum(), leaves))


@every_reduction
def test_single_allowed_class_costs_nothing(reduction):
    z = torch.full((3, C), -math.inf, dtype=torch.float64)
    z[:, 1] = 5.0
    z.requires_grad_()
    loss = F.cross_entropy(z, torch.ones(3, dtype=torch.long), reduction=reduction)
    loss.sum().backward()
    assert is_zero(loss)
    assert is_zero(z.grad)


@every_reduction
def test_categorical_cross_entropy_of_probability_0(reduction):
    """0 log 0 is 0; a true class of probability 0 costs infinity."""
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64).expand(3, C)
    for target, parts in ((t, t[0]), (torch.tensor([1, 1, 1]), torch.eye(C).double()[1])):
        loss = F.categorical_cross_entropy(p, target, reduction=reduction)
        n = 3 if reduction == "mean" else 1
        assert_close(loss.sum(), torch.tensor(math.log(2) * 3 / n, dtype=torch.float64))
        (d,) = torch.autograd.grad(loss.sum(), p)
        assert_close(d, (-parts / torch.tensor([1, 0.5, 0.5, 1]) / n).expand(3, C))
    loss = F.categorical_cross_entropy(p, torch.tensor([0, 0, 0]), reduction=reduction)
    assert (loss == math.inf).all()
