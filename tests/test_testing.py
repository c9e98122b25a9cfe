"""The checker: it names the fault of each broken Function, and finds none in right ones."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torch_nnmath import testing
from torch_nnmath.testing import Verdict

plain = torch.nn.functional
ONLY_PYTORCH = {"forward mode through compile", "second order through compile"}


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Product(Function):
    """x Wᵀ, right in everything that PyTorch lets a Function be; the broken ones derive from it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W):
        return x @ W.T

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        wants_x, wants_W = ctx.needs_input_grad
        return dy @ W if wants_x else None, dy.T @ x if wants_W else None

    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = ctx.saved_tensors
        return dx @ W.T + x @ dW.T


class Sign(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return -dy @ W, dy.T @ x


class Transposed(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return dy @ W, x.T @ dy


class UpstreamIgnored(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return torch.ones_like(dy) @ W, torch.ones_like(dy).T @ x


class ZeroTangent(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = ctx.saved_tensors
        return torch.zeros_like(x @ W.T)


class HalfOfTheTangent(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        _, W = ctx.saved_tensors
        return dx @ W.T


class NoTangent(Product):
    jvp = Function.jvp


class WritesItsInput(Product):
    @staticmethod
    def forward(x, W):
        y = x @ W.T
        x.mul_(2)
        return y


class WritesAndRestoresItsInput(Product):
    @staticmethod
    def forward(x, W):
        y = x.neg_() @ -W.T
        x.neg_()
        return y


class WritesItsUpstream(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        gradients = dy @ W, dy.T @ x
        dy.mul_(0.5)
        return gradients


class WritesItsTangent(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = ctx.saved_tensors
        return dx.mul_(2) @ W.T / 2 + x @ dW.T


class HalvedSecondBackward(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        ctx.factor = getattr(ctx, "factor", 2) / 2
        return ctx.factor * dy @ W, ctx.factor * dy.T @ x


class NothingBesideAFrozenInput(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy) if all(ctx.needs_input_grad) else (None, None)


class GradientOfAnotherType(Product):
    @staticmethod
    def backward(ctx, dy):
        return tuple(g.float() for g in Product.backward(ctx, dy))


class KeptOnTheContext(Product):
    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.kept = inputs
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.kept
        return dy @ W, dy.T @ x


class ReadsSavedTensorsTwice(Product):
    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[1], dy.T @ ctx.saved_tensors[0]


class OnceDifferentiable(Product):
    backward = staticmethod(once_differentiable(Product.backward))


class DetachedBackward(Product):
    @staticmethod
    def backward(ctx, dy):
        x, W = (saved.detach() for saved in ctx.saved_tensors)
        return dy @ W, dy.T @ x


class NoBatches(Product):
    generate_vmap_rule = False


class MixesRows(Product):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, dims, x, W):
        x, W = (
            v.expand(info.batch_size, *v.shape) if d is None else v.movedim(d, 0)
            for v, d in zip((x, W), dims, strict=True)
        )
        return MixesRows.apply(x.flip(0).flatten(0, 1), W[0]).unflatten(0, x.shape[:2]), 0


class FlattensItsUpstream(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy.view(-1).view(dy.shape))


class ReadsMemoryInOrder(Product):
    """As a kernel does that is given a pointer and no strides."""

    @staticmethod
    def forward(x, W):
        _, columns = x.shape
        return torch.as_strided(x, x.shape, (columns, 1)) @ W.T


class MakesTensorsAnywhere(Product):
    @staticmethod
    def forward(x, W):
        return x @ W.T + torch.zeros(len(W), dtype=x.dtype)


class ReadsNumbers(Product):
    @staticmethod
    def forward(x, W):
        return x @ W.T if x.sum().item() < 1e9 else x @ W.T + 1


class SavedIntermediate(Function):
    """x sin x; its backward does not know that the sine depends on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        sine = x.sin()
        return x * sine, sine

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*inputs, outputs[1])

    @staticmethod
    def backward(ctx, dy, _):
        x, sine = ctx.saved_tensors
        return dy * (sine + x * x.cos())


def saved_intermediate(x):
    return SavedIntermediate.apply(x)[0]


class TangentWithoutGraph(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        x, W = (saved.detach() for saved in ctx.saved_tensors)
        return dx @ W.T + x @ dW.T


class BackwardReadsNumbers(Product):
    @staticmethod
    def backward(ctx, dy):
        return Product.backward(ctx, dy if dy.sum().item() < 1e9 else 0 * dy)


class TangentReadsNumbers(Product):
    @staticmethod
    def jvp(ctx, dx, dW):
        return Product.jvp(ctx, dx if dx.sum().item() < 1e9 else 0 * dx, dW)


class KnowsWhereItsInputsWere(Product):
    """As a backward does that keeps a pointer."""

    @staticmethod
    def setup_context(ctx, inputs, y):
        Product.setup_context(ctx, inputs, y)
        ctx.places = [x.data_ptr() for x in inputs]

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        x, W = (v * (v.data_ptr() == p) for v, p in zip(saved, ctx.places, strict=True))
        return dy @ W, dy.T @ x


class NeedsBothUpstreams(Function):
    @staticmethod
    def forward(x, W):
        return x * W, x + W

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dp, ds):
        x, W = ctx.saved_tensors
        return dp * W + ds, dp * x + ds


class NoThirdDerivative(Function):
    """x⁴, to the second order."""

    @staticmethod
    def forward(x, W):
        return x**4 + W

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        here = x.detach()
        return dy * (4 * here**3 + 12 * here**2 * (x - here)), dy


def flattens_its_input(x, W):
    return x.view(-1).sin() * W.reshape(-1)


def differs_without_gradients(x, W):
    return x * W if torch.is_grad_enabled() else x * W + 1


def differs_in_inference_mode(x, W):
    return x * W + 1 if torch.is_inference_mode_enabled() else x * W


def reads_memory_that_nobody_wrote(x, W):
    return x * W + (0 * torch.empty_like(x)).nan_to_num(7.0)


X, W = numbers(3, 3), numbers(4, 3)[:3] + 1
WRONG, RAISES, ZERO, WRITES = (
    Verdict.WRONG,
    Verdict.RAISES,
    Verdict.SILENT_ZERO,
    Verdict.WRITES,
)


FAULTS = [
    (Sign, WRONG, ["gradient", "gradcheck", "vjp", "jacrev"], ["forward mode", "jacfwd"]),
    (Transposed, WRONG, ["gradient", "gradcheck"], ["forward mode", "no_grad"]),
    (UpstreamIgnored, WRONG, ["gradient", "upstream gradients"], ["forward mode"]),
    (ZeroTangent, ZERO, ["forward mode", "jvp", "jacfwd", "linearize"], ["gradient"]),
    (HalfOfTheTangent, WRONG, ["forward mode", "jvp"], ["gradient", "second order"]),
    (NoTangent, RAISES, ["forward mode", "forward over reverse", "jvp"], ["second order"]),
    (WritesItsInput, WRITES, ["gradient", "no_grad"], []),
    (WritesAndRestoresItsInput, WRITES, ["gradient", "no_grad"], []),
    (WritesItsUpstream, WRITES, ["gradient", "vjp"], ["no_grad", "forward mode"]),
    (WritesItsTangent, WRITES, ["forward mode"], ["gradient"]),
    (HalvedSecondBackward, WRONG, ["retained graph"], ["gradient", "forward mode"]),
    (NothingBesideAFrozenInput, ZERO, ["frozen inputs"], ["gradient", "forward mode"]),
    (GradientOfAnotherType, WRONG, ["types of gradients"], ["forward mode"]),
    (KeptOnTheContext, WRONG, ["edited before backward"], ["gradient", "retained graph"]),
    (ReadsSavedTensorsTwice, RAISES, ["checkpoint"], ["gradient", "second order"]),
    (OnceDifferentiable, ZERO, ["second order"], ["gradient"]),
    (OnceDifferentiable, WRONG, ["gradgradcheck"], ["gradient"]),
    (DetachedBackward, WRONG, ["gradgradcheck"], ["gradient", "forward mode"]),
    (DetachedBackward, ZERO, ["second order"], ["gradient", "forward mode"]),
    (NoBatches, RAISES, ["vmap", "vmap(grad)"], ["gradient", "second order"]),
    (MixesRows, WRONG, ["vmap", "grad(vmap)", "vmap(vmap)"], ["gradient"]),
    (FlattensItsUpstream, RAISES, ["upstream gradients"], ["gradient"]),
    (ReadsMemoryInOrder, WRONG, ["strided inputs"], ["gradient"]),
    (MakesTensorsAnywhere, RAISES, ["default device", "meta device"], ["gradient"]),
    (ReadsNumbers, RAISES, ["meta device", "vmap", "make_fx"], ["gradient"]),
    (NoTangent, RAISES, ["forward over forward", "batched tangents"], ["gradient"]),
    (NoBatches, RAISES, ["vmap(vmap)", "vmap(jacfwd)", "per-sample gradients"], ["gradient"]),
    (TangentWithoutGraph, ZERO, ["reverse over forward"], ["forward mode", "second order"]),
    (BackwardReadsNumbers, RAISES, ["batched gradients", "fake tensors"], ["retained graph"]),
    (TangentReadsNumbers, RAISES, ["batched tangents", "jacfwd"], ["forward mode"]),
    (KnowsWhereItsInputsWere, ZERO, ["saved-tensor hooks"], ["gradient", "retained graph"]),
    (NeedsBothUpstreams, RAISES, ["outputs left unused"], ["gradient", "second order"]),
    (NoThirdDerivative, ZERO, ["third order"], ["gradient", "second order"]),
    (Product, RAISES, ["autocast bfloat16", "autocast float16"], ["gradient", "checkpoint"]),
    (flattens_its_input, RAISES, ["expanded inputs", "strided inputs"], ["gradient"]),
    (differs_without_gradients, WRONG, ["no_grad"], ["gradient"]),
    (differs_in_inference_mode, WRONG, ["inference mode"], ["gradient", "no_grad"]),
    (reads_memory_that_nobody_wrote, WRONG, ["deterministic algorithms"], ["gradient"]),
]


@pytest.mark.parametrize(("function", "verdict", "rows", "innocent"), FAULTS)
def test_a_fault_is_caught_by_the_row_that_names_it(function, verdict, rows, innocent):
    report = testing.check(function, [X, W], transforms=[*rows, *innocent])
    for row in rows:
        assert report[row].verdict == verdict, report
        assert report[row].detail
    for row in innocent:
        assert report[row].verdict == Verdict.RIGHT, report
    assert not report.right
    with pytest.raises(AssertionError, match=f"{function.__name__}: {re.escape(rows[0])}: "):
        report.raise_on_failure()


ELSEWHERE = {  # faults that other tests here plant
    *("value", "hessian", "deepcopy", "pickle", "export", "export, strict"),
    *("compile", "compile by Inductor", "compile, dynamic shapes", "torch.func inside compile"),
    "forward mode through compile",
}
NOWHERE = {"second order through compile"}  # PyTorch's own is silently zero


def test_every_transform_has_its_fault():
    caught = {row for _, _, rows, _ in FAULTS for row in rows}
    assert caught | ELSEWHERE | NOWHERE == {*testing.TRANSFORMS}


def test_a_saved_intermediate_is_caught_at_second_order():
    rows = ["gradient", "second order", "gradgradcheck", "hessian"]
    report = testing.check(saved_intermediate, [numbers(3)], transforms=rows)
    verdicts = [row.verdict for row in report]
    assert verdicts[:3] == ["right", "wrong", "wrong"]
    assert report["second order"].detail.startswith("the Hessian times a vector, in input 0, is ")


class SlightlyOff(Function):
    """x³, its derivative of one order off by so much of itself."""

    @staticmethod
    def forward(x, errors):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, y):
        x, ctx.errors = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        first, second, third = (1 + error for error in ctx.errors)
        here = x.detach()
        step = x - here
        series = 3 * here**2 * first + 6 * here * second * step + 3 * third * step**2
        return dy * series, None


@pytest.mark.parametrize(
    ("row", "place", "error"),
    [("gradient", 0, 1e-7), ("second order", 1, 1e-5), ("third order", 2, 1e-3)],
)
def test_how_near_right_is(row, place, error):
    """Ten times the tolerance is wrong, a tenth of it right."""
    for size, right in ((error, False), (error / 100, True)):
        errors = [0.0, 0.0, 0.0]
        errors[place] = size
        report = testing.check(SlightlyOff, [numbers(3), errors], transforms=[row])
        assert report.right == right, report
    reference = testing.check(
        torch.sin,
        numbers(3),
        reference=lambda x: x.sin() * (1 + 1e-9),
        transforms=["value"],
    )
    assert not reference.right


def test_faults_of_compiled_code():
    def specialises(x):
        return sum(x[i] for i in range(x.shape[0]))

    def branches(x):
        return x * 2 if x.sum() > 0 else x * 3

    @torch.library.custom_op("torch_nnmath_tests::undeclared", mutates_args=())
    def undeclared(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    rows = ["compile", "compile, dynamic shapes"]
    dynamic = testing.check(specialises, [numbers(3, 2)], transforms=rows)
    assert [row.verdict for row in dynamic] == ["right", "wrong"]
    assert "graphs for batches of 3, 6, 9" in dynamic["compile, dynamic shapes"].detail
    rows = ["gradient", "compile", "make_fx", "export", "export, strict", "vmap"]
    branching = testing.check(branches, [numbers(3)], transforms=rows)
    assert [row.verdict for row in branching] == ["right", *[RAISES] * 5]
    opaque = testing.check(undeclared, [numbers(3)], transforms=["gradient", "compile"])
    assert not opaque.right


def test_a_compiled_function_that_loses_its_gradient():
    def loses(x):
        return x.detach() * 2 + (0 * x if torch.compiler.is_compiling() else x - x.detach()) * 2

    rows = ["gradient", "compile", "compile by Inductor", "torch.func inside compile"]
    report = testing.check(loses, [numbers(3)], transforms=rows)
    assert [row.verdict for row in report] == [Verdict.RIGHT, ZERO, ZERO, ZERO]


class Unpicklable(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.activation = lambda x: x


class Forgets(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        with torch.no_grad():
            self.bias.zero_()


class Shares(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class CannotBeCopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("kind", "row", "verdict"),
    [
        (Unpicklable, "pickle", RAISES),
        (Forgets, "pickle", WRONG),
        (Forgets, "deepcopy", WRONG),
        (Shares, "deepcopy", WRONG),
        (CannotBeCopied, "deepcopy", RAISES),
    ],
)
def test_modules_that_cannot_be_copied(kind, row, verdict):
    assert testing.check(kind(3, 2), [X], transforms=[row])[row].verdict == verdict
    assert testing.check(kind(3, 2), [X], transforms=["gradient"]).right
    assert testing.check(nn.Linear(3, 2), [X], transforms=[row])[row].verdict == Verdict.RIGHT


Y = torch.tensor([0, 2, -100])


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (torch.sin, [numbers(3)]),
        (torch.exp, [torch.tensor(0.3)]),
        (plain.linear, [X, W, numbers(3)]),
        (plain.mse_loss, [1000 * X, W]),
        (plain.cross_entropy, [X, Y]),
        (lambda x: x.topk(2), [X]),
        (lambda x: x.unbind(), [X]),
        (lambda x, factor, flag: x * factor if flag else x, [X, 2.5, True]),
        (plain.embedding, [torch.tensor([0, 1, 1]), X]),
        (torch.square, [torch.zeros(3)]),
        (torch.linalg.inv, [numbers(2, 2)]),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), [X]),
        (nn.BatchNorm1d(3).eval(), [X]),
        (testing.Sine, [X]),
    ],
    ids=[
        *("sin", "scalar", "linear", "mse_loss", "cross_entropy", "topk", "unbind"),
        *("other arguments", "embedding", "zeros", "inv", "module", "buffers", "Function"),
    ],
)
def test_right_functions_are_right(function, inputs):
    report = testing.check(function, inputs)
    assert report.right, report
    cannot = {row.transform for row in report if row.verdict == Verdict.CANNOT}
    if function is testing.Sine:  # what PyTorch cannot do with a Function that has a jvp
        cannot -= {
            "forward over forward",
            "compile",
            "compile by Inductor",
            "compile, dynamic shapes",
        }
    assert cannot <= ONLY_PYTORCH


def test_half_of_a_verdict_depends_on_which_inputs_are_differentiated():
    def detached(x, y):
        return x * y.detach()

    x, y = numbers(3), numbers(3) + 2
    assert not testing.check(detached, [x, y], transforms=["gradient"]).right
    testing.assert_right(detached, [x.requires_grad_(), y], transforms=testing.QUICK)


def test_of_a_module_parameters_and_inputs_are_differentiated():
    class LosesItsInput(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    class LosesItsBias(nn.Linear):
        def forward(self, x):
            return plain.linear(x, self.weight, self.bias.detach())

    for kind, label in ((LosesItsInput, "input 0"), (LosesItsBias, "bias")):
        report = testing.check(kind(3, 2), [X], transforms=["gradient"])
        assert report["gradient"].verdict == ZERO
        assert f"the gradient in {label} is 0" in report["gradient"].detail
    frozen = LosesItsBias(3, 2)
    frozen.bias.requires_grad_(False)
    testing.assert_right(frozen, [X], transforms=["gradient", "forward mode", "vmap(grad)"])


def test_a_reference_gives_the_value_and_the_truth():
    def scaled(x):
        return 1.001 * x.square()

    x = numbers(3)
    alone = testing.check(scaled, x, transforms=["value", "gradient"])
    assert [row.verdict for row in alone] == [Verdict.NOT_APPLICABLE, Verdict.RIGHT]
    against = testing.check(scaled, x, reference=torch.square, transforms=["value", "gradient"])
    assert [row.verdict for row in against] == [WRONG, WRONG]
    shaped = testing.check(lambda x: x[None], x, reference=lambda x: +x, transforms=["value"])
    assert shaped["value"].detail == "output 0 has shape (1, 3), not (3,)"
    module, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    assert testing.check(module, [X], reference=reference, transforms=["value", "gradient"]).right
    with pytest.raises(TypeError, match="reference of a module"):
        testing.check(module, [X], reference=torch.sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_precisions(dtype):
    rows = [name for name in testing.QUICK if "compile" not in name]
    report = testing.check(plain.cross_entropy, [X, Y], transforms=rows, dtype=dtype)
    assert report.dtype == dtype
    assert report.right, report
    wrong = testing.check(
        lambda x: x * 1.2 - (0.2 * x).detach(), [X], transforms=["gradient"], dtype=dtype
    )
    assert wrong["gradient"].verdict == WRONG


def test_what_pytorch_raises_where_the_function_is_silent_is_no_excuse():
    """The tangent of a compiled function: PyTorch's own raises, so that zeros are a fault."""

    def loses(x):
        return x.detach() * 2 if torch.compiler.is_compiling() else x * 2

    row = "forward mode through compile"
    assert testing.check(torch.sin, [X], transforms=[row])[row].verdict == Verdict.CANNOT
    assert testing.check(loses, [X], transforms=[row])[row].verdict == ZERO


def test_a_function_of_chance_cannot_be_judged():
    report = testing.check(lambda x: plain.dropout(x, 0.5), [numbers(50)], transforms=["gradient"])
    assert "another value each time" in report["gradient"].detail


def test_the_inputs_are_neither_written_nor_kept():
    x = numbers(3, 3).requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    testing.check(WritesItsInput, [x, W], transforms=testing.QUICK[:5])
    assert torch.equal(x, before)
    assert x.grad is None
    assert torch.equal(state, torch.get_rng_state())
    module = nn.Linear(3, 2)
    testing.check(module, [X], transforms=["gradient", "no_grad"])
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None


def test_the_state_of_torch_is_left_as_it_was():
    threads = torch.get_num_threads()
    testing.check(OnceDifferentiable, [X, W])
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu"


def test_a_report_is_a_table_a_dict_and_an_error():
    report = testing.check(Sign, [X, W], transforms=["no_grad", "gradient", "deepcopy"])
    lines = str(report).splitlines()
    assert lines[0] == "Sign, float64"
    assert lines[1].split() == ["no_grad", "right"]
    assert re.match("gradient  wrong +the gradient in input 0 is ", lines[2])
    assert re.match("deepcopy  not applicable +a function", lines[3])
    written = json.loads(json.dumps(report.to_dict()))
    assert written["function"] == "Sign"
    assert not written["right"]
    assert [row["verdict"] for row in written["rows"]] == ["right", "wrong", "not applicable"]
    assert written["rows"][1]["detail"] == report["gradient"].detail
    with pytest.raises(AssertionError, match="Sign: gradient: wrong: the gradient in input 0 is"):
        testing.assert_right(Sign, [X, W], transforms=["no_grad", "gradient"])
    assert testing.assert_right(Sign, [X, W], transforms=["no_grad"]) is None
    with pytest.raises(KeyError):
        report["vmap"]


def test_the_numbers_in_a_verdict_are_true():
    report = testing.check(Sign, [X, W], transforms=["gradient"])
    got, truth = map(
        float, re.search(r"is (\S+), the truth (\S+)$", report["gradient"].detail).groups()
    )
    assert got == pytest.approx(-truth)
    assert got != 0


@pytest.mark.parametrize(
    ("function", "inputs", "options", "error", "match"),
    [
        (3, [X], {}, TypeError, "callable"),
        (nn.Linear, [X], {}, TypeError, "instance"),
        (torch.sin, [], {}, ValueError, "nothing to differentiate"),
        (torch.sin, [Y], {}, ValueError, "nothing to differentiate"),
        (torch.sin, [X + 1j], {}, TypeError, "complex"),
        (torch.sin, [X], {"transforms": ["warp"]}, ValueError, "no transform 'warp'"),
        (torch.sin, [X], {"dtype": torch.int64}, TypeError, "dtype must be one of"),
    ],
)
def test_wrong_arguments_are_errors(function, inputs, options, error, match):
    with pytest.raises(error, match=match):
        testing.check(function, inputs, **options)


def chunked_head():
    """The example of docs/checking.md, run as it stands there; and what it prints there."""
    page = (Path(__file__).parents[1] / "docs" / "checking.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.S | re.M)
    code, ours = (b for kind, b in blocks if kind == "python" and "linear_cross_entropy" in b)
    (printed,) = (block for kind, block in blocks if kind == "text" and "chunked" in block)
    names = {}
    exec(code.replace("print(report)", ""), names)
    exec(ours, names)  # this library's head, which has no fault
    return names["report"], printed


@pytest.mark.skipif(
    not hasattr(nn.functional, "linear_cross_entropy"), reason="it came with PyTorch 2.13"
)
def test_the_faults_of_pytorchs_chunked_head_are_reported_as_the_page_says():
    report, printed = chunked_head()
    found = {row.transform: row.verdict for row in report}
    said = dict(re.findall(r"^(\S.*?) {2,}(\w[\w ]*?)(?: {2,}.*)?$", printed, re.M))
    assert said == found
    assert found["value"] == found["gradient"] == found["frozen inputs"] == "right"
    assert found["second order"] == found["jvp"] == found["jacfwd"] == "silent zero"
    assert found["retained graph"] == found["jacrev"] == "raises"
