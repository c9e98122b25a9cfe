"""Which Linear `swap` makes the head, and what the report says of it."""

import pytest
import torch
from swapping_helpers import (
    Everything,
    Subclass,
    changed_names,
    list_types,
    make_patched_linear,
    make_small,
    needs_deferral_in_compiled_models,
)
from torch import nn

import torch_nnmath
from torch_nnmath import swap, unswap
from torch_nnmath.deferred import DeferredLogits, get_mark

pytestmark = pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")


@pytest.fixture
def small():
    return make_small()


def head_names(report):
    return list(report.heads)


class DeclaredOutput(nn.Module):
    """Its output embedding is not its last Linear."""

    def __init__(self, output="lm_head"):
        super().__init__()
        self.lm_head, self.body = nn.Linear(4, 9), nn.Linear(4, 4)
        self.output = output

    def get_output_embeddings(self):
        return getattr(self, self.output) if self.output else None

    def forward(self, x):
        return self.lm_head(self.body(x))


class DeclaredOutputNeedsArgument(DeclaredOutput):
    def get_output_embeddings(self, name):
        return self.lm_head


class NoDeclaredOutput(DeclaredOutput):
    def get_output_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), ["2"]),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), Subclass(3, 2)),
            [],
        ),  # the last has a class of its own
        (lambda: nn.Linear(4, 3), [""]),
        (lambda: nn.Sequential(nn.ReLU()), []),
        (Everything, ["gate.linear"]),  # the loss reads its own Linear without calling it
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1)), ["0"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), torch_nnmath.nn.Feedforward([4, 4])), ["0"]),
        (DeclaredOutput, ["lm_head"]),
        (lambda: nn.ModuleDict({"a": DeclaredOutput(), "b": nn.Linear(4, 3)}), ["a.lm_head"]),
        (
            lambda: nn.ModuleList([DeclaredOutput(), DeclaredOutput("body")]),
            ["0.lm_head", "1.body"],
        ),
        (lambda: DeclaredOutput(output=None), ["body"]),
        (DeclaredOutputNeedsArgument, ["body"]),
        (NoDeclaredOutput, ["body"]),
    ],
)
def test_auto_head_is_the_declared_or_last_linear(model, expected):
    assert head_names(swap(model())) == expected


def test_declared_output_without_linear_is_no_head():
    model = DeclaredOutput("both")
    model.both = nn.Sequential(nn.Flatten(), nn.Bilinear(4, 4, 9))
    report = swap(model)
    assert head_names(report) == []
    assert report.left == {"both": "torch.nn.modules.container.Sequential is not a torch.nn.Linear"}


def test_heads_of_a_declared_output_that_is_no_linear_are_its_linears_with_the_most_outputs():
    model = DeclaredOutput("both")
    model.both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))
    report = swap(model)
    assert head_names(report) == ["both.1"]
    assert not report.left


@pytest.mark.parametrize("elsewhere", [nn.Linear(4, 9), nn.Sequential(nn.Linear(4, 9))])
def test_declared_output_outside_of_the_model_is_ignored(elsewhere):
    model = DeclaredOutput()
    model.get_output_embeddings = lambda: elsewhere
    assert head_names(swap(model)) == ["body"]


