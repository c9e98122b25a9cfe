"""docs/by_hand: the columns agree, every formula and slip is printed, `--check` detects errors."""

import dataclasses
import itertools
import os
import re

import matplotlib.image
import numpy as np
import pytest
from scripts import DOCS, has_ink, import_scripts, list_files, run_script

from torch_nnmath import functional, reference
from torch_nnmath.reference import Form, Forms

FOLDER = DOCS / "by_hand"
FORMULAS = {f"F{i}" for i in range(1, 18)}
SLIPS = {f"E{i}" for i in range(1, 18)}
SECTIONS = [
    *("1", "2", "2.1", "2.2", "3", "3.1", "3.2", "4"),
    *("5", "5.1", "5.1.1", "5.1.2", "5.2", "5.2.1", "5.2.2", "A", "B"),
]


@pytest.fixture(scope="module")
def modules():
    names = ("by_hand", "items", "network", "page")
    with import_scripts(*names, folder=FOLDER) as modules:
        yield dict(zip(names, modules, strict=True))


@pytest.fixture(scope="module")
def by_hand(modules):
    return modules["by_hand"]


@pytest.fixture(scope="module")
def items(modules):
    return modules["items"]


@pytest.fixture(scope="module")
def formatter(by_hand):
    return by_hand.Formatter(4)


@pytest.fixture(scope="module")
def pages(by_hand):
    return by_hand.build_pages()


@pytest.fixture(scope="module")
def text(formatter, pages):
    return "\n".join(formatter.format_pages(pages))


@pytest.fixture(scope="module")
def quantities(items, pages):
    return [item for _, page in pages for item in page if isinstance(item, items.Quantity)]


@pytest.fixture(scope="module")
def slips(items, pages):
    return [item for _, page in pages for item in page if isinstance(item, items.Slip)]


def find_headings(text):
    """Returns the section numbers, which stand in the lines above the rules."""
    return [
        above.split()[0] for above, rule in itertools.pairwise(text.splitlines()) if "──" in rule
    ]


@pytest.mark.parametrize("digits", [4, 9])
def test_printed_columns_agree_to_their_digits(by_hand, pages, quantities, digits):
    text = "\n".join(by_hand.Formatter(digits).format_pages(pages))
    rows = re.findall(r"^ {13}(\S.*?) {2,}(-?\d.*)$", text, re.M)
    assert len(rows) == sum(np.size(quantity.columns["element"]) for quantity in quantities)
    derivatives = 0
    for name, cells in rows:
        numbers = [float(cell) for cell in cells.split()]
        # Rounding may go either way; central differences are accurate to about 1e-9.
        assert max(numbers) - min(numbers) < 1.01 * 10.0**-digits + 1e-8, name
        is_derivative = "/d" in name or "'(" in name
        assert len(numbers) == (4 if is_derivative or name.startswith("J_") else 3), name
        derivatives += is_derivative
    assert derivatives > 100


def test_printed_arithmetic_evaluates_to_printed_result(items, text):
    # With the rounded numbers, as a reader evaluates it.
    lines = re.findall(r"^ {11}(\S.*?) = (.*) = (-?[\d.]+)$", text, re.M)
    assert len(lines) > 20
    for name, steps, result in lines:
        assert items.evaluate(steps, []) == pytest.approx(float(result), abs=1e-3), name


def test_pages_print_every_formula_slip_and_section(quantities, slips, text):
    assert {f for quantity in quantities for f in quantity.formulas.split(", ")} == FORMULAS
    assert {slip.id for slip in slips} == SLIPS
    assert set(re.findall(r"\bF\d+\b", text)) >= FORMULAS
    assert set(re.findall(r"^ {2}(E\d+) slip", text, re.M)) == SLIPS
    assert find_headings(text) == SECTIONS


def test_every_slip_has_a_visible_error(formatter, pages, slips):
    for slip in slips:
        name, printed, correct = slip.worst_entry
        assert slip.error > 0.1, slip.id
        assert abs(printed - correct) > 1e-3, (slip.id, name)
        assert slip.printed_formula != slip.correct_formula
    # The products that do not fit were tried.
    assert sum("do not fit" in slip.shape_mismatch for slip in slips) == 3  # E5, E7, E12
    table = "\n".join(formatter.format_slips(pages))
    assert set(re.findall(r"^(E\d+) ", table, re.M)) == SLIPS


def test_values_of_three_slips_equal_plain_numpy(slips):
    first = {slip.id: slip for slip in reversed(slips)}
    z = np.array([[0.7, -0.5, 0.3], [-0.4, 0.6, 0.9]]) @ (1 / (1 + np.exp([-0.9, -0.1, 0.7]))) + [
        0.2,
        -0.1,
    ]
    t, a, p = np.array([1, 0.5]), 1 / (1 + np.exp(-z)), np.exp(z) / np.exp(z).sum()
    np.testing.assert_allclose(first["E1"].printed_value[:, 0], t - a)
    np.testing.assert_allclose(first["E1"].correct_value[:, 0], a - t, atol=1e-9)
    np.testing.assert_allclose(first["E6"].printed_value[:, 0], (p - t) / np.log(2))
    np.testing.assert_allclose(
        first["E6"].correct_value[:, 0], (1.5 * p - t) / np.log(2), atol=1e-8
    )
    np.testing.assert_allclose(first["E9"].printed_value, 0, atol=1e-15)
    np.testing.assert_allclose(first["E9"].correct_value, np.diag(p) - np.outer(p, p), atol=1e-9)


