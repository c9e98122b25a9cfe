"""The document with numbers: the columns agree, every formula and every slip stands there, and
`--check` sees a bug wherever one is planted."""

import itertools
import os
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from scripts import EXAMPLES, ROOT, scripts

from torch_nnmath import functional, reference
from torch_nnmath.reference import Form, Forms

BY_HAND = EXAMPLES / "by_hand.py"
FORMULAS = {f"F{i}" for i in range(1, 18)}
SLIPS = {f"E{i}" for i in range(1, 18)}
SECTIONS = [
    *("1", "2", "2.1", "2.2", "3", "3.1", "3.2", "4"),
    *("5", "5.1", "5.1.1", "5.1.2", "5.2", "5.2.1", "5.2.2", "A", "B"),
]


@pytest.fixture(scope="module")
def by_hand():
    with scripts("by_hand") as (module,):
        yield module


@pytest.fixture(scope="module")
def pages(by_hand):
    return by_hand.write()


@pytest.fixture(scope="module")
def slips(by_hand, pages):
    return [item for _, items in pages for item in items if isinstance(item, by_hand.Slip)]


def printed(by_hand, pages, digits=4):
    return "\n".join(by_hand.Paper(digits).page(pages))


def headings(text):
    """The numbers of the sections in print: the lines above the rules."""
    return [
        above.split()[0] for above, rule in itertools.pairwise(text.splitlines()) if "──" in rule
    ]


@pytest.mark.parametrize("digits", [4, 9])
def test_columns_agree_as_printed(by_hand, pages, digits):
    rows = re.findall(r"^ {13}(\S.*?) {2,}(-?\d.*)$", printed(by_hand, pages, digits), re.M)
    assert len(rows) == sum(
        np.size(item.columns["element"])
        for _, items in pages
        for item in items
        if isinstance(item, by_hand.Row)
    )
    derivatives = 0
    for name, cells in rows:
        numbers = [float(cell) for cell in cells.split()]
        # Rounding to the digits may go either way; differences are good to 1e-9 or so.
        assert max(numbers) - min(numbers) < 1.01 * 10.0**-digits + 1e-8, name
        is_derivative = "/d" in name or "'(" in name
        assert len(numbers) == (4 if is_derivative or name.startswith("J_") else 3), name
        derivatives += is_derivative
    assert derivatives > 100


def test_arithmetic_by_hand_comes_to_what_is_printed(by_hand, pages):
    # As a reader does it, with the rounded numbers that stand there.
    lines = re.findall(r"^ {11}(\S.*?) = (.*) = (-?[\d.]+)$", printed(by_hand, pages), re.M)
    assert len(lines) > 20
    for name, arithmetic, result in lines:
        assert by_hand.arithmetic(arithmetic, []) == pytest.approx(float(result), abs=1e-3), name


def test_every_formula_and_every_slip_stands_there(by_hand, pages, slips):
    rows = [item for _, items in pages for item in items if isinstance(item, by_hand.Row)]
    assert {f for row in rows for f in row.formulas.split(", ")} == FORMULAS
    assert {slip.id for slip in slips} == SLIPS
    text = printed(by_hand, pages)
    assert set(re.findall(r"\bF\d+\b", text)) >= FORMULAS
    assert set(re.findall(r"^ {2}(E\d+) slip", text, re.M)) == SLIPS
    assert headings(text) == SECTIONS


def test_every_slip_costs_something(by_hand, pages, slips):
    for slip in slips:
        name, gives, truth = slip.worst
        assert slip.error > 0.1, slip.id
        assert abs(gives - truth) > 1e-3, (slip.id, name)
        assert slip.printed != slip.true
    # What does not fit was tried.
    assert sum("do not fit" in slip.misfit for slip in slips) == 3  # E5, E7, E12
    table = "\n".join(by_hand.Paper(4).slips(pages))
    assert set(re.findall(r"^(E\d+) ", table, re.M)) == SLIPS


def test_the_slips_numbers_by_other_means(slips):
    """Without the script's formulas: by NumPy alone, for three of them."""
    first = {slip.id: slip for slip in reversed(slips)}
    z = np.array([[0.7, -0.5, 0.3], [-0.4, 0.6, 0.9]]) @ (1 / (1 + np.exp([-0.9, -0.1, 0.7]))) + [
        0.2,
        -0.1,
    ]
    t, a, p = np.array([1, 0.5]), 1 / (1 + np.exp(-z)), np.exp(z) / np.exp(z).sum()
    np.testing.assert_allclose(first["E1"].gives[:, 0], t - a)
    np.testing.assert_allclose(first["E1"].truth[:, 0], a - t, atol=1e-9)
    np.testing.assert_allclose(first["E6"].gives[:, 0], (p - t) / np.log(2))
    np.testing.assert_allclose(first["E6"].truth[:, 0], (1.5 * p - t) / np.log(2), atol=1e-8)
    np.testing.assert_allclose(first["E9"].gives, 0, atol=1e-15)
    np.testing.assert_allclose(first["E9"].truth, np.diag(p) - np.outer(p, p), atol=1e-9)


def test_check_passes(by_hand, capsys):
    assert by_hand.main(["--check"]) == 0
    assert "none wrong" in capsys.readouterr().out


