"""The rules of the code base that no linter checks."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch

import torch_nnmath
from torch_nnmath import nn

PACKAGE = Path(torch_nnmath.__file__).parent
TESTS = Path(__file__).parent
LAYERS = ("nn.py", "_check.py", "functional.py", "_head.py", "formulas", "kernels")


def parse(path):
    return ast.walk(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py")], ids=lambda p: p.name)
def test_package_files_have_at_most_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", [*TESTS.rglob("*.py")], ids=lambda p: p.name)
def test_test_files_have_at_most_900_lines(path):
    assert len(path.read_text().splitlines()) <= 900


@pytest.mark.parametrize("path", [*(PACKAGE / "kernels").glob("*.py")], ids=lambda p: p.name)
def test_kernels_contain_no_autograd(path):
    """Kernels neither define a Function nor import autograd. import-linter checks the layers."""
    for node in parse(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "autograd" not in ast.unparse(node)
        if isinstance(node, ast.Attribute | ast.Name):
            assert "autograd" not in ast.unparse(node)


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py")], ids=lambda p: p.name)
def test_no_module_assigns_attributes_of_another(path):
    """At module level, an attribute is assigned only to what the module itself defines."""
    tree = ast.parse(path.read_text())
    defined_names = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        for target in getattr(node, "targets", []):
            if isinstance(target, ast.Attribute):
                assert ast.unparse(target.value) in defined_names, ast.unparse(node)


# Operators of torch.library and arguments of `Function.apply` cannot be grouped into records.
NAMES_WITH_FLAT_ARGUMENTS = {"head", "head_second_order", "cross_entropy", "forward"}


@pytest.mark.parametrize(
    "path",
    [*(PACKAGE / "formulas").glob("*.py"), *(PACKAGE / "kernels").glob("*.py")],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_formulas_and_kernels_have_at_most_8_parameters(path):
    for node in parse(path):
        if isinstance(node, ast.FunctionDef) and node.name not in NAMES_WITH_FLAT_ARGUMENTS:
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            assert count <= 8, node.name


def record_frames(call):
    """Returns the package's frames, as (file, function), at the first matrix product of `call`."""
    frames = []

    def profile(frame, event, argument):
        is_product = getattr(argument, "__name__", "") in ("mm", "addmm", "linear", "matmul")
        if event == "c_call" and is_product and not frames:
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if PACKAGE in path.parents:
                    frames.append((str(path.relative_to(PACKAGE)), frame.f_code.co_name))
                frame = frame.f_back

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return frames[::-1]


def test_head_reaches_the_first_product_in_ten_frames_in_one_direction():
    head = nn.LinearCrossEntropyLoss(8, 20)
    x, y = torch.randn(6, 8, requires_grad=True), torch.randint(20, (6,))
    frames = record_frames(lambda: head(x, y))
    assert frames[0] == ("nn.py", "forward")
    assert len(frames) <= 10, frames
    files = [file for i, (file, _) in enumerate(frames) if i == 0 or frames[i - 1][0] != file]
    assert len(files) == len({*files}), files
    order = [LAYERS.index(Path(file).parts[0]) for file in files]
    assert order == sorted(order)


def test_head_training_step_runs_the_linked_backward():
    """The backward that runs is in the file that docs/formulas.md links for F14 and F15."""
    head = nn.LinearCrossEntropyLoss(8, 20)
    x, y = torch.randn(6, 8, requires_grad=True), torch.randint(20, (6,))
    loss, files = head(x, y), set()

    def trace(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if frame.f_code.co_name == "backward" and PACKAGE in path.parents:
            files.add(str(path.relative_to(PACKAGE)))

    sys.setprofile(trace)
    try:
        torch.autograd.backward(loss)
    finally:
        sys.setprofile(None)
    assert files == {"formulas/linear_cross_entropy.py"}


def test_nn_modules_document_their_formula():
    for name in nn.__all__:
        assert "F" in (inspect.getdoc(getattr(nn, name)) or ""), name
