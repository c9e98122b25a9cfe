"""The command: what it prints, writes and returns, and that it notices what is broken."""

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


@pytest.fixture
def only(monkeypatch):
    """Reduces the catalog to the rows with an id."""

    def reduce(id):
        rows = tuple(row for row in catalog.CATALOG if id in row.ids)
        monkeypatch.setattr(verify, "CATALOG", rows)
        return rows[0]

    return reduce


def test_a_right_formula_returns_0_and_its_json_holds_the_table(only, capsys, tmp_path):
    row = only("F6")
    assert main(["verify", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{row.name}: right, 2 samples" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["wrong"] == 0
    (formula,) = written["formulas"]
    assert formula["right"]
    assert list(formula["table"]) == [*verify.CHECKS, *verify.TRANSFORMS]
    cells = dict(re.findall(r"^(\S.*?) {2,}(right|cannot|-)$", printed, re.M))
    short = {verdict: verify.SHORT.get(verdict, verdict) for verdict in verify.RANK}
    assert {name: short[verdict] for name, verdict in formula["table"].items()} == cells
    assert {name for name, cell in cells.items() if cell == "cannot"} == {*verify.BEYOND_PYTORCH}
    for name in verify.BEYOND_PYTORCH:
        assert re.search(f"^{name}: PyTorch cannot: its own sin: raises: ", printed, re.M)
    assert [sample["name"] for sample in formula["samples"]] == ["", "module"]
    found = {found["transform"]: found["verdict"] for found in formula["samples"][1]["rows"]}
    assert found["deepcopy"] == found["vmap"] == "right"


@pytest.mark.parametrize(
    ("id", "function", "broken"),
    [
        ("F6", "Sigmoid", lambda a, v: -a * (1 - a) * v),
        ("F7", "Softmax", lambda a, v, dim=-1: a * v),
    ],
)
def test_a_broken_derivative_returns_1(only, capsys, monkeypatch, tmp_path, id, function, broken):
    only(id)
    monkeypatch.setattr(getattr(formulas, function), "product", staticmethod(broken))
    assert main(["verify", "--quick", "--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^{id} .*: \d+ WRONG, ", printed, re.M)
    assert re.search(r"^reference +wrong$", printed, re.M)
    assert re.search(r"^jacfwd +wrong$", printed, re.M)
    assert re.search(r"^no_grad +right$", printed, re.M)
    assert re.search(r"^gradient: wrong: the gradient in input 0 is ", printed, re.M)
    (formula,) = json.loads((tmp_path / "out.json").read_text())["formulas"]
    assert not formula["right"]
    assert formula["table"]["gradient"] == "wrong"


def test_a_backward_that_raises_is_a_finding_and_stops_nothing(only, capsys, monkeypatch):
    only("F6")

    def raises(a, v):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(formulas.Sigmoid, "product", staticmethod(raises))
    assert main(["verify", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^reference +raises$", printed, re.M)
    assert re.search(r"^retained graph +raises$", printed, re.M)
    assert "ZeroDivisionError: planted" in printed


def test_what_pytorchs_own_can_must_be_right(only, capsys, monkeypatch):
    """A Function with a jvp that Dynamo sees is excused in a user's code, not here."""
    only("F6")
    monkeypatch.setattr(formulas.Sigmoid, "jvp", testing.Sine.jvp)
    monkeypatch.setattr(verify, "QUICK", ("compile",))
    assert main(["verify", "--quick"]) == 1
    assert re.search(r"^compile +cannot$", capsys.readouterr().out, re.M)


def wrong(x):
    return 2 * x - x.detach()


def right(x):
    return x * 1


def twice(x):
    return 2 * x


def inputs():
    return [torch.tensor([0.5, -1.0])]


def test_a_function_of_the_users(capsys, tmp_path):
    def run(function, *options):
        name = f"{__name__}:{function}"
        return main(["verify", name, "--inputs", f"{__name__}:inputs", "--quick", *options])

    assert run("right") == 0
    assert re.search(r"^gradient +right$", capsys.readouterr().out, re.M)
    path = tmp_path / "out.json"
    assert run("wrong", "--json", str(path)) == 1
    printed = capsys.readouterr().out
    assert re.search(
        r"^gradient +wrong +the gradient in input 0 is 1\.\d+, the truth ", printed, re.M
    )
    written = json.loads(path.read_text())
    assert written["function"] == "wrong"
    assert [row["transform"] for row in written["rows"]] == list(testing.QUICK)
    assert run("right", "--reference", f"{__name__}:wrong") == 0  # its value is right
    assert re.search(r"^value +right$", capsys.readouterr().out, re.M)
    assert run("right", "--reference", f"{__name__}:twice") == 1
    assert re.search(r"^value +wrong +output 0 is -1, the truth -2$", capsys.readouterr().out, re.M)


def test_the_command_runs_where_the_users_module_lies(tmp_path):
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
        (["math:sin"], "a function goes with --inputs"),
        (["--inputs", "math:sin"], "a function goes with --inputs"),
        (["--reference", "math:sin"], "--reference goes with a function"),
        (["mathsin", "--inputs", "math:sin"], "not of the form PACKAGE.MODULE:FUNCTION"),
        (["nowhere:sin", "--inputs", "math:sin"], "No module named 'nowhere'"),
        (["math:sinus", "--inputs", "math:sin"], "no attribute 'sinus'"),
        (["math:pi", "--inputs", f"{__name__}:inputs"], "must be callable"),
    ],
)
def test_wrong_arguments_are_errors(capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["verify", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


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
        verify.compared(broken, "cpu")


def test_forms_that_differ_are_noticed():
    row = next(row for row in catalog.CATALOG if row.ids == ("F6",))
    forms = reference.Forms(row.reference.element, reference.TANH.matrix)
    broken = catalog.Row(row.ids, "", "", row.function, forms, row.samples)
    with pytest.raises(verify.Wrong, match="minus matrix form"):
        verify.proof(broken, "cpu")
    with pytest.raises(verify.Wrong, match="value is off"):
        verify.compared(broken, "cpu")


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
