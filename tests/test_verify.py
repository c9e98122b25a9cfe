"""The command: what it prints, writes and returns, and that it notices what is broken."""

import json
import subprocess
import sys

import pytest
import torch

from torch_nnmath import catalog, formulas, reference, verify
from torch_nnmath.__main__ import main


@pytest.fixture
def only(monkeypatch):
    """Reduces the catalog to the rows with an id."""

    def reduce(id):
        rows = tuple(row for row in catalog.CATALOG if id in row.ids)
        monkeypatch.setattr(verify, "CATALOG", rows)
        return rows[0]

    return reduce


def test_right_formulas_print_right_and_return_0(only, capsys, tmp_path):
    row = only("F6")
    assert main(["verify", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert row.name in printed
    assert "WRONG" not in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["wrong"] == 0
    assert written["formulas"][0]["checks"] == dict.fromkeys(verify.CHECKS, "right")


@pytest.mark.parametrize(
    ("id", "function", "broken"),
    [
        ("F6", "Sigmoid", lambda a, v: -a * (1 - a) * v),
        ("F7", "Softmax", lambda a, v, dim=-1: a * v),
    ],
)
def test_a_broken_derivative_returns_1(only, capsys, monkeypatch, id, function, broken):
    only(id)
    monkeypatch.setattr(getattr(formulas, function), "product", staticmethod(broken))
    assert main(["verify"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(id))
    assert "WRONG" in line


def test_a_backward_that_raises_is_a_finding_and_stops_nothing(only, capsys, monkeypatch):
    only("F6")

    def raises(a, v):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(formulas.Sigmoid, "product", staticmethod(raises))
    assert main(["verify"]) == 1
    assert "planted" in capsys.readouterr().out


def test_a_broken_reference_is_disproved(monkeypatch):
    """E1: the printed sign of the squared error's derivative."""

    def printed(a, t, *, fn=reference.NUMPY):
        value, pullback = reference.squared_error_matrix(a, t, fn=fn)
        return value, lambda g: tuple(-d for d in pullback(g))

    row = next(row for row in catalog.CATALOG if row.ids == ("F4",))
    forms = reference.Forms(row.reference.element, reference.Form(printed))
    broken = catalog.Row(row.ids, "", "", row.function, forms, row.samples)
    with pytest.raises(verify.Wrong, match="derivative in a_0"):
        verify.proof(broken, "cpu")
    with pytest.raises(verify.Wrong, match="gradient in a"):
        verify.gradient(broken, "cpu")


def test_forms_that_differ_are_noticed():
    row = next(row for row in catalog.CATALOG if row.ids == ("F6",))
    forms = reference.Forms(row.reference.element, reference.TANH.matrix)
    broken = catalog.Row(row.ids, "", "", row.function, forms, row.samples)
    with pytest.raises(verify.Wrong, match="minus matrix form"):
        verify.proof(broken, "cpu")
    with pytest.raises(verify.Wrong, match="value is off"):
        verify.value(broken, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without CUDA")
def test_cuda_without_cuda_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_import_brings_torch_and_numpy_only():
    """Of what the interpreter loads at `import torch_nnmath`, torch and numpy load all but it."""
    names = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = [
        subprocess.run(
            [sys.executable, "-c", f"import {what}; {names}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for what in ("torch, numpy", "torch_nnmath")
    ]
    assert set(run[1]) - set(run[0]) == {"torch_nnmath"}