def test_check_passes(by_hand, capsys):
    assert by_hand.main(["--check"]) == 0
    assert "none wrong" in capsys.readouterr().out


def scale(v):
    if isinstance(v, tuple | list):
        return type(v)(map(scale, v))
    return v * 1.001


def break_form(form, part):
    def rule(*inputs, **options):
        value, pullback = form.rule(*inputs, **options)
        if part == "value":
            return scale(value), pullback
        return value, lambda g: scale(pullback(g))

    return Form(rule)


FORMS = (
    *("AFFINE", "SIGMOID", "TANH", "RELU", "SOFTMAX", "COST", "SQUARED_ERROR", "CROSS_ENTROPY"),
    *("CATEGORICAL_CROSS_ENTROPY", "SIGMOID_SQUARED_ERROR", "LINEAR_CROSS_ENTROPY", "FEEDFORWARD"),
)
ERRORS = [
    *itertools.product(FORMS, ("element", "matrix"), ("value", "pullback")),
    *itertools.product(["SOFTMAX_JACOBIAN"], ("element", "matrix"), ["value"]),
]


@pytest.mark.parametrize(("name", "side", "part"), ERRORS)
def test_check_detects_wrong_form(by_hand, monkeypatch, capsys, name, side, part):
    forms = getattr(reference, name)
    sides = {"element": forms.element, "matrix": forms.matrix}
    sides[side] = break_form(sides[side], part)
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
def test_check_detects_wrong_library_function(by_hand, monkeypatch, capsys, name):
    function = getattr(functional, name)
    monkeypatch.setattr(
        functional, name, lambda *args, **options: 1.001 * function(*args, **options)
    )
    assert by_hand.main(["--check"]) == 1
    assert "library" in capsys.readouterr().out


def test_find_errors_detects_wrong_arithmetic_equation_and_slip(by_hand, items, pages):
    quantity = by_hand.build_pages("2.1")[0][1][0]
    assert dataclasses.replace(quantity, steps={0: ("{} + {}", 1.0, 2.0)}).find_errors()
    A, B = np.eye(2), np.ones((2, 1))
    assert not items.Equation("y =", "=", A, "·", B, "=", B).find_errors()
    assert items.Equation("y =", "=", A, "·", B, "=", 2 * B).find_errors()
    assert items.Slip("E1", "c", "x", "y", B, B, "").find_errors()
    # At least ten equations on the pages have two sides, so that they can be wrong.
    equations = [item for _, page in pages for item in page if isinstance(item, items.Equation)]
    assert sum(str(equation.pieces[1]) == "=" for equation in equations) >= 10


@pytest.mark.parametrize(
    ("section", "headings"),
    [
        ("5.1", ["5.1", "5.1.1", "5.1.2"]),
        ("5.1.2", ["5.1.2"]),
        ("2", ["2", "2.1", "2.2"]),
        ("B", ["B"]),
    ],
)
def test_section_option_prints_subsections_without_picture(
    by_hand, capsys, tmp_path, monkeypatch, section, headings
):
    monkeypatch.chdir(tmp_path)
    assert by_hand.main(["--section", section]) == 0
    assert find_headings(capsys.readouterr().out) == headings
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [["--section", "6"], ["--section", "5."], ["--digits", "0"]])
def test_invalid_option_exits_with_status_2(by_hand, capsys, bad):
    with pytest.raises(SystemExit, match="2"):
        by_hand.main(bad)
    assert bad[0] in capsys.readouterr().err


def test_picture_shows_every_weight_without_overlaps(by_hand, formatter):
    n = by_hand.Network()
    figure = by_hand.draw(n, formatter)
    figure.savefig(os.devnull, format="png")  # computes the layout
    page = figure.bbox
    for text in figure.texts:  # the title and the caption
        box = text.get_window_extent()
        assert page.x0 < box.x0 < box.x1 < page.x1
    for axes, output_activation in zip(figure.axes, ("sigmoid", "softmax"), strict=True):
        texts = [text.get_text() for text in axes.texts]
        gradients = n.compute_gradients(output_activation)
        for number in (*n.W1.flat, *n.W2.flat):
            assert formatter.format_short(number) in texts
        for gradient in (*gradients[1].flat, *gradients[3].flat):
            assert formatter.format_number(gradient) in texts
        boxes = [text.get_window_extent() for text in axes.texts]
        for one, other in itertools.combinations(range(len(boxes)), 2):
            assert not boxes[one].overlaps(boxes[other]), (texts[one], texts[other])
        for box, text in zip(boxes, texts, strict=True):
            assert page.x0 < box.x0 < box.x1 < page.x1, text
            assert page.y0 < box.y0 < box.y1 < page.y1, text


def test_command_prints_committed_text_and_saves_picture(tmp_path):
    done = run_script(FOLDER / "by_hand.py", folder=tmp_path)
    assert find_headings(done.stdout) == SECTIONS
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout == (FOLDER / "by_hand.txt").read_text(encoding="utf-8")
    assert list_files(tmp_path) == ["by_hand_out", "by_hand_out/by_hand.png"]
    image = matplotlib.image.imread(tmp_path / "by_hand_out" / "by_hand.png")[..., :3]
    for half in np.array_split(image, 2):  # a network in each
        assert has_ink(half)
