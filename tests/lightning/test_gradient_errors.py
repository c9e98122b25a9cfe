"""GradientCheck: wrong gradients are detected, and located."""

import pytest
import torch
from lightning_models import (
    LIGHTNING_MARKS,
    Classifier,
    WrongIdentity,
    is_marked,
    make_loader,
    make_trainer,
    make_wrong_body,
)
from torch.nn import functional as F

import torch_nnmath
from torch_nnmath import formulas, nn

pytest.importorskip("lightning.pytorch")
from torch_nnmath.lightning import GradientCheck, GradientError, SwapFormulas
from torch_nnmath.lightning._comparison import Comparison
from torch_nnmath.lightning._numerical import bisect_segments
from torch_nnmath.lightning._replay import Segment

pytestmark = LIGHTNING_MARKS


def make_body(activation):
    return torch.nn.Sequential(torch.nn.Linear(12, 16), activation)


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_wrong_backward_of_the_user_raises_numerical_error(is_swapped, precision):
    model = Classifier(body=make_wrong_body())
    check = GradientCheck(1, entries=8)
    trainer = make_trainer(*[SwapFormulas()] * is_swapped, check, precision=precision)
    with pytest.raises(GradientError) as caught:
        trainer.fit(model, make_loader())
    error = caught.value
    assert error.parameter in ("body.0.weight", "body.0.bias")
    assert error.entry[0] % 2 == 1
    assert error.found == pytest.approx(1.5 * error.expected, rel=1e-4)
    assert error.step == 0
    assert check.errors["gradient_error/numerical"] > 1e-2
    assert check.errors["gradient_error/pytorch"] < 1e-1
    start = f"step 0: the gradient with respect to {error.parameter}[{error.entry[0]}"
    assert str(error).startswith(start)
    assert "numerical differentiation gives" in str(error)
    assert not is_marked(model)


class OneWrongEntry(torch.autograd.Function):
    """x Wᵀ, with the wrong sign in one entry of the weight's gradient, or in one of the input's."""

    @staticmethod
    def forward(ctx, x, W, is_in_weight):
        ctx.save_for_backward(x, W)
        ctx.is_in_weight = is_in_weight
        return x @ W.T

    @staticmethod
    def backward(ctx, dz):
        x, W = ctx.saved_tensors
        dx, dW = dz @ W, dz.T @ x
        if ctx.is_in_weight:
            dW[5, 7] *= -1
        else:
            dx[3, 4] *= -1
        return dx, dW, None


@pytest.mark.parametrize("is_in_weight", [True, False])
def test_one_wrong_entry_is_located_by_bisection(is_in_weight):
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16, 12))

        def forward(self, x):
            return OneWrongEntry.apply(x, self.weight, is_in_weight)

    body = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), Product())
    check = GradientCheck(1, parameters=1, entries=1)
    with pytest.raises(GradientError, match="numerical differentiation gives") as caught:
        make_trainer(check).fit(Classifier(body=body), make_loader())
    error = caught.value
    if is_in_weight:
        assert (error.parameter, error.entry) == ("body.2.weight", (5, 7))
        assert error.found == pytest.approx(-error.expected)
    else:
        assert error.parameter in ("body.0.weight", "body.0.bias")
        assert error.entry[0] == 4
    assert error.error > 1e-5


def test_bisection_reaches_every_entry_once():
    def reach(segments):
        halves = bisect_segments(segments)
        return [leaf for half in halves for leaf in reach(half)] if halves else [*segments]

    segments = [Segment("a", 0, 5), Segment("b", 2, 4), Segment("c", 0, 1)]
    entries = [Segment(s.parameter, i, i + 1) for s in segments for i in range(s.start, s.stop)]
    assert reach(segments) == entries


def test_error_of_a_direction_names_no_parameter():
    comparison = Comparison("numerical", "", (), 1.5, 1.0, 0.5, 1e-5)
    message = str(comparison)
    assert message.startswith("the derivative along a random direction in all parameters is 1.5, ")
    error = GradientError(message, 3, comparison)
    assert (error.step, error.parameter, error.entry, error.expected) == (3, "", (), 1.0)


def test_nan_or_infinite_gradient_raises_unless_both_have_it(monkeypatch):
    monkeypatch.setattr(WrongIdentity, "backward", staticmethod(lambda ctx, dx: dx / 0))
    with pytest.raises(GradientError, match="numerical differentiation gives"):
        make_trainer(GradientCheck(1)).fit(Classifier(body=make_wrong_body()), make_loader())
    trainer = make_trainer(GradientCheck(1, entries=0), max_steps=1)
    trainer.fit(Classifier(body=make_wrong_body()), make_loader())  # infinite in both
    monkeypatch.setattr(formulas.Tanh, "backward", staticmethod(lambda ctx, da: da * torch.nan))
    model = Classifier(body=make_body(torch.nn.Tanh()))
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        make_trainer(SwapFormulas(), GradientCheck(1, entries=0)).fit(model, make_loader())


