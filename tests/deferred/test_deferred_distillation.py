"""Distillation with two swapped models: random losses, types, changed operands, lifetimes, TRL."""

import ast
import copy
import gc
import importlib.util
import math
import random
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder, limit_head_blocks
from deferred_helpers import (
    BF16,
    F64,
    IGNORED,
    MARKS,
    B,
    C,
    T,
    assert_agree,
    assert_divergence_is_fused,
    assert_fused,
    assert_no_logits,
    compute_divergence,
    has_logits_shape,
    make_inputs,
    make_pair,
    make_params,
    make_teachers,
    make_terms_of_jsd,
)
from tolerance import compute_distance, get_rounding_tolerance
from torch.utils.checkpoint import checkpoint

from torch_nnmath import kernels

pytestmark = MARKS


def make_terms(a, b, direction="forward", form="log target"):
    l, lt = a.log_softmax(-1), b.log_softmax(-1)
    if direction == "reverse":
        l, lt = lt, l
    if form == "by hand":
        return lt.exp() * (lt - l)
    if form == "log target":
        return F.kl_div(l, lt, reduction="none", log_target=True)
    return F.kl_div(l, lt.exp(), reduction="none")


# Random losses


def make_random_loss(number):
    """Returns a divergence after random steps on logits and terms, with a random reduction."""
    r = random.Random(number)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(number)) > 0.4
    temperature = r.choice([1.0, 2.0, 0.7, torch.tensor(1.5, dtype=F64)])

    start, stop = r.choice([(0, 9), (1, 9), (2, -1), (0, -3)])
    steps = {
        "shift": lambda z, o: z[:, start:stop],
        "temperature": lambda z, o: z / temperature,
        "scale": lambda z, o: z * o.s,
        "row": lambda z, o: z + o.row,
        "two views": lambda z, o: z.transpose(0, 1).contiguous().transpose(0, 1),
        "copy": lambda z, o: z.clone().double(),
    }
    # operands that require grad come before views of a teacher without gradient
    names = ["row", "scale", "temperature", "shift", "two views", "copy"]
    before = sorted(r.sample(names, r.randint(0, 3)), key=names.index)
    kind = r.choice(["forward", "reverse", "jsd", "both", "difference"])
    form = r.choice(["log target", "target", "by hand"])
    beta = r.choice([0.1, 0.5, 0.77])
    after = r.choice(["nothing", "mask", "weights", "view", "factor", "sum with others"])
    reduction = r.choice(["classes", "all", "mean", "mean of classes", "kept"])

    def loss(a, b, o):
        for name in before:
            a, b = steps[name](a, o), steps[name](b, o)
        if kind == "jsd":
            terms = make_terms_of_jsd(a, b, beta)
        elif kind == "both":
            terms = make_terms(a, b, form=form) * 0.3 + make_terms(a, b, "reverse") / 2
        elif kind == "difference":
            terms = -make_terms(a, b, form=form) + make_terms_of_jsd(a, b, beta)
        else:
            terms = make_terms(a, b, kind, form)
        used = mask[:, : terms.shape[1]]
        if after == "mask":
            terms = terms[used]
        elif after == "weights":
            terms = terms * used[..., None] / o.t[:, : terms.shape[1]]
        elif after == "view":
            terms = terms.flatten(0, 1).unsqueeze(0)
        elif after == "factor":
            terms = o.s * terms * 0.7
        elif after == "sum with others":
            terms = terms[used] + terms[used].clone() * 2
        if reduction == "classes":
            return terms.sum(-1)
        if reduction == "kept":
            return terms.sum(dim=-1, keepdim=True)
        if reduction == "mean of classes":
            return terms.mean(-1)
        return terms.mean() if reduction == "mean" else terms.sum()

    return loss


