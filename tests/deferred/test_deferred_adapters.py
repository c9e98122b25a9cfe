"""A head that is the sum of two, such as a Linear and its low-rank adapter."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder
from deferred_helpers import (
    BF16,
    F64,
    MARKS,
    C,
    D,
    assert_agree,
    ce,
    make_inputs,
    make_params,
    seed,
)
from torch import nn

from torch_nnmath import swap, unswap

pytestmark = MARKS
RANK = 2


class Adapter(nn.Module):
    """x W' + b + s (dropout(x) A' B' + c)."""

    def __init__(self, base, scaling=0.7, dropout=0.0, has_bias=False):
        super().__init__()
        like = {"dtype": next(base.parameters()).dtype}
        self.base = base
        self.down = nn.Linear(D, RANK, bias=False, **like)
        self.up = nn.Linear(RANK, C, bias=has_bias, **like)
        self.dropout, self.scaling = nn.Dropout(dropout), scaling

    def forward(self, x):
        result = self.base(x)
        x = self.dropout(x.to(self.down.weight.dtype))
        return (result + self.up(self.down(x)) * self.scaling).to(result.dtype)


class Model(nn.Module):
    def __init__(self, bias=True, dtype=F64, adapters=1, **options):
        super().__init__()
        seed(0)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.lm_head = nn.Linear(D, C, bias, dtype=dtype)
        nn.init.normal_(self.lm_head.weight, std=4)
        for _ in range(adapters):
            self.lm_head = Adapter(self.lm_head, **options)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return self.lm_head(self.body(x).tanh())


def make_learnt_scale():
    model = Model()
    model.lm_head.scaling = nn.Parameter(torch.tensor(-0.3, dtype=F64))
    return model


def make_frozen_base():
    """As with LoRA. Features without gradient, too."""
    model = Model()
    model.body.requires_grad_(False)
    model.lm_head.base.requires_grad_(False)
    return model


MODELS: dict[str, Any] = {
    "bias": Model,
    "no bias": lambda: Model(bias=False),
    "bias of the adapter": lambda: Model(bias=False, has_bias=True),
    "two biases": lambda: Model(has_bias=True, scaling=-3),
    "scale of 1": lambda: Model(scaling=1),
    "learnt scale": make_learnt_scale,
    "dropout": lambda: Model(dropout=0.4),
    "two adapters": lambda: Model(adapters=2),
    "frozen": make_frozen_base,
}


def make_pair(model):
    """Returns the model, its swapped copy and the logs of its heads."""
    swapped = copy.deepcopy(model)
    return model, swapped, list(swap(swapped).heads.values())


def count(logs, name):
    return sum(getattr(log, name) for log in logs)


def assert_fused(logs, losses):
    assert count(logs, "fused") == losses
    assert not any(log.materialized for log in logs)


def compute(model, loss, o=None):
    """The loss and the gradients of everything that requires one, always with the same dropout."""
    o = o or make_inputs()
    seed(5)
    out = loss(model(o.x), o)
    tensors = *model.parameters(), *(getattr(o, name) for name in o.learnt)
    leaves = [v for v in tensors if v.requires_grad]
    factors = torch.linspace(1, 2, out.numel()).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * factors).sum(), leaves, allow_unused=True)]


def has_logits_shape(shape):
    """Also not that of the concatenated weights."""
    return math.prod(shape) > 9 * C and math.prod(shape) % C == 0


