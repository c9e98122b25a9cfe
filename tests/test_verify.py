"""The command `verify`: its output, JSON file and exit status, for right and broken formulas."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_nnmath import catalog, formulas, reference, testing, verify
from torch_nnmath.__main__ import main
from torch_nnmath.testing._check import Sine
from torch_nnmath.testing._report import Wrong


@pytest.fixture
def reduce_catalog(monkeypatch):
    """Returns a function that reduces the catalogue to the rows with an id."""

    def reduce(id):
        rows = tuple(row for row in catalog.CATALOG if id in row.ids)
        monkeypatch.setattr(verify, "CATALOG", rows)
        return rows[0]

    return reduce


def test_verify_of_right_formula_returns_0_and_writes_table(
    reduce_catalog, monkeypatch, capsys, tmp_path
):
    row = reduce_catalog("F6")
    # The other transforms that trace are slow and add only further rows of the same form.
    traced = {n for n in verify.TRANSFORMS if any(w in n for w in ("compile", "export", "make_fx"))}
    transforms = [n for n in verify.TRANSFORMS if n not in traced - {*verify.BEYOND_PYTORCH}]
    monkeypatch.setattr(verify, "TRANSFORMS", transforms)
    assert main(["verify", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{row.name}: right, 2 samples" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["wrong"] == 0
    (formula,) = written["formulas"]
    assert formula["right"]
    assert list(formula["table"]) == [*verify.CHECKS, *transforms]
    cells = dict(re.findall(r"^(\S.*?) {2,}(right|cannot|-)$", printed, re.M))
    texts = {verdict: verify.SHORT_TEXTS.get(verdict, verdict) for verdict in verify.SEVERITY}
    assert {name: texts[verdict] for name, verdict in formula["table"].items()} == cells
    assert {name for name, cell in cells.items() if cell == "cannot"} == {*verify.BEYOND_PYTORCH}
    for name in verify.BEYOND_PYTORCH:
        assert re.search(f"^{name}: PyTorch cannot: torch.sin: raises: ", printed, re.M)
    assert [sample["name"] for sample in formula["samples"]] == ["", "module"]
    verdicts = {each["transform"]: each["verdict"] for each in formula["samples"][1]["rows"]}
    assert verdicts["deepcopy"] == verdicts["vmap"] == "right"


@pytest.mark.parametrize(
    ("id", "function", "broken"),
    [
        ("F6", "Sigmoid", lambda a, v: -a * (1 - a) * v),
        ("F7", "Softmax", lambda a, v, dim=-1: a * v),
    ],
)
def test_verify_of_broken_derivative_returns_1(
    reduce_catalog, capsys, monkeypatch, tmp_path, id, function, broken
):
    reduce_catalog(id)
    monkeypatch.setattr(verify, "QUICK", ("gradient", "no_grad", "jacfwd"))
    monkeypatch.setattr(getattr(formulas, function), "product", staticmethod(broken))
    assert main(["verify", "--quick", "--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^{id} .*: \d+ WRONG, ", printed, re.M)
    assert re.search(r"^reference +wrong$", printed, re.M)
    assert re.search(r"^jacfwd +wrong$", printed, re.M)
    assert re.search(r"^no_grad +right$", printed, re.M)
    assert re.search(r"^gradient: wrong: the gradient of input 0 is ", printed, re.M)
    (formula,) = json.loads((tmp_path / "out.json").read_text())["formulas"]
    assert not formula["right"]
    assert formula["table"]["gradient"] == "wrong"


def test_verify_of_raising_backward_reports_it_and_continues(reduce_catalog, capsys, monkeypatch):
    reduce_catalog("F6")
    monkeypatch.setattr(verify, "QUICK", ("gradient", "no_grad", "retained graph"))

    def raises(a, v):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(formulas.Sigmoid, "product", staticmethod(raises))
    assert main(["verify", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^reference +raises$", printed, re.M)
    assert re.search(r"^retained graph +raises$", printed, re.M)
    assert re.search(r"^no_grad +right$", printed, re.M)
    assert "ZeroDivisionError: planted" in printed


def test_verify_of_formula_that_dynamo_does_not_support_returns_1(
    reduce_catalog, capsys, monkeypatch
):
    """PyTorch compiles no Function that has a jvp, so the catalogue's formulas must have none."""
    reduce_catalog("F6")
    monkeypatch.setattr(formulas.Sigmoid, "jvp", Sine.jvp)
    monkeypatch.setattr(verify, "QUICK", ("compile",))
    assert main(["verify", "--quick"]) == 1
    assert re.search(r"^compile +cannot$", capsys.readouterr().out, re.M)


def multiply_by_wrong_gradient(x):
    return 2 * x - x.detach()


def multiply_by_one(x):
    return x * 1


def multiply_by_two(x):
    return 2 * x