@pytest.mark.parametrize("number", range(60))
def test_random_divergence_agrees_and_makes_no_logits(number):
    loss = make_random_loss(number)
    plain, swapped, log = make_pair(bias=number % 2 == 0)
    plain_teacher, teacher, teacher_log = make_teachers(bias=number % 3 == 0)
    is_learnt = number % 5 < 3
    truth = compute_divergence(plain, plain_teacher, loss, make_inputs(), is_learnt)
    o = make_inputs()
    with OperationRecorder() as recorder, limit_head_blocks():
        results = compute_divergence(swapped, teacher, loss, o, is_learnt)
    assert_agree(results, truth, rtol=1e-8, atol=1e-9)
    assert_fused(log, 1)
    assert_fused(teacher_log, 1)
    assert_no_logits(recorder)


# Types

LOSSES = {
    "forward": lambda a, b, o: make_terms(a, b).sum(-1),
    "reverse": lambda a, b, o: make_terms(a / 2, b / 2, "reverse").sum(),
    "probabilities": lambda a, b, o: make_terms(a * o.s, b, form="target").mean(),
    "JSD": lambda a, b, o: make_terms_of_jsd(a, b).sum(-1),
    "JSD in float32": lambda a, b, o: make_terms_of_jsd(a.float() / 2, b.float() / 2).sum(-1),
    "plain teacher": lambda a, b, o: make_terms(a, b.detach() + 0).sum(-1),
}


