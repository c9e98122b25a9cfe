"""Reductions such as `argmax` of deferred logits, which are computed block by block."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder, limit_head_blocks
from deferred_helpers import (
    F64,
    MARKS,
    C,
    assert_agree,
    ce,
    compute_results,
    has_logits_shape,
    make_inputs,
    make_pair,
    make_params,
    seed,
)
from torch import nn

from torch_nnmath import swap

pytestmark = MARKS

BLOCK_ROWS = 32
TOKENS = 50  # 100 rows, in four blocks

# The step before the reduction, and the axis of the classes after it
STEPS: dict[str, tuple[Any, int]] = {
    "none": (lambda z, o: z, -1),
    "flattened": (lambda z, o: z.flatten(0, 1), 1),
    "moved": (lambda z, o: z.mT, 1),
    "shifted": (lambda z, o: z[:, :-1], 2),
    "masked": (lambda z, o: z[o.y >= 0], -1),
    "split": (lambda z, o: z.split(30, 1)[1], -1),
    "one row": (lambda z, o: z[1, 7], 0),
    "cast": (lambda z, o: z.to(torch.promote_types(z.dtype, torch.float32)), -1),
    "scaled": (lambda z, o: z / 1.7, -1),
    "negated": (lambda z, o: -z, -1),
    "scaled by a parameter": (lambda z, o: z * o.s, -1),
    "a row added": (lambda z, o: (o.row + z).mT, 1),
    "a column added": (lambda z, o: z.mT + o.row[:, None], 1),
    "capped": (lambda z, o: 3 * torch.tanh(z / 3), -1),
    "logarithms": (lambda z, o: z.mT.log_softmax(1), 1),
    "negated logarithms": (lambda z, o: -z.log_softmax(-1), -1),
    "detached": (lambda z, o: z.detach(), -1),
    "data": (lambda z, o: z.data, -1),
}
REDUCTIONS: dict[str, Any] = {
    "argmax": lambda z, d, i: z.argmax(d),
    "argmax, function": lambda z, d, i: torch.argmax(z, dim=d, keepdim=True),
    "argmin": lambda z, d, i: z.argmin(d),
    "max": lambda z, d, i: z.max(d),
    "max, function": lambda z, d, i: torch.max(z, d, keepdim=True),
    "max, indices": lambda z, d, i: torch.max(z, dim=d)[1],
    "min": lambda z, d, i: z.min(d),
    "topk": lambda z, d, i: z.topk(5, d),
    "topk, smallest": lambda z, d, i: torch.topk(z, 3, dim=d, largest=False),
    "gather": lambda z, d, i: z.gather(d, i),
    "sum": lambda z, d, i: z.sum(d),
    "mean": lambda z, d, i: z.mean(d, keepdim=True),
    "sum of all": lambda z, d, i: z.sum(),
    "mean of all": lambda z, d, i: z.mean(),
    "mean of all, in float64": lambda z, d, i: torch.mean(z, dtype=F64),
    "sum of all axes": lambda z, d, i: z.sum(tuple(range(z.dim())), keepdim=True),
}
SUMS = [name for name in REDUCTIONS if name.startswith(("sum", "mean"))]


def is_larger_than_a_block(shape):
    return has_logits_shape(shape) and math.prod(shape) > BLOCK_ROWS * C


def make_classes(z, axis):
    """Returns some classes of each row."""
    shape = [4 if d == axis % z.dim() else size for d, size in enumerate(z.shape)]
    return torch.arange(math.prod(shape)).view(shape) * 7 % C


def compute_reduction(model, step, reduction, o):
    """Returns the type of the result, its tensors, and their gradients if they have any."""
    apply, axis = STEPS[step]
    z = apply(model(o.x), o)
    out = REDUCTIONS[reduction](z, axis, make_classes(z, axis))
    tensors = [out] if isinstance(out, torch.Tensor) else [*out]
    gradients = []
    if tensors[0].requires_grad:
        factors = torch.linspace(1, 2, tensors[0].numel()).view(tensors[0].shape)
        leaves = [*model.parameters(), o.x, o.row, o.s]
        total = (tensors[0] * factors).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return type(out), tensors, gradients


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_reductions_agree_without_logits(step, dtype, mode):
    """The values are those of plain logits, rounded as often: bfloat16 has many equal ones."""
    for reduction in REDUCTIONS:
        plain, swapped, log = make_pair(dtype=dtype)
        o = make_inputs(dtype, tokens=TOKENS)
        with mode():
            kind, expected, expected_gradients = compute_reduction(plain, step, reduction, o)
            with limit_head_blocks(), OperationRecorder() as recorder:
                result_kind, result, gradients = compute_reduction(swapped, step, reduction, o)
        assert result_kind is kind
        is_sum = reduction in SUMS
        tolerance = 1e-10 if dtype == F64 else 2e-2 if is_sum else 0
        for value, other in zip(result, expected, strict=True):
            assert type(value) is torch.Tensor
            assert value.stride() == other.stride()
            assert value.is_inference() == other.is_inference()
            assert value.requires_grad == other.requires_grad
            options = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(value.detach(), other.detach(), **options)
        if dtype == F64:
            assert_agree(gradients, expected_gradients)
        assert log.reduced + log.fused == 1
        if not gradients:
            large = recorder.list_outputs(is_larger_than_a_block)
            assert large == [], reduction
            assert not log.materialized


def test_first_of_equal_logits_is_the_class_in_every_block():
    head = nn.Linear(1, C, bias=False, dtype=F64)
    head.weight.data.copy_(torch.arange(C)[:, None].remainder(3) == 1)  # 1 for classes 1, 4, ...
    swap(head)
    x = torch.tensor([1.0, 0.0, -1.0, math.nan] * 25, dtype=F64)[:, None]
    with limit_head_blocks(), torch.no_grad():
        z = head(x)
        expected = torch.tensor([1, 0, 0, 0] * 25)
        assert z.argmax(1).equal(expected)
        values, indices = z.max(1)
        assert indices.equal(expected)
        torch.testing.assert_close(
            values, torch.tensor([1, 0, 0, math.nan] * 25, dtype=F64), equal_nan=True
        )


def test_token_accuracy_in_training_needs_no_logits():
    plain, swapped, log = make_pair()

    def loss(z, o):
        accuracy = (z.detach().argmax(-1) == o.y).double().mean()
        _, predicted = torch.max(z, -1)
        top = (z.topk(5).indices == o.y[..., None]).any(-1).double().mean()
        return ce(z, o.y) + accuracy + top + (predicted == o.y).double().mean()

    assert_agree(compute_results(swapped, loss), compute_results(plain, loss))
    assert (log.fused, log.reduced) == (1, 3)
    assert not log.materialized
    assert "computed 3 x from blocks of logits" in repr(log)


ORDINARY: dict[str, Any] = {
    "flattened argmax": lambda z, o: z.argmax(),
    "argmax over rows": lambda z, o: z.argmax(1),
    "max of all": lambda z, o: z.max(),
    "max over rows": lambda z, o: z.max(0)[0],
    "max of two": lambda z, o: torch.max(z, 2 * z),
    "topk over rows": lambda z, o: z.topk(1, 1)[0],
    "topk of many": lambda z, o: z.topk(C // 4)[0],
    "amax": lambda z, o: z.amax(-1),
    "sum over rows": lambda z, o: z.sum(1),
    "gather of many": lambda z, o: z.gather(-1, o.all_y[..., None].repeat(1, 1, C // 4)),
    "gather over rows": lambda z, o: z.gather(1, o.all_y[..., None] % 9),
    "sum of integers": lambda z, o: z.detach().sum(dtype=torch.int64),
    "after temperatures, no bias": lambda z, o: (z / o.t).argmax(-1),
}


@pytest.mark.parametrize("name", make_params(ORDINARY))
def test_other_reductions_agree_with_logits(name):
    plain, swapped, log = make_pair(bias="no bias" not in name)
    o = make_inputs()
    assert_agree([ORDINARY[name](swapped(o.x), o)], [ORDINARY[name](plain(o.x), o)])
    assert log.reduced == 0
    assert log.materialized.total() == 1


INVALID: dict[str, Any] = {
    "an axis": lambda z: z.argmax(3),
    "an axis of max": lambda z: torch.max(z, -4),
    "k": lambda z: z.topk(C + 1),
    "an axis of topk": lambda z: z.topk(2, 5),
    "classes": lambda z: z.gather(-1, torch.full((2, 9, 2), C)),
    "negative classes": lambda z: z.gather(-1, torch.full((2, 9, 2), -1)),
    "axes of an index": lambda z: z.gather(-1, torch.zeros(9, 2, dtype=torch.int64)),
    "type of an index": lambda z: z.gather(-1, torch.zeros(2, 9, 2)),
    "an axis twice": lambda z: z.sum((2, -1)),
}


@pytest.mark.parametrize("name", make_params(INVALID))
def test_invalid_reduction_raises_as_pytorch_does(name):
    errors = []
    for model in make_pair()[:2]:
        if name == "an axis of topk" and torch.__version__ < "2.13":
            pytest.skip("PyTorch up to 2.12 asserts the axis of meta tensors")
        with pytest.raises((RuntimeError, IndexError)) as raised:
            INVALID[name](model(make_inputs().x))
        errors.append(raised.type)
    assert errors[0] is errors[1]


def test_reduction_after_the_logits_were_computed_reads_them():
    plain, swapped, log = make_pair()
    x = make_inputs().x
    z, expected = swapped(x), plain(x).argmax(-1)
    z.exp()
    with OperationRecorder() as recorder:
        assert z.argmax(-1).equal(expected)
    assert not any("mm" in name for name in recorder.names)
    assert log.reduced == 0


@pytest.mark.parametrize("step", ["none", "shifted", "moved", "masked", "capped", "cast"])
@pytest.mark.parametrize("is_inference", [True, False])
@pytest.mark.parametrize("detach", [lambda z: z, lambda z: z.detach().detach()])
def test_selected_logits_equal_those_that_are_computed_later(step, is_inference, detach):
    """A product of other rows may be rounded differently: then no logit equals the largest one."""
    seed(0)
    head = nn.Sequential(nn.Linear(3, 200), nn.Linear(200, C))
    swap(head)
    o = make_inputs(torch.float32, tokens=TOKENS)
    apply, axis = STEPS[step]
    with torch.inference_mode(is_inference), torch.no_grad(), limit_head_blocks():
        z = head(o.x)
        v = apply(z, o)
        y = v.argmax(axis, keepdim=True) * 7 % C
        gathered = detach(v).gather(axis, y)
        index = y.clone()
        y.zero_()
        largest = detach(v).max(axis, keepdim=True).values
        top = detach(v).topk(3, axis).values
        assert ((v == largest).sum(axis) == 1).all()
        assert ((v >= top.amin(axis, keepdim=True)).sum(axis) == 3).all()
        assert (v.gather(axis, index) == gathered).all()
        if step == "shifted":  # its logits share memory with all others
            assert (z[:, :-1] == v).all()
        torch.testing.assert_close(v + 0, apply(head(o.x) + 0, o))


def compute_log_probabilities(z, labels):
    """As trainers do to save memory: the log-sum-exp of one example at a time."""
    selected = z.gather(-1, labels.unsqueeze(-1))
    log_sum_exp = torch.stack([row.logsumexp(-1) for row in z])
    return (selected - log_sum_exp.unsqueeze(-1)).squeeze(-1)


def test_preference_loss_and_its_metrics_need_no_logits():
    results = []
    plain, swapped, log = make_pair()
    for model in (plain, swapped):
        o = make_inputs(examples=4)
        z, mask = model(o.x), o.all_y[:, 1:] % 3 > 0
        log_probs = compute_log_probabilities(z[:, :-1], o.all_y[:, 1:])
        totals = (log_probs * mask).sum(-1) / mask.sum(-1)
        chosen = z[:2, :-1].contiguous().view(-1, C)
        odds = totals[:2] - totals[2:] - (-totals[:2].expm1()).log() + (-totals[2:].expm1()).log()
        loss = F.cross_entropy(chosen, o.all_y[:2, 1:].flatten()) - F.logsigmoid(odds).mean()
        loss.backward()
        metrics = [z[:2].detach().mean(), z[2:, :-1].detach().mean()]
        metrics += [z[:, :-1][mask].mean(-1).sum().detach(), z[2:].argmax(-1).double()]
        results.append([loss, *metrics, *(p.grad for p in model.parameters())])
    assert_agree(*results)
    assert log.reduced == 4
    assert not log.materialized


def test_reduction_of_observed_logits_keeps_their_gradient():
    results = []
    for model in make_pair()[:2]:
        z = model(make_inputs().x)
        z.retain_grad()
        z.max(-1).values.sum().backward()
        results.append([z.grad])
    assert_agree(*results)


def test_reduction_after_an_optimizer_step_raises():
    _, swapped, _ = make_pair()
    z = swapped(make_inputs().x)
    z.max(-1).values.sum().backward()
    torch.optim.SGD(swapped.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="changed in place since"):
        z.argmax(-1)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "trace"])
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_reductions_under_transforms_agree(transform):
    def compute(model):
        o = make_inputs()
        z = model(o.x)
        scales = torch.tensor([0.5, 2.0], dtype=F64)
        if transform == "vmap":
            return torch.vmap(lambda s: (z.max(-1).values, (z * s).argmax(-1)))(scales)
        if transform == "grad":
            return torch.func.grad(lambda v: v.max(-1).values.sum())(z), z.argmax(-1)
        if transform == "jvp":
            return torch.func.jvp(lambda v: v.amax(-1), (z,), (o.probs.detach(),))
        return torch.jit.trace(lambda v: v.argmax(-1), (z,))(2 * o.probs), z.argmax(-1)

    plain, swapped, _ = make_pair()
    assert_agree(compute(swapped), compute(plain))


# Logits that left the graph


def train(model, o, detach, run):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    kept = []

    def closure():
        optimizer.zero_grad()
        z = model(o.x)
        loss = ce(z, o.y)
        loss.backward()
        kept.append(detach(z)[:, 1:])
        return loss

    for _ in range(3):
        run(optimizer, closure)
    return [z + 0 for z in kept]


DETACHERS = {"detach": lambda z: z.detach(), "function": torch.detach, "data": lambda z: z.data}
RUNS = {
    "step": lambda optimizer, closure: (closure(), optimizer.step()),
    "closure": lambda optimizer, closure: optimizer.step(closure),
    "closure by name": lambda optimizer, closure: optimizer.step(closure=closure),
}


@pytest.mark.parametrize(("detach", "run"), [*itertools.product(DETACHERS, RUNS)])
def test_detached_logits_keep_their_values_after_an_optimizer_step(detach, run):
    plain, swapped, log = make_pair()
    results = [train(m, make_inputs(), DETACHERS[detach], RUNS[run]) for m in (swapped, plain)]
    assert_agree(*results)
    assert (results[0][0] - results[0][2]).abs().max() > 0.1
    assert log.fused == 3
    (reason,) = log.materialized
    assert reason.startswith("detach, whose result an optimizer's step would invalidate, at ")


def test_detached_logits_that_are_gone_are_not_computed():
    _, swapped, log = make_pair()
    o = make_inputs()
    optimizer = torch.optim.SGD(swapped.parameters(), 0.5)
    for _ in range(2):
        z = swapped(o.x)
        ce(z, o.y).backward()
        assert z.detach().mean().isfinite()
        optimizer.step()
    other = torch.optim.SGD([o.x], 0.5)  # does not change the head
    z = swapped(o.x.detach())
    d = z.detach()
    o.x.grad = torch.ones_like(o.x)
    other.step()
    assert d.argmax(-1).shape == o.y.shape
    assert (log.fused, log.reduced) == (2, 3)
    assert not log.materialized


LEAF_USES: dict[str, Any] = {
    "loss": lambda z, y: F.cross_entropy(z, y),
    "a step": lambda z, y: F.cross_entropy(3 * torch.tanh(z[1:] / 3), y[1:]),
    "a second term": lambda z, y: F.cross_entropy(z, y) + z.square().mean(),
    "max": lambda z, y: z.max(-1).values.sum(),
    "log-probability": lambda z, y: z.log_softmax(-1).gather(-1, y.clamp(0)[:, None]).mean(),
    "logsumexp": lambda z, y: z.logsumexp(-1).sum(),
}


@pytest.mark.parametrize("made", ["no_grad", "detach"])
@pytest.mark.parametrize("name", make_params(LEAF_USES))
def test_logits_made_a_leaf_get_the_plain_gradient(name, made):
    results = []
    for model in make_pair()[:2]:
        o = make_inputs()
        with torch.set_grad_enabled(made == "detach"):
            z = model(o.x.flatten(0, 1))
        z = (z if made == "no_grad" else z.detach()).requires_grad_()
        loss = LEAF_USES[name](z, o.y.flatten())
        loss.backward()
        results.append([loss, z.grad])
        assert o.x.grad is None
    assert_agree(*results)


def test_c_functions_that_read_memory_raise():
    _, swapped, _ = make_pair()
    z = swapped(make_inputs().x).detach()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(z)
    assert F.softmax(z, -1).sum(-1).allclose(torch.ones((), dtype=F64))