def test_on_error_warn_warns_and_training_continues():
    model = Classifier(body=make_wrong_body())
    with pytest.warns(UserWarning, match="numerical differentiation gives") as caught:
        make_trainer(GradientCheck(2, entries=8, on_error="warn")).fit(model, make_loader())
    messages = [str(w.message) for w in caught if "numerical" in str(w.message)]
    assert [message.split(":")[0] for message in messages] == ["step 0", "step 2"]
    assert len(model.losses) == 4


def test_wrong_backward_of_a_formula_raises(monkeypatch):
    right = formulas.Tanh.backward
    monkeypatch.setattr(formulas.Tanh, "backward", staticmethod(lambda ctx, da: right(ctx, -da)))
    model = Classifier(body=make_body(torch.nn.Tanh()))
    with pytest.raises(GradientError, match="PyTorch's own operations give") as caught:
        make_trainer(SwapFormulas(), GradientCheck(1, entries=0)).fit(model, make_loader())
    assert caught.value.found == pytest.approx(-caught.value.expected, rel=1e-4)
    # of two comparisons the error names that which exceeds its tolerance more
    model = Classifier(body=make_body(torch.nn.Tanh()))
    with pytest.raises(GradientError, match="numerical differentiation gives"):
        make_trainer(SwapFormulas(), GradientCheck(1, entries=8)).fit(model, make_loader())
    # and without a swap, where the model has this library's module
    model = Classifier(body=make_body(nn.Tanh()))
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        make_trainer(GradientCheck(1, entries=0)).fit(model, make_loader())


def test_wrong_forward_of_a_module_is_detected_by_both_comparisons(monkeypatch):
    """Its gradient is that of its own forward, but PyTorch's module computes something else."""
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.tanh(1.5 * x))
    check = GradientCheck(4, parameters=2, entries=8, on_error="warn")
    with pytest.warns(UserWarning, match="relative error"):
        make_trainer(check).fit(Classifier(body=make_body(nn.Tanh())), make_loader())
    assert min(check.errors[f"gradient_error/{k}"] for k in ("pytorch", "numerical")) > 1e-2


def test_wrong_forward_of_a_loss_raises(monkeypatch):
    class WithLoss(Classifier):
        def __init__(self):
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

        def loss(self, batch):
            return self.criterion(self.head(self.body(batch[0])), batch[1])

    def wrong_forward(self, z, t):
        return 1.5 * F.cross_entropy(z, t)

    make_trainer(GradientCheck(1)).fit(WithLoss(), make_loader())
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", wrong_forward)
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        make_trainer(GradientCheck(1, entries=0)).fit(WithLoss(), make_loader())


def test_gradient_of_zeros_has_no_error_or_an_infinite_one(monkeypatch):
    class ZeroLoss(Classifier):
        def loss(self, batch):
            return 0 * super().loss(batch)

    def fit(**options):
        check = GradientCheck(1, parameters=9, **options)
        make_trainer(check).fit(ZeroLoss(body=make_body(nn.Tanh())), make_loader())
        return check.errors

    assert fit()["gradient_error/pytorch"] == fit()["gradient_error/numerical"] == 0
    ones = staticmethod(lambda ctx, da: torch.ones_like(da))
    monkeypatch.setattr(formulas.Tanh, "backward", ones)
    with pytest.raises(GradientError, match="relative error is inf"):
        fit(entries=0)


def test_class_derived_from_a_swapped_one_is_compared_with_pytorch(monkeypatch):
    right = formulas.Affine.backward
    wrong = staticmethod(lambda ctx, dz: right(ctx, 2 * dz))
    model = Classifier()
    torch_nnmath.swap(model, include="body.0", head=None)
    torch.nn.utils.parametrizations.weight_norm(model.body[0])
    make_trainer(check := GradientCheck(1, parameters=9)).fit(model, make_loader())
    assert check.errors["gradient_error/pytorch"] < 1e-3
    assert type(model.body[0]).__name__ == "ParametrizedLinear"
    monkeypatch.setattr(formulas.Affine, "backward", wrong)
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        make_trainer(GradientCheck(1, parameters=9, entries=0)).fit(model, make_loader())