@pytest.mark.parametrize("region", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", make_params(LOSSES))
def test_error_of_divergence_is_at_most_a_rounding_more_than_the_plain_model(name, region):
    dtype = torch.float32 if region == "autocast" else getattr(torch, region)
    plain, swapped, log = make_pair(dtype=dtype)
    plain_teacher, teacher, _ = make_teachers(dtype)
    exact = [copy.deepcopy(model).double() for model in (plain, plain_teacher)]

    def run(student, teacher, is_exact=False):
        o = make_inputs(dtype, exact=is_exact)
        with torch.autocast("cpu", BF16, enabled=region == "autocast" and not is_exact):
            return compute_divergence(student, teacher, LOSSES[name], o, is_learnt=True)

    truth = run(*exact, is_exact=True)
    results, plain_results = run(swapped, teacher), run(plain, plain_teacher)
    limit = get_rounding_tolerance(BF16 if region == "autocast" else dtype) * 8
    for result, plain_result, expected in zip(results, plain_results, truth, strict=True):
        assert (result is None) == (expected is None)
        if expected is not None:
            assert (result.dtype, result.shape) == (plain_result.dtype, plain_result.shape)
            allowed = compute_distance(plain_result, expected)
            allowed += limit * compute_distance(expected, 0.0)
            assert math.isnan(allowed) or compute_distance(result, expected) <= allowed
            assert result.isfinite().all()
    assert_fused(log, 1)


def test_teacher_of_a_narrower_dtype_agrees():
    """Its probabilities are not rounded: the loss is closer to the truth than the plain one."""
    plain, swapped, log = make_pair(dtype=torch.float32)
    plain_teacher, teacher, teacher_log = make_teachers(BF16)
    exact = [copy.deepcopy(model).double() for model in (plain, plain_teacher)]

    def run(student, other, dtypes):
        x = make_inputs(torch.float32).fixed_x
        with torch.no_grad():
            b = other(x.to(BF16).to(dtypes[1]))
        loss = make_terms_of_jsd(student(x.to(dtypes[0])), b).sum()
        return [loss, *torch.autograd.grad(loss, [*student.parameters()])]

    results = run(swapped, teacher, (torch.float32, BF16))
    plain_results = run(plain, plain_teacher, (torch.float32, BF16))
    truth = run(*exact, (F64, F64))
    for result, plain_result, expected in zip(results, plain_results, truth, strict=True):
        assert (result.dtype, result.shape) == (plain_result.dtype, plain_result.shape)
        allowed = compute_distance(plain_result, expected)
        assert compute_distance(result, expected) <= allowed + 2**-9 * compute_distance(expected, 0)
    assert_fused(log, 1)
    assert_fused(teacher_log, 1)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_rounded_weights_of_a_mixture_are_those_of_its_divergence(dtype, alpha):
    """TRL rounds the weight in the mixture to the type, but not that of the interpolation."""
    (plain, swapped, log), (plain_teacher, teacher, _) = make_pair(), make_teachers()
    rounded = torch.tensor(alpha, dtype=dtype)
    values = []
    for student, other in ((plain, plain_teacher), (swapped.to(dtype), teacher.to(dtype))):
        x = make_inputs().fixed_x.to(dtype).to(student.lm_head.weight.dtype)
        with torch.no_grad():
            l, lt = student(x).log_softmax(-1), other(x).log_softmax(-1)
            weight = rounded if student is swapped else torch.tensor(alpha, dtype=F64)
            mixture = torch.stack([l + torch.log(1 - weight), lt + torch.log(weight)])
            terms = [
                F.kl_div(mixture.logsumexp(0), v, reduction="none", log_target=True)
                for v in (l, lt)
            ]
            values.append(torch.lerp(*terms, alpha).sum().double())
    torch.testing.assert_close(values[1], values[0], rtol=torch.finfo(dtype).eps * 8, atol=0)
    assert_fused(log, 1)


def test_mean_in_float16_has_no_intermediate_sum():
    """The sum exceeds the largest number of float16."""
    plain, swapped, log = make_pair(dtype=torch.float16)
    plain_teacher, teacher, _ = make_teachers(torch.float16)
    x = make_inputs(torch.float16, tokens=6000).fixed_x
    with torch.no_grad():
        terms = make_terms(swapped(x), teacher(x))
        assert terms.sum().isinf()
        truth = make_terms(plain.double()(x.double()), plain_teacher.double()(x.double())).mean()
        torch.testing.assert_close(terms.mean().double(), truth, rtol=1e-2, atol=0)
    assert_fused(log, 2)


# Operands that change, lifetimes


def test_terms_of_changed_weights_raise():
    _, swapped, _ = make_pair()
    _, teacher, _ = make_teachers()
    x = make_inputs().x
    for model in (swapped, teacher):
        terms = make_terms(swapped(x), teacher(x))
        kept = terms * 2
        terms.sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        with pytest.raises(RuntimeError, match="changed in place since"):
            kept.sum(-1)
        with pytest.raises(RuntimeError, match="changed in place since"):
            kept.square()


def test_terms_of_a_changed_plain_teacher_raise():
    _, swapped, _ = make_pair()
    x = make_inputs().fixed_x
    lt = torch.randn(B, T, C, dtype=F64).log_softmax(-1)
    terms = F.kl_div(swapped(x).log_softmax(-1), lt, reduction="none", log_target=True)
    lt.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since"):
        terms.sum(-1)


CHANGES = {
    "log-probabilities": lambda a, l, terms, mask: l.mul_(2),
    "logits": lambda a, l, terms, mask: a.mul_(3),
    "terms": lambda a, l, terms, mask: terms.mul_(3),
    "mask": lambda a, l, terms, mask: mask.fill_(True),
}


@pytest.mark.parametrize("name", make_params(CHANGES))
def test_terms_keep_their_values_if_an_operand_changes_in_place(name):
    plain, swapped, _ = make_pair()
    plain_teacher, teacher, _ = make_teachers()
    results = []
    for student, other in ((swapped, teacher), (plain, plain_teacher)):
        with torch.no_grad():
            a, b = student(make_inputs().x), other(make_inputs().x)
            mask = make_inputs().y != IGNORED
            l, lt = a.log_softmax(-1), b.log_softmax(-1)
            terms = lt.exp() * (lt - l) * mask[..., None]
            CHANGES[name](a, l, terms, mask)
            results.append([terms.sum(-1), terms[mask].sum(), l + 0, a + 0])
    assert_agree(*results)


def test_same_mask_after_a_change_is_another_mask():
    plain, swapped, _ = make_pair()
    results = []
    for model in (swapped, plain):
        z = model(make_inputs().x)
        mask = make_inputs().y.flatten() >= 100
        z = z.flatten(0, 1)
        p = z[mask].softmax(-1)
        mask.copy_(mask.roll(1))
        results.append([(p * z[mask].log_softmax(-1)).sum(-1)])
    assert_agree(*results)


def test_detached_terms_are_computed_before_an_optimizer_step():
    results = []
    (plain, swapped, _), (plain_teacher, teacher, _) = make_pair(), make_teachers()
    for student, other in ((swapped, teacher), (plain, plain_teacher)):
        x = make_inputs().fixed_x
        terms = make_terms(student(x), other(x))
        kept = terms.detach()
        loss = terms.sum()
        loss.backward()
        torch.optim.SGD(student.parameters(), 0.1).step()
        results.append([kept.sum(-1), loss.detach()])
    assert_agree(*results)


def test_terms_are_freed_without_garbage_collection():
    _, swapped, _ = make_pair()
    _, teacher, _ = make_teachers()
    x = make_inputs().x

    def make_references(reads):
        a, b = swapped(x), teacher(x)
        terms = make_terms_of_jsd(a, b)
        loss = terms.square().sum() if reads else terms.sum()
        loss.backward()
        return [weakref.ref(v) for v in (a, b, terms, loss, a.recipe, terms.recipe)]

    for reads in (False, True):
        make_references(reads)  # the first call may leave reference cycles of imports
        gc.disable()
        try:
            assert [r() for r in make_references(reads)] == [None] * 6
        finally:
            gc.enable()


@pytest.mark.parametrize("is_whole", [False, True], ids=["loss", "models and loss"])
def test_checkpoint_of_a_divergence_is_fused(is_whole):
    """The checkpoint detaches what each operation saves, also the stack of log-probabilities."""
    (plain, swapped, log), (plain_teacher, teacher, _) = make_pair(), make_teachers()

    def compute(student, other, x):
        return make_terms_of_jsd(student(x), other(x)).sum(-1)

    results = []
    for student, other in ((swapped, teacher), (plain, plain_teacher)):
        x = make_inputs().x
        if is_whole:
            out = checkpoint(compute, student, other, x, use_reentrant=False)
        else:
            logits = student(x), other(x)
            out = checkpoint(
                lambda a, b: make_terms_of_jsd(a, b).sum(-1), *logits, use_reentrant=False
            )
        leaves = [*student.parameters(), *other.parameters(), x]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert_agree(*results)
    assert_fused(log)


def test_terms_are_computed_once_if_they_are_read():
    (_, swapped, log), (_, teacher, teacher_log) = make_pair(), make_teachers()
    x = make_inputs().x
    terms = make_terms(swapped(x), teacher(x))
    with OperationRecorder() as recorder:
        terms.square().sum() + terms.abs().sum()
    assert sum("mm" in line for line in recorder.list_outputs(has_logits_shape)) == 2
    assert recorder.count(torch.ops.aten.exp.default) == 1
    assert sum(log.materialized.values()) == sum(teacher_log.materialized.values()) == 1
    assert [reason.split(" at ")[0] for reason in log.materialized] == ["pow"]


@pytest.fixture
def gradient_requests(monkeypatch):
    """Lists, for each call of the divergence's kernel, whether gradients were requested."""
    requests, original = [], kernels.divergence

    def divergence(*args):
        requests.append(list(args[-1]))
        return original(*args)

    monkeypatch.setattr(kernels, "divergence", divergence)
    return requests


def test_sum_of_all_terms_calls_the_kernel_once(gradient_requests):
    """Only the student's gradients are computed if the teacher is frozen."""
    (_, swapped, _), (_, teacher, _) = make_pair(), make_teachers()
    x = make_inputs().x
    mask = make_inputs().y != IGNORED
    with torch.no_grad():
        b = teacher(x)
    (make_terms_of_jsd(swapped(x), b)[mask].sum() / mask.sum()).backward()
    assert [sorted(needs) for needs in gradient_requests] == [[False] * 3 + [True] * 3]
    gradient_requests.clear()
    F.kl_div(swapped(x).log_softmax(-1), b.softmax(-1), reduction="batchmean").backward()
    assert gradient_requests == [[True] * 3 + [False] * 3]


def test_gradient_of_terms_after_their_sum_raises():
    (_, swapped, _), (_, teacher, _) = make_pair(), make_teachers()
    x = make_inputs().x
    terms = make_terms(swapped(x), teacher(x))
    loss = terms.sum()
    with pytest.raises(RuntimeError, match="loss was computed without them"):
        torch.autograd.grad(loss, terms)
    with pytest.raises(RuntimeError, match="after their loss was computed"):
        terms.register_hook(lambda gradient: None)


# Shapes


@pytest.mark.parametrize(
    "shape", ["one row", "no batch", "no rows", "one example", "classes first"]
)
def test_divergences_of_unusual_shapes_agree(shape):
    select = {
        "one row": lambda z: z[:1, :1],
        "no batch": lambda z: z[0, 0],
        "no rows": lambda z: z[:, :0],
        "one example": lambda z: z[:1],
        "classes first": lambda z: z.permute(2, 0, 1),
    }[shape]
    axis = 0 if shape == "classes first" else -1

    def loss(a, b, o):
        l, lt = select(a).log_softmax(axis), select(b).log_softmax(axis)
        terms = F.kl_div(l, lt, reduction="none", log_target=True)
        return terms.sum(axis).sum() + F.kl_div(l, lt.exp(), reduction="sum")

    (plain, swapped, log), (plain_teacher, teacher, _) = make_pair(), make_teachers()
    truth = compute_divergence(plain, plain_teacher, loss, make_inputs(), True)
    assert_agree(compute_divergence(swapped, teacher, loss, make_inputs(), True), truth)
    if shape != "no rows":
        assert_fused(log, 2)


WRONG = {
    "classes": lambda a, b: F.kl_div(a.log_softmax(-1), b[..., :-1].softmax(-1), reduction="sum"),
    "rows": lambda a, b: F.kl_div(a.log_softmax(-1), b[:, 1:].softmax(-1), reduction="sum"),
    "rows of a mixture": lambda a, b: torch.stack([a.log_softmax(-1), b[:, 1:].log_softmax(-1)]),
    "axis": lambda a, b: make_terms(a, b).sum(5),
    "axis twice": lambda a, b: make_terms(a, b).sum((2, -1)),
    "axis of log-probabilities": lambda a, b: a.log_softmax(-1).sum(5),
    "reduction": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="average"),
    "mask": lambda a, b: make_terms(a, b)[torch.ones(B, T + 1, dtype=torch.bool)],
    "argument": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), temperature=2.0),
}