class EqualToAll(nn.Module):
    """Its == returns a module, which is true, as that of torchmetrics.Metric does."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        return EqualToAll()


@pytest.mark.parametrize("head", ["auto", "body"])
def test_module_that_equals_every_other_is_no_head(head):
    def list_marked():
        return [n for n, module in model.named_modules() if get_mark(module)]

    model = nn.Sequential()
    model.metric, model.body, model.after = EqualToAll(), nn.Linear(4, 9), EqualToAll()
    for _ in range(2):  # the second finds what the first made
        assert head_names(swap(model, head=head)) == ["body"]
        assert list_marked() == ["body"]
    with pytest.raises(ValueError, match="must be a torch"):
        swap(model, head=model.metric)
    unswap(model)
    assert list_marked() == []


def test_declared_output_of_another_class_is_replaced_but_no_head():
    model = nn.Module()
    model.act = model.out = nn.Tanh()
    model.get_output_embeddings = lambda: model.act
    report = swap(model, include="out")
    assert head_names(report) == []
    assert report.left == {}
    assert type(model.act) is torch_nnmath.nn.Tanh
    assert get_mark(model.act) is True


def test_layer_of_ours_with_forward_on_the_instance_is_no_head():
    model = nn.Sequential(torch_nnmath.nn.Linear(4, 3))
    model[0].forward = lambda input: input
    report = swap(model)
    assert head_names(report) == []
    assert report.left == {"0": "its instance has a forward of its own"}


def is_deferred(z):
    return type(z) is DeferredLogits


def test_head_by_name_module_or_none(small):
    x = torch.randn(5, 4, dtype=torch.float64)
    assert head_names(swap(small, head="0")) == ["0"]
    assert is_deferred(small[0](x))
    assert head_names(swap(small)) == ["0"], "an existing head stays"
    assert head_names(swap(small, include="2")) == ["0"], "even if it is not included"
    report = swap(small, head=small[2])
    assert head_names(report) == ["2"]
    assert str(report) == "no modules changed\nhead 2: no losses without logits so far"
    assert not is_deferred(small[0](x))
    assert is_deferred(small(x))
    assert head_names(swap(small, head=None)) == []
    assert not is_deferred(small(x))
    assert changed_names(unswap(small)) == ["0", "1", "2"]
    assert list_types(small)[1:] == [nn.Linear, nn.ReLU, nn.Linear]


def test_named_head_is_replaced_though_not_included(small):
    assert swap(small, include="1", head="0") == (
        ("0", "torch.nn.Linear", "torch_nnmath.nn.Linear"),
        ("1", "torch.nn.ReLU", "torch_nnmath.nn.ReLU"),
    )


def test_excluded_linear_is_no_head(small):
    assert head_names(swap(small, exclude="2")) == []
    assert type(small[2]) is nn.Linear


def test_layer_constructed_from_our_class_becomes_head_and_stays_ours():
    model = nn.Sequential(nn.ReLU(), torch_nnmath.nn.Linear(4, 3))
    report = swap(model)
    assert head_names(report) == ["1"]
    assert is_deferred(model(torch.randn(2, 4)))
    assert changed_names(unswap(model)) == ["0"]
    assert type(model[1]) is torch_nnmath.nn.Linear
    assert not get_mark(model[1])
    assert not is_deferred(model(torch.randn(2, 4)))


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("3", ValueError, "no module named '3'"),
        ("lm_haed", ValueError, "similar names are 'lm_head'"),
        ("body.1", ValueError, "must be a torch.nn.Linear"),
        ("own", ValueError, "swapping_helpers.Subclass is a class of its own"),
        ("patched", ValueError, "forward of its own"),
        (nn.Linear(2, 2), ValueError, "not in the model"),
        (False, TypeError, "a name, a module"),
        (3, TypeError, "a name, a module"),
        (nn.Linear, TypeError, "a name, a module"),
    ],
)
def test_invalid_head_raises_and_changes_nothing(head, error, message):
    modules = {"body": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "own": Subclass(4, 4)}
    model = nn.ModuleDict({**modules, "patched": make_patched_linear(), "lm_head": nn.Linear(4, 3)})
    before = list_types(model)
    with pytest.raises(error, match=message):
        swap(model, head=head)
    assert list_types(model) == before


def test_report_prints_modules_left_and_head_counts():
    model = nn.Sequential(Subclass(4, 4), make_patched_linear(), nn.Linear(4, 7))
    report = swap(model)
    assert report.left == {
        "0": "swapping_helpers.Subclass is a class of its own",
        "1": "its instance has a forward of its own",
    }
    x, target = torch.randn(3, 4), torch.tensor([0, 6, 2])
    nn.functional.cross_entropy(model[2](x), target).backward()
    nn.functional.cross_entropy(model[2](x).exp(), target).backward()
    lines = str(report).splitlines()
    assert lines[:5] == [
        "2  torch.nn.Linear  ->  torch_nnmath.nn.Linear  head",
        "1 module changed",
        "left as it was: 0: swapping_helpers.Subclass is a class of its own",
        "left as it was: 1: its instance has a forward of its own",
        "head 2: 1 loss without logits so far",
    ]
    assert lines[5].startswith("  logits computed 1 x: exp at ")
    assert "test_swapping_heads.py" in lines[5]


# The rule by which logits are plain


def make_head(features, classes):
    return nn.Sequential(nn.Linear(4, features), nn.Linear(features, classes))


def run_step(model, rows):
    """Returns the logits of a training step and the gradients."""
    logits = model(torch.linspace(-1, 1, 4 * rows).view(rows, 4))
    nn.functional.cross_entropy(logits, torch.arange(rows) % logits.shape[1]).backward()
    return logits, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("rows", "features", "classes", "reason"),
    [
        (32, 4, 10, "by rule: they take less than 16 MiB"),
        (1024, 8, 4095, "by rule: they take less than 16 MiB"),
        (1024, 8, 4096, None),
        (2**15, 65, 129, "by rule: fewer than 2 classes for each feature"),
        (2**15, 64, 128, None),
    ],
)
def test_logits_of_a_small_head_are_plain_and_the_report_says_so(
    logits_plain_by_rule, rows, features, classes, reason
):
    model = make_head(features, classes)
    _, expected = run_step(model, rows)
    expected = [g.clone() for g in expected]
    model.zero_grad()
    report = swap(model)
    logits, gradients = run_step(model, rows)
    assert isinstance(logits, DeferredLogits) is (reason is None)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    log = report.heads["1"]
    assert log.fused == (reason is None)
    if reason is not None:
        assert [*log.materialized.values()] == [1]
        assert f"logits computed 1 x: {reason}" in repr(report)


def test_logits_plain_by_rule_do_not_warn(logits_plain_by_rule, recwarn):
    model = make_head(4, 10)
    swap(model)
    model(torch.zeros(3, 4)).sum().backward()
    assert not recwarn


@pytest.mark.parametrize("order", ["named", "auto, then named", "named, then auto"])
def test_named_head_defers_logits_of_any_size(logits_plain_by_rule, order):
    model = make_head(4, 10)
    heads = {"named": ["1"], "auto, then named": ["auto", "1"], "named, then auto": ["1", "auto"]}
    for head in heads[order]:
        report = swap(model, head=head)
    logits, _ = run_step(model, 3)
    assert isinstance(logits, DeferredLogits)
    assert report.heads["1"].fused == 1


def test_half_logits_count_with_their_own_bytes(logits_plain_by_rule):
    model = make_head(8, 4096).bfloat16()
    swap(model)
    features = torch.zeros(1024, 4, dtype=torch.bfloat16)
    assert not isinstance(model(features), DeferredLogits)
    assert isinstance(model(features.repeat(2, 1)), DeferredLogits)


@needs_deferral_in_compiled_models
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of Dynamo
@pytest.mark.parametrize("head", ["auto", "1"])
def test_compiled_model_defers_logits_of_a_small_head_only_if_it_is_named(
    logits_plain_by_rule, head
):
    model = make_head(4, 10)
    report = swap(model, head=head)
    torch.compiler.reset()
    logits, _ = run_step(torch.compile(model, backend="eager", fullgraph=head == "auto"), 3)
    assert isinstance(logits, DeferredLogits) is (head == "1")
    if head == "auto":
        (reason,) = report.heads["1"].materialized
        assert reason.endswith("by rule: they take less than 16 MiB")
