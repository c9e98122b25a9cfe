"""The verdicts on functions and modules of PyTorch: none is false, and known faults are found."""

import pytest
import torch

from torch_nnmath import testing, verify
from torch_nnmath.testing import Verdict
from torch_nnmath.testing._pytorch import Example, make_examples

EXAMPLES = make_examples()
TRACING = {n for n in testing.TRANSFORMS if any(w in n for w in ("compile", "export", "make_fx"))}
EAGER = [name for name in testing.TRANSFORMS if name not in TRACING]

NORMALISATION = {"third order", "reverse over forward", "forward over forward", "hessian"}
DETERMINANT = {
    *("forward over reverse", "reverse over forward", "forward over forward", "vmap(jacfwd)")
}
# Of PyTorch 2.13, each confirmed by differences of the first derivative.
FAULTS = {
    "layer_norm": NORMALISATION,
    "LayerNorm": NORMALISATION,
    "batch_norm": NORMALISATION,
    "BatchNorm1d": NORMALISATION,
    "InstanceNorm1d": NORMALISATION - {"hessian"},
    "logcumsumexp": {"third order"},
    "det": DETERMINANT,
    "slogdet": DETERMINANT,
    "weight_norm": {
        *("saved-tensor hooks", "deterministic algorithms", "second order", "gradgradcheck"),
        *("third order", "batched gradients"),
    },
}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "hardsigmoid"])
def test_verdicts_on_pytorch_are_true(name):
    report = testing.check(*EXAMPLES[name], transforms=EAGER)
    assert all(row.verdict is not Verdict.UNKNOWN for row in report), report
    faults = {row.transform for row in report if row.verdict.is_fault}
    if torch.__version__.startswith("2.13."):
        assert faults == FAULTS.get(name, set()), report
    else:
        assert faults <= FAULTS.get(name, set()), report


def test_slope_of_hardsigmoid_is_rounded_to_float32():
    """PyTorch's derivative is float32(1 / 6); the relative error is 3e-8."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.hardsigmoid(x).sum().backward()
    error = (x.grad - 1 / 6).abs().max() * 6
    report = testing.check(*EXAMPLES["hardsigmoid"], transforms=["gradient"])
    assert report.right == (error < 1e-9)
    if not report.right:
        actual, expected = report["gradient"].detail.split("is ")[1].split(", expected ")
        assert float(actual) / float(expected) == pytest.approx(1, abs=1e-7)
        assert actual != expected


def test_examples_are_60_or_more():
    assert len(EXAMPLES) >= 60


def test_command_prints_a_line_and_the_faults_of_each_example(monkeypatch, capsys):
    examples = {
        "tanh": Example(torch.tanh, [torch.randn(3)]),
        "broken": Example(lambda x: 2 * x - x.detach(), [torch.randn(3)]),
    }
    monkeypatch.setattr(verify, "make_examples", lambda: examples)
    monkeypatch.setattr(verify, "TRANSFORMS", ("gradient", "no_grad", "deepcopy"))
    assert verify.main(["--pytorch"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tanh", "2", "right"]
    assert lines[1].split() == ["broken", "1", "wrong,", "1", "right"]
    assert lines[2].startswith("    gradient: wrong: the gradient of input 0 is ")
    assert "2 functions and modules of PyTorch, 1 of them with a fault" in lines
