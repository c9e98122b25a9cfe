"""A model with a head, its swapped copy, and the comparison of the two.

The reference is the plain model in float64. In the tables of the tests, `z` are the logits, and `o`
is the namespace that `make_inputs` returns.
"""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder
from torch import nn

from torch_nnmath import swap
from torch_nnmath.deferred import MaterializedLogits

MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # Dynamo's
    pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args"),
]

F64, BF16 = torch.float64, torch.bfloat16
B, T, D, C = 2, 9, 3, 301  # examples, tokens, features, classes: no weight has as many as logits
IGNORED = -100


def make_params(table):
    """Returns a pytest param for each name, or tuple of names, of a table."""
    rows = [(name, name if isinstance(name, tuple) else (name,)) for name in table]
    return [pytest.param(*row, id="-".join(row)) for _, row in rows]


def seed(number):
    """`torch.manual_seed` of the CPU alone, without its stack traces for each other device."""
    torch.default_generator.manual_seed(number)


def run_seeded(function, *args):
    seed(5)
    return function(*args)


class Model(nn.Module):
    def __init__(self, bias=True, features=D, classes=C):
        super().__init__()
        self.body = nn.Linear(D, features)
        self.lm_head = nn.Linear(features, classes, bias=bias)

    def forward(self, x):
        return self.lm_head(self.body(x).tanh())


def make_pair(bias=True, dtype=F64, **sizes):
    """Returns a model with logits of about ±10, its swapped copy and the log of its head."""
    seed(0)
    plain = Model(bias, **sizes)
    nn.init.normal_(plain.lm_head.weight, std=4)
    plain = plain.to(dtype)
    swapped = copy.deepcopy(plain)
    return plain, swapped, swap(swapped).heads["lm_head"]


def make_inputs(dtype=F64, examples=B, tokens=T, classes=C, exact=False):
    """Returns features and everything that a loss may take besides logits.

    Those named in `learnt` require grad; each has a constant copy `fixed_...`. If `exact`, values
    that were rounded to `dtype` are float64.
    """
    g = torch.Generator().manual_seed(1)
    o = SimpleNamespace(learnt=["x", "row", "wide_row", "s", "narrow_s", "t", "narrow_t", "probs"])
    narrow, wide = (F64, F64) if dtype == F64 else (BF16, torch.float32)
    dtypes = {"wide_row": wide, "wide_t": wide, "narrow_t": narrow, "narrow_s": narrow}

    def add(name, *shape, transform=lambda x: x):
        for key in (name, "fixed_" + name):
            value = transform(torch.randn(shape, generator=g, dtype=F64))
            value = value.to(dtypes.get(name, dtype))
            value = value.to(F64 if exact else value.dtype)
            setattr(o, key, value.requires_grad_(key in o.learnt))

    def make_positive(x):
        return x.abs() + 0.5

    add("x", examples, tokens, D)
    add("row", classes)
    add("wide_row", classes, transform=lambda x: 60 + x)
    for name in ("s", "narrow_s"):
        add(name, transform=make_positive)
    for name in ("t", "wide_t", "narrow_t"):
        add(name, examples, tokens, 1, transform=make_positive)
    add("probs", examples, tokens, classes, transform=lambda x: x.softmax(-1))
    add("weight", classes, transform=make_positive)
    o.y = torch.randint(classes, (examples, tokens), generator=g)
    o.y[0, :3] = IGNORED
    o.all_y = o.y.clamp(min=0)
    return o


def compute_results(model, loss, o=None, backward=False):
    """Returns the loss of a model's logits, and the gradients of all tensors that require grad."""
    o = o or make_inputs()
    out = loss(model(o.x), o)
    leaves = [*model.parameters(), *(getattr(o, name) for name in o.learnt)]
    if not backward:
        return differentiate(out, leaves)
    for leaf in leaves:
        leaf.grad = None
    weigh(out).backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def weigh(out):
    """Returns the sum of a result's entries, each times a weight of its own."""
    weights = torch.linspace(1, 2, out.numel()).to(out.dtype).view(out.shape)
    return (out * weights).sum()


