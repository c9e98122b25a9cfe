"""The statements of the formulas' pages are proved, and their LaTeX says the same."""

import dataclasses
import math
import zlib

import numpy as np
import pytest
import sympy
from latex import Evaluator
from scripts import TOOLS, import_scripts
from sympy import Indexed, KroneckerDelta, Sum, Symbol

from torch_nnmath import verify
from torch_nnmath.catalog import CATALOG

ROWS = pytest.mark.parametrize("row", CATALOG, ids=lambda row: row.name)


@pytest.fixture(scope="module")
def modules():
    names = ("statements", "formula_statements", "document", "plots")
    with import_scripts(*names, folder=TOOLS / "website") as modules:
        yield dict(zip(names, modules, strict=True))


@pytest.fixture(scope="module")
def statements(modules):
    return modules["statements"]


@pytest.fixture(scope="module")
def all_statements(modules):
    return modules["formula_statements"].STATEMENTS


def list_expressions(statement):
    yield from statement.where.items()
    yield statement.value
    yield from statement.partials.items()
    yield statement.value[0], statement.tangent
    yield from statement.seconds.items()
    yield from statement.products.items()
    yield from statement.where_products.items()


def test_every_formula_has_a_statement_and_no_other_exists(modules, all_statements):
    titles = [row.title for row in CATALOG]
    assert sorted(all_statements) == sorted(titles)
    assert modules["document"].PRINTED.keys() <= set(titles)
    assert modules["plots"].PICTURES.keys() <= set(titles)
    for row in CATALOG:
        is_in_document = row.section not in ("head", "scale", "tuning")
        assert (row.title in modules["document"].PRINTED) == is_in_document


@ROWS
def test_statement_is_proved_by_the_reference(statements, all_statements, row):
    statement = all_statements[row.title]
    entries = statements.prove(row, statement)
    assert entries > len(statement.partials)
    inputs = set(row.samples[0].inputs)
    assert {str(name) for name in statement.inputs} == inputs
    for variables in (statement.partials, statement.products):
        letters = {statements.split(variable)[0] for variable in variables}
        assert not variables or letters == set(statement.inputs.values())
    assert not (statement.products and statement.seconds)  # either says all


@pytest.mark.parametrize("part", ["value", "partials", "tangent", "seconds", "missing seconds"])
def test_wrong_statement_is_refused(statements, all_statements, part):
    row = next(row for row in CATALOG if row.title == "squared error")
    statement = all_statements[row.title]
    a, t = statement.partials
    wrong = {
        "value": (statement.value[0], 2 * statement.value[1]),
        "partials": {a: statement.partials[t]},  # the document's sign
        "tangent": -statement.tangent,
        "seconds": dict.fromkeys(statement.seconds, sympy.Integer(2)),
        "missing seconds": {},
    }
    changes = {part.split()[-1]: wrong[part]}
    with pytest.raises(verify.Wrong):
        statements.prove(row, dataclasses.replace(statement, **changes))


@pytest.mark.parametrize("part", ["products", "where_products"])
def test_wrong_product_of_hessian_and_vector_is_refused(statements, all_statements, part):
    row = next(row for row in CATALOG if row.title == "log-probability of a class")
    statement = all_statements[row.title]
    last = list(getattr(statement, part).items())[-1]
    wrong = getattr(statement, part) | {last[0]: 2 * last[1]}
    with pytest.raises(verify.Wrong):
        statements.prove(row, dataclasses.replace(statement, **{part: wrong}))


# LaTeX

GREEK = ("alpha", "beta", "tau", "zeta")
LETTERS = {"cap": r"\kappa", "mix": r"\mu", **{name: rf"\{name}" for name in GREEK}}


def draw(letter, place):
    """Returns a number in [0.5, 1.5] for a letter with its indices, always the same."""
    return 0.5 + zlib.crc32(f"{letter}{place}".encode()) / 2**32


class Values:
    """The numbers of letters: constants, Kronecker's delta, else random ones."""

    def __init__(self, statement):
        self.constants = {str(letter): n for letter, n in statement.constants.items()}

    def look_up(self, letter, place):
        if letter in self.constants:
            return np.asarray(self.constants[letter])[tuple(map(int, place))]
        if letter == r"\delta" and len(place) == 2:
            return float(place[0] == place[1])
        return draw(letter, tuple(map(int, place)))


def evaluate(expression, indices, values, lengths):
    """Returns the number that SymPy's expression has, with the same numbers for letters."""

    def go(e, indices):
        if isinstance(e, Sum):
            ((index, *_),) = e.limits
            numbers = range(lengths[str(index)])
            return sum(go(e.function, {**indices, str(index): n}) for n in numbers)
        if isinstance(e, Indexed):
            place = tuple(go(index, indices) for index in e.indices)
            return values.look_up(str(e.base.label), place)
        if isinstance(e, KroneckerDelta):
            return float(go(e.args[0], indices) == go(e.args[1], indices))
        if isinstance(e, Symbol):
            name = LETTERS.get(e.name, e.name)
            return indices[name] if name in indices else values.look_up(name, ())
        if isinstance(e, sympy.Piecewise):
            return 0.0 if go(e.args[0][1].args[0], indices) <= 0 else 1.0
        parts = [go(part, indices) for part in e.args]
        functions = {
            sympy.Add: lambda *parts: math.fsum(parts),
            sympy.Mul: lambda *parts: math.prod(parts),
            sympy.Pow: lambda base, power: base**power,
            sympy.exp: math.exp,
            sympy.log: math.log,
            sympy.tanh: math.tanh,
            sympy.Max: max,
        }
        return functions[e.func](*parts) if e.args else float(e)

    return go(expression, indices)


@ROWS
def test_latex_has_the_value_of_the_proved_expression(statements, all_statements, row):
    statement = all_statements[row.title]
    values = Values(statement)
    lengths = {str(index): length for index, length in statement.lengths.items()}
    for left, right in list_expressions(statement):
        text = statements.typeset(right)
        evaluator = Evaluator(text, values.look_up, lengths)
        for n in range(2):  # all indices 0, and all different
            indices = {name: (n * i) % lengths[name] for i, name in enumerate(sorted(lengths))}
            expected = evaluate(right, indices, values, lengths)
            assert evaluator.evaluate(indices) == pytest.approx(expected, rel=1e-12), (left, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"a_{j} \, \left(1 - a_{k}\right)", lambda a, b: a * (1 - b)),
        (r"a_{j} \, - \frac{2}{3} \, a_{k}", lambda a, b: a - 2 / 3 * b),
        (r"- \frac{a_{j}}{2 \, a_{k}^{2}}", lambda a, b: -a / (2 * b**2)),
        (r"\sum_{j} a_{j} \, a_{k} + 1", lambda a, b: (b + a) * b + 1),
    ],
)
def test_evaluator_reads_latex_as_a_reader_does(text, value):
    evaluator = Evaluator(text, draw, {"j": 2, "k": 2})
    a, b = draw("a", (0,)), draw("a", (1,))
    assert evaluator.evaluate({"j": 0, "k": 1}) == pytest.approx(value(a, b))