def compute_many(z, o):
    l = (z[:, 1:] * o.s).log_softmax(-1)
    entropy = -(l.exp() * l).sum(-1)
    return ce(z, o.y, label_smoothing=0.1) + entropy + l.gather(-1, o.all_y[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", make_params(MODELS))
def test_losses_agree_in_every_parameter_and_make_no_logits(name):
    plain, swapped, logs = make_pair(MODELS[name]())
    for loss, losses in ((lambda z, o: ce(z, o.y), 1), (compute_many, 3)):
        fused_before, o = count(logs, "fused"), make_inputs()
        with OperationRecorder() as recorder:
            results = compute(swapped, loss, o)
        assert not recorder.list_outputs(has_logits_shape)
        assert_agree(results, compute(plain, loss))
        assert_fused(logs, fused_before + losses)


LOSSES: dict[str, Any] = {
    "row of both": lambda z, o: ce(z + o.row, o.y),
    "cap of both": lambda z, o: ce(3 * torch.tanh(z / 3), o.y),
    "shift": lambda z, o: F.cross_entropy(z[:, :-1].mT, o.y[:, 1:]),
    "logsumexp": lambda z, o: z.logsumexp(-1),
}
UNFUSED: dict[str, Any] = {
    "read": lambda z, o: z.cos().mean(-1),
    "loss and read": lambda z, o: ce(z, o.y) + z.cos().mean(),
    "in place": lambda z, o: ce(z.mul_(2), o.y),
}


@pytest.mark.parametrize("name", make_params(LOSSES | UNFUSED))
def test_uses_of_the_sum_agree(name):
    plain, swapped, logs = make_pair(Model())
    loss = (LOSSES | UNFUSED)[name]
    assert_agree(compute(swapped, loss), compute(plain, loss))
    assert bool(count(logs, "fused")) == (name in LOSSES or name == "loss and read")
    assert any(log.materialized for log in logs) == (name in UNFUSED)


def test_reductions_equal_the_logits():
    _, swapped, _ = make_pair(Model())
    z = swapped(make_inputs().x)
    largest, classes = z.max(-1)
    assert torch.equal(largest, (z + 0).amax(-1))
    assert torch.equal(classes, (z + 0).argmax(-1))


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def add_with_hook(z, v):
    z.register_hook(lambda g: 2 * g)
    return z + v


SUMS_OF_PLAIN: dict[str, Any] = {
    "a hook": add_with_hook,
    "a Function": lambda z, v: Tripled.apply(z) + v,
    "a cap": lambda z, v: torch.tanh(z / 3) + v,
    "a cap of the adapter": lambda z, v: z + v.tanh(),
    "probabilities": lambda z, v: z.softmax(-1) + v.log_softmax(-1),
    "alpha": lambda z, v: torch.add(z, v, alpha=2),
    "other rows": lambda z, v: z[:, :1] + v,
    "in place": lambda z, v: z.clone().add_(v),
    "difference": lambda z, v: z - v,
    "the same logits": lambda z, v: z + z * 0.5,
    "a plain tensor": lambda z, v: z + v.cos(),
}
SUMS: dict[str, Any] = {
    "function": lambda z, v: torch.add(z, v),
    "method": lambda z, v: v.add(z),
    "other order": lambda z, v: v + z,
    "rows": lambda z, v: z[:, 2:].flatten(0, 1) + v[:, 2:].flatten(0, 1),
    "scales": lambda z, v: -2 * z + v / 0.3,
    "a row": lambda z, v: (z + torch.linspace(-1, 1, C, dtype=F64)) * 2 + v,
    "a scale for each row": lambda z, v: z + v * torch.linspace(0.5, 1, 9, dtype=F64)[:, None],
    "classes before the last axis": lambda z, v: (z.mT + v.mT).mT,
}


@pytest.mark.parametrize("name", make_params(SUMS | SUMS_OF_PLAIN))
def test_sums_of_other_terms_agree(name):
    def loss(z, o):
        z = (SUMS | SUMS_OF_PLAIN)[name](*z)
        return ce(z, o.y[:, -z.shape[1] :] if z.dim() == 3 else o.y[:, 2:])

    class Terms(Model):
        def forward(self, x):
            h = self.body(x).tanh()
            return self.lm_head.base(h), self.lm_head.up(self.lm_head.down(h))

    plain, swapped, logs = make_pair(Terms())
    assert_agree(compute(swapped, loss), compute(plain, loss))
    is_fused = name in SUMS and not name.startswith("classes before")
    assert any(log.materialized for log in logs) != is_fused
    assert bool(count(logs, "fused")) == is_fused


def test_half_precision_base_with_a_float32_adapter_is_fused():
    """PEFT keeps adapters in float32, and rounds the sum to the type of the base's logits."""
    model = Model(dtype=BF16)
    model.lm_head.down.float()
    model.lm_head.up.float()
    plain, swapped, logs = make_pair(model)
    o = make_inputs(BF16)
    results = compute(swapped, lambda z, o: ce(z, o.y), o)
    truth = compute(
        copy.deepcopy(plain).double(), lambda z, o: ce(z, o.y), make_inputs(BF16, exact=True)
    )
    expected = compute(plain, lambda z, o: ce(z, o.y), o)
    assert_fused(logs, 1)
    for result, plain_result, exact in zip(results, expected, truth, strict=True):
        if exact is not None:
            assert result.dtype == plain_result.dtype
            errors = [(v.double() - exact).abs().max() for v in (result, plain_result)]
            assert errors[0] <= errors[1] + 2.0**-8 * exact.abs().max()


def test_autocast_rounds_the_operands_of_both_terms():
    plain, swapped, logs = make_pair(Model(dtype=torch.float32))
    o = make_inputs(torch.float32)

    def loss(z, o):
        return ce(z.float(), o.y)

    with torch.autocast("cpu", BF16):
        results, expected = compute(swapped, loss, o), compute(plain, loss, o)
    assert_fused(logs, 1)
    exact = compute(copy.deepcopy(plain).double(), loss, make_inputs(torch.float32, exact=True))
    for result, plain_result, truth in zip(results, expected, exact, strict=True):
        if truth is not None:
            assert result.dtype == plain_result.dtype
            errors = [(v.double() - truth).abs().max() for v in (result, plain_result)]
            assert errors[0] <= 1.5 * errors[1] + 1e-3 * truth.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_needs_no_logits(mode):
    plain, swapped, logs = make_pair(Model())
    o = make_inputs()
    with mode():
        results = [(ce(z, o.y), z.argmax(-1)) for z in (model(o.x) for model in (plain, swapped))]
    torch.testing.assert_close(*results)
    assert_fused(logs, 1)
    assert count(logs, "reduced") == 1


def test_second_order_agrees():
    plain, swapped, logs = make_pair(Model())
    x, y = make_inputs().fixed_x, make_inputs().y

    def differentiate_twice(model):
        parameters = [*model.parameters()]
        first = torch.autograd.grad(ce(model(x), y), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    assert_agree(differentiate_twice(swapped), differentiate_twice(plain))
    assert_fused(logs, 1)


def test_gradient_of_a_bypassed_term_raises():
    _, swapped, _ = make_pair(Model())
    head, o = swapped.lm_head, make_inputs()
    z = head.base(o.x)
    loss = ce(z + head.up(head.down(o.x)), o.y)
    with pytest.raises(RuntimeError, match="gradient of the logits"):
        torch.autograd.grad(loss, z)


def test_step_of_an_optimizer_changes_no_sum_that_is_alive():
    plain, swapped, _ = make_pair(Model())
    o, logits = make_inputs(), []
    for model in (plain, swapped):
        z = model(o.x)
        ce(z, o.y).backward()
        kept = z.detach()
        torch.optim.SGD(model.parameters(), 0.1).step()
        logits.append(kept + 0)
    torch.testing.assert_close(*logits)


def test_compiled_model_is_fused():
    plain, swapped, logs = make_pair(Model())
    compiled = torch.compile(swapped, backend="aot_eager")
    o = make_inputs()
    gradients = []
    for model in (plain, compiled):
        loss = ce(model(o.x), o.y)
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    assert_agree(*gradients)
    assert_fused(logs, 1)
    torch._dynamo.reset()


# Which Linears are heads


def test_heads_of_an_adapter_are_its_linears_with_the_most_outputs():
    model = Model()
    report = swap(model)
    assert list(report.heads) == ["lm_head.base", "lm_head.up"]
    assert not report.left
    unswap(model)
    named = swap(model, head="lm_head")
    assert list(named.heads) == ["lm_head.base", "lm_head.up"]
    assert all(log.is_named for log in named.heads.values())


def test_second_swap_finds_an_adapter_that_was_added_since():
    model = Model(adapters=0)
    first = swap(model)
    model.lm_head = Adapter(model.lm_head)
    second = swap(model)
    assert list(first.heads) == ["lm_head"]
    assert list(second.heads) == ["lm_head.base", "lm_head.up"]
    assert second.heads["lm_head.base"] is first.heads["lm_head"]
    o = make_inputs()
    ce(model(o.x), o.y).backward()
    assert_fused(second.heads.values(), 1)


def test_adapter_of_few_classes_stays_plain_like_its_base(monkeypatch):
    monkeypatch.setattr("torch_nnmath.deferred.logits.MIN_CLASSES_PER_FEATURE", C)
    assert list(swap(Model()).heads) == ["lm_head.base"]
    assert list(swap(Model(), head="lm_head").heads) == ["lm_head.base", "lm_head.up"]


def test_output_embedding_without_linear_is_left():
    model = Model()
    model.lm_head = nn.Sequential(nn.Bilinear(2, 2, 2))
    assert "is not a torch.nn.Linear" in swap(model).left["lm_head"]
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Linear"):
        swap(model, head="lm_head")