def larger(v):
    if isinstance(v, tuple | list):
        return type(v)(map(larger, v))
    return v * 1.001


def broken(form, what):
    def rule(*inputs, **options):
        value, pullback = form.rule(*inputs, **options)
        if what == "value":
            return larger(value), pullback
        return value, lambda g: larger(pullback(g))

    return Form(rule)


FORMS = (
    *("AFFINE", "SIGMOID", "TANH", "RELU", "SOFTMAX", "COST", "SQUARED_ERROR", "CROSS_ENTROPY"),
    *("CATEGORICAL_CROSS_ENTROPY", "SIGMOID_SQUARED_ERROR", "LINEAR_CROSS_ENTROPY", "FEEDFORWARD"),
)
PLANTED = [
    *itertools.product(FORMS, ("element", "matrix"), ("value", "pullback")),
    *itertools.product(["SOFTMAX_JACOBIAN"], ("element", "matrix"), ["value"]),
]


@pytest.mark.parametrize(("name", "side", "what"), PLANTED)
def test_check_sees_a_bug_in_one_form(by_hand, monkeypatch, capsys, name, side, what):
    forms = getattr(reference, name)
    sides = {"element": forms.element, "matrix": forms.matrix}
    sides[side] = broken(sides[side], what)
    monkeypatch.setattr(reference, name, Forms(**sides))
    assert by_hand.main(["--check"]) == 1
    assert "element form" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        *("linear", "sigmoid", "tanh", "relu", "softmax", "softmax_jacobian", "squared_error"),
        *("sigmoid_squared_error", "categorical_cross_entropy", "cross_entropy"),
        *("linear_cross_entropy", "feedforward"),
    ],
)
def test_check_sees_a_bug_in_the_library(by_hand, monkeypatch, capsys, name):
    function = getattr(functional, name)
    monkeypatch.setattr(
        functional, name, lambda *args, **options: 1.001 * function(*args, **options)
    )
    assert by_hand.main(["--check"]) == 1
    assert "library" in capsys.readouterr().out


def test_check_sees_wrong_arithmetic_equations_and_slips(by_hand, pages):
    row = by_hand.write("2.1")[0][1][0]
    assert by_hand.replace(row, hand={0: ("{} + {}", 1.0, 2.0)}).wrong()
    A, B = np.eye(2), np.ones((2, 1))
    assert not by_hand.Equation("y =", "=", A, "·", B, "=", B).wrong()
    assert by_hand.Equation("y =", "=", A, "·", B, "=", 2 * B).wrong()
    equal = by_hand.Slip("E1", "c", "x", "y", B, B, "")
    assert equal.wrong()
    # The equations on the pages are ones that can be wrong.
    equations = [i for _, items in pages for i in items if isinstance(i, by_hand.Equation)]
    assert sum(str(equation.pieces[1]) == "=" for equation in equations) >= 10


@pytest.mark.parametrize(
    ("which", "found"),
    [
        ("5.1", ["5.1", "5.1.1", "5.1.2"]),
        ("5.1.2", ["5.1.2"]),
        ("2", ["2", "2.1", "2.2"]),
        ("B", ["B"]),
    ],
)
def test_section(by_hand, capsys, tmp_path, monkeypatch, which, found):
    monkeypatch.chdir(tmp_path)
    assert by_hand.main(["--section", which]) == 0
    assert headings(capsys.readouterr().out) == found
    assert not list(tmp_path.iterdir())  # no picture of a part


@pytest.mark.parametrize("bad", [["--section", "6"], ["--section", "5."], ["--digits", "0"]])
def test_bad_options(by_hand, capsys, bad):
    with pytest.raises(SystemExit, match="2"):
        by_hand.main(bad)
    assert bad[0] in capsys.readouterr().err


def test_picture_has_every_weight_and_no_overlaps(by_hand):
    n, paper = by_hand.Network(), by_hand.Paper(4)
    figure = by_hand.draw(n, paper)
    figure.savefig(os.devnull, format="png")  # which lays it out
    for axes, output in zip(figure.axes, ("sigmoid", "softmax"), strict=True):
        texts = [text.get_text() for text in axes.texts]
        gradients = n.gradients(output)
        for number in (*n.W1.flat, *n.W2.flat):
            assert paper.short(number) in texts
        for gradient in (*gradients[1].flat, *gradients[3].flat):
            assert paper.number(gradient) in texts
        boxes = [text.get_window_extent() for text in axes.texts]
        for one, other in itertools.combinations(range(len(boxes)), 2):
            assert not boxes[one].overlaps(boxes[other]), (texts[one], texts[other])
        page = figure.bbox
        for box, text in zip(boxes, texts, strict=True):
            assert page.x0 < box.x0 < box.x1 < page.x1, text
            assert page.y0 < box.y0 < box.y1 < page.y1, text


def test_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BY_HAND)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # also where the package is not installed
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert headings(done.stdout) == SECTIONS
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "by_hand_out",
        "by_hand_out/by_hand.png",
    ]
    image = matplotlib.image.imread(tmp_path / "by_hand_out" / "by_hand.png")[..., :3]
    for half in np.array_split(image, 2):  # a network in each
        assert 0.02 < (half.min(-1) < 0.9).mean() < 0.5