def make_inputs():
    return [torch.tensor([0.5, -1.0])]


@pytest.fixture
def verify_function(capsys):
    """Returns a function that verifies one of the functions above and returns status and output."""

    def run(function, *options):
        names = [f"{__name__}:{function}", "--inputs", f"{__name__}:make_inputs"]
        status = main(["verify", *names, "--quick", *options])
        return status, capsys.readouterr().out

    return run


def test_verify_of_right_user_function_returns_0(verify_function):
    status, printed = verify_function("multiply_by_one")
    assert status == 0
    assert re.search(r"^gradient +right$", printed, re.M)


def test_verify_of_wrong_user_function_returns_1_and_writes_report(verify_function, tmp_path):
    path = tmp_path / "out.json"
    status, printed = verify_function("multiply_by_wrong_gradient", "--json", str(path))
    assert status == 1
    pattern = r"^gradient +wrong +the gradient of input 0 is 1\.\d+, expected "
    assert re.search(pattern, printed, re.M)
    written = json.loads(path.read_text())
    assert written["function"] == "multiply_by_wrong_gradient"
    assert [row["transform"] for row in written["rows"]] == list(testing.QUICK)


def test_verify_of_user_function_with_equal_reference_is_right(verify_function, monkeypatch):
    monkeypatch.setattr(testing, "QUICK", ("value", "gradient"))
    reference = ["--reference", f"{__name__}:multiply_by_wrong_gradient"]  # its value is right
    status, printed = verify_function("multiply_by_one", *reference)
    assert status == 0
    assert re.search(r"^value +right$", printed, re.M)


def test_verify_of_user_function_with_other_reference_is_wrong(verify_function, monkeypatch):
    monkeypatch.setattr(testing, "QUICK", ("value", "gradient"))
    reference = ["--reference", f"{__name__}:multiply_by_two"]
    status, printed = verify_function("multiply_by_one", *reference)
    assert status == 1
    assert re.search(r"^value +wrong +output 0 is -1, expected -2$", printed, re.M)


def test_verify_imports_user_module_from_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef loss(x):\n    return x.square()\n\ndef inputs():\n"
        "    return torch.ones(2)\n"
    )
    command = ["-m", "torch_nnmath", "verify", "mine:loss", "--inputs", "mine:inputs", "--quick"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("loss, float64\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["math:sin"], "a function requires --inputs"),
        (["--inputs", "math:sin"], "--inputs requires a function"),
        (["--reference", "math:sin"], "--reference and --surrogate require a function"),
        (["--surrogate", "math:sin"], "--reference and --surrogate require a function"),
        (["--pytorch", "--device", "cuda"], "cuda"),
        (["--pytorch", "math:sin", "--inputs", "math:pi"], "--pytorch takes neither"),
        (["mathsin", "--inputs", "math:sin"], "not of the form PACKAGE.MODULE:FUNCTION"),
        (["nowhere:sin", "--inputs", "math:sin"], "No module named 'nowhere'"),
        (["math:sinus", "--inputs", "math:sin"], "no attribute 'sinus'"),
        (["math:pi", "--inputs", f"{__name__}:make_inputs"], "must be callable"),
    ],
)
def test_verify_with_invalid_arguments_exits_with_2(capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["verify", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_checks_of_reference_with_wrong_sign_raise():
    """E1: the printed sign of the squared error's derivative."""

    def negate_pullback(a, t, *, fn=reference.NUMPY):
        value, pullback = reference.squared_error_matrix(a, t, fn=fn)
        return value, lambda g: tuple(-d for d in pullback(g))

    row = next(row for row in catalog.CATALOG if row.ids == ("F4",))
    forms = reference.Forms(row.reference.element, reference.Form(negate_pullback))
    broken = dataclasses.replace(row, reference=forms)
    with pytest.raises(Wrong, match="derivative in a_0"):
        verify.prove(broken, "cpu")
    with pytest.raises(Wrong, match="gradient of a"):
        verify.compare_with_reference(broken, "cpu")


def test_checks_of_different_reference_forms_raise():
    row = next(row for row in catalog.CATALOG if row.ids == ("F6",))
    forms = reference.Forms(row.reference.element, reference.TANH.matrix)
    broken = dataclasses.replace(row, reference=forms)
    with pytest.raises(Wrong, match="minus matrix form"):
        verify.prove(broken, "cpu")
    with pytest.raises(Wrong, match="value differs"):
        verify.compare_with_reference(broken, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without CUDA")
def test_verify_on_cuda_without_cuda_exits(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_import_loads_only_torch_and_numpy():
    """`import torch_nnmath` loads no package that torch and numpy do not load."""
    code = (
        "import sys, torch, numpy; packages = {name.split('.')[0] for name in sys.modules}; "
        "import torch_nnmath; print(*{name.split('.')[0] for name in sys.modules} - packages)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["torch_nnmath"]