@pytest.mark.parametrize("name", make_params(WRONG))
def test_wrong_divergences_raise_the_errors_of_pytorch(name):
    (plain, swapped, _), (plain_teacher, teacher, _) = make_pair(), make_teachers()
    x, errors = make_inputs().x, []
    for student, other in ((plain, plain_teacher), (swapped, teacher)):
        with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)) as caught:
            WRONG[name](student(x), other(x))
        errors.append(caught)
    assert errors[0].type is errors[1].type
    assert str(errors[0].value) == str(errors[1].value)


def test_kl_div_gives_the_warnings_of_pytorch():
    (_, swapped, _), (_, teacher, _) = make_pair(), make_teachers()
    x = make_inputs().x
    l, p = swapped(x).log_softmax(-1), teacher(x).softmax(-1)
    with pytest.warns(UserWarning, match="'batchmean' divides only by the batch size"):
        F.kl_div(l, p)


# TRL


def load_loss_of_trl():
    """Returns TRL's `generalized_jsd_loss` from its source, without the imports of its trainer."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TRL is not installed")
    path = Path(spec.submodule_search_locations[0]) / "experimental/gkd/gkd_trainer.py"
    (function,) = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss"
    )
    function.decorator_list = []
    namespace = {"torch": torch, "F": F}
    exec(compile(ast.unparse(function), str(path), "exec"), namespace)
    return namespace["generalized_jsd_loss"]


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"num_items_in_batch": 7}])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_loss_of_trl_is_fused(beta, options, reduction):
    loss_of_trl = load_loss_of_trl()

    def loss(a, b, o):
        return loss_of_trl(
            a[:, 1:-1, :], b[:, 1:-1, :], o.y[:, 2:], beta, reduction=reduction, **options
        )

    assert_divergence_is_fused(loss)