def differentiate(out, leaves):
    """Returns a result, and the gradients of a weighted sum of it."""
    gradients = [None] * len(leaves)
    if out.requires_grad:
        gradients = torch.autograd.grad(weigh(out), leaves, allow_unused=True)
    return [out.detach(), *gradients]


def make_teachers(dtype=F64, bias=True):
    """Returns a plain teacher, its swapped copy and the log of its head."""
    seed(3)
    plain, swapped = (Model(bias).to(dtype) for _ in range(2))
    nn.init.normal_(plain.lm_head.weight, std=3)
    swapped.load_state_dict(plain.state_dict())
    return plain, swapped, swap(swapped).heads["lm_head"]


def compute_divergence(student, teacher, loss, o, is_learnt=False):
    """Returns the loss of both models' logits, and the gradients of all tensors.

    The teacher's logits are made without gradient unless it is learnt.
    """
    with torch.set_grad_enabled(is_learnt):
        b = teacher(o.x.flip(1))
    leaves = [*student.parameters(), *teacher.parameters(), *(getattr(o, n) for n in o.learnt)]
    return differentiate(loss(student(o.x), b, o), leaves)


def assert_agree(results, truth, **tolerance):
    for result, expected in zip(results, truth, strict=True):
        assert (result is None) == (expected is None)
        if expected is not None:
            assert type(result) in (torch.Tensor, nn.Parameter)
            options = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True} | tolerance
            torch.testing.assert_close(result.detach(), expected.detach(), **options)


def assert_fused(log, losses=None):
    assert log.fused == losses if losses else log.fused
    assert not log.materialized


def assert_divergence_is_fused(loss, is_learnt=False, bias=True, counts=(1, 1)):
    """Asserts that both heads count the loss, that it agrees, and that no logits are made."""
    plain, swapped, log = make_pair(bias=bias)
    plain_teacher, teacher, teacher_log = make_teachers(bias=bias)
    truth = compute_divergence(plain, plain_teacher, loss, make_inputs(), is_learnt)
    o = make_inputs()
    with OperationRecorder() as recorder:
        results = compute_divergence(swapped, teacher, loss, o, is_learnt)
    assert_agree(results, truth, rtol=1e-9, atol=1e-10)
    assert_fused(log, counts[0])
    assert_fused(teacher_log, counts[1])
    assert_no_logits(recorder)


def assert_no_logits(recorder):
    """Asserts that no recorded operation made a tensor as large as the logits."""
    large = recorder.list_outputs(has_logits_shape)
    assert [line for line in large if not line.startswith("aten.expand.")] == []


def has_logits_shape(shape):
    """Whether a tensor has the entries of C classes for several tokens."""
    return math.prod(shape) > D * C and math.prod(shape) % C == 0


def collect_warnings(function):
    """Returns the `MaterializedLogits` warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [w for w in caught if w.category is MaterializedLogits]


def make_terms_of_jsd(a, b, beta=0.3, temperature=1.0):
    """Returns the terms of a Jensen-Shannon divergence as TRL's trainers write them."""
    l = F.log_softmax(a / temperature, dim=-1)
    lt = F.log_softmax(b / temperature, dim=-1)
    if beta == 0:
        return F.kl_div(l, lt, reduction="none", log_target=True)
    if beta == 1:
        return F.kl_div(lt, l, reduction="none", log_target=True)
    beta = torch.tensor(beta, dtype=l.dtype)
    lm = torch.logsumexp(torch.stack([l + torch.log1p(-beta), lt + torch.log(beta)]), dim=0)
    kl_teacher = F.kl_div(lm, lt, reduction="none", log_target=True)
    kl_student = F.kl_div(lm, l, reduction="none", log_target=True)
    return beta * kl_teacher + (1 - beta) * kl_student


def ce(z, y, **options):
    return F.cross_entropy(z.flatten(0, -2), y.flatten(), **options)
