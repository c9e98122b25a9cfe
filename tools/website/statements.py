"""What the formulas' pages state, as SymPy's expressions; how these are typeset and proved.

A statement has a formula's value, its partial derivatives, its tangent and second derivatives. Each
is an expression with indices and sums, for any sizes. `typeset` writes it in LaTeX. `prove` puts in
numbers for the indices and compares the result, as symbols, with the derivatives of the reference
form that `python -m torch_nnmath verify` proves (`torch_nnmath.reference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
from sympy import Expr, Indexed, KroneckerDelta, Sum, Symbol
from sympy.printing.latex import LatexPrinter

from torch_nnmath import verify
from torch_nnmath.catalog import Row

Equations = Mapping[Expr, Expr]


@dataclass(frozen=True)
class Statement:
    """The value of a formula and its derivatives, each `left: right` with free indices.

    `value` is the formula itself. `where` defines the other letters, which may use each other.
    `partials` has the derivative in each input and `tangent` the one in forward mode. The second
    order is in one of two forms: `seconds` has the second derivatives in pairs of inputs, and all
    others are 0; or `products` has, for each input, the derivative of its partial derivative along
    a direction of all inputs, and `where_products` defines more letters for it. `lengths` has the
    number of values of each index in the catalogue's first sample, `inputs` the letter of each of
    that sample's inputs, and `constants` the numbers of letters such as N, an array for a letter
    with indices. `note` says in words what the equations do not.
    """

    value: tuple[Expr, Expr]
    partials: Equations
    tangent: Expr
    inputs: Mapping[str, Any]
    lengths: Mapping[Symbol, int]
    seconds: Mapping[tuple[Expr, Expr], Expr] = field(default_factory=dict)
    products: Equations = field(default_factory=dict)
    where: Equations = field(default_factory=dict)
    where_products: Equations = field(default_factory=dict)
    constants: Mapping[Any, Any] = field(default_factory=dict)
    note: str = ""

    def left_of_partial(self, variable: Expr) -> str:
        return rf"\frac{{\partial {typeset(self.value[0])}}}{{\partial {typeset(variable)}}}"

    def left_of_second(self, first: Expr, second: Expr) -> str:
        value, first_text, second_text = map(typeset, (self.value[0], first, second))
        return rf"\frac{{\partial^2 {value}}}{{\partial {first_text}\,\partial {second_text}}}"

    def left_of_product(self, variable: Expr) -> str:
        return rf"\mathrm{{D}}\,{self.left_of_partial(variable)}"

    @property
    def left_of_tangent(self) -> str:
        return typeset(dot(self.value[0]))


def dot(symbol: Any) -> Any:
    """Returns the tangent of an input or a value: the same letter with a dot."""
    if isinstance(symbol, Indexed):
        return dot(symbol.base)[symbol.indices]
    name = str(symbol.label if isinstance(symbol, sympy.IndexedBase) else symbol)
    letter, mark, rest = name.partition("^")
    return type(symbol)(rf"\dot{{{letter}}}{mark}{rest}")


def over(index: Symbol, body: Any) -> Sum:
    """Returns the sum over all values of an index."""
    return Sum(body, (index, 0, Symbol("N", integer=True)))


def kronecker(first: Any, second: Any) -> Any:
    return KroneckerDelta(first, second)


# Typesetting


class Printer(LatexPrinter):
    """Writes expressions as they were built: SymPy's own order of terms is not that of a book."""

    def __init__(self) -> None:
        super().__init__({"order": "none", "ln_notation": True})

    def _print_Symbol(self, expression: Symbol, style: str = "plain") -> str:
        names = {"cap": r"\kappa", "mix": r"\mu"}
        return names.get(expression.name) or super()._print_Symbol(expression, style)

    def _print_Indexed(self, expression: Indexed) -> str:
        letter, mark, layer = str(expression.base.label).partition("^")
        letter = f"{{{letter}}}" if letter.endswith("'") else letter
        indices = " ".join(map(self._print, expression.indices))
        return f"{letter}{mark}{layer}_{{{indices}}}"

    def _print_Sum(self, expression: Sum) -> str:
        body = self._print(expression.function)
        if isinstance(expression.function, sympy.Add):
            body = rf"\left({body}\right)"
        return rf"\sum_{{{self._print(expression.limits[0][0])}}} {body}"

    def _as_ordered_terms(self, expr: Expr, order: str | None = None) -> list[Expr]:
        return list(flatten_sum(expr))

    def _print_Mul(self, expression: sympy.Mul) -> str:
        coefficient, pieces = 1, []  # a piece is a list of factors, or a fraction as text
        for factor in flatten_product(expression):
            if factor.is_Integer:
                coefficient *= int(factor)
            elif isinstance(factor, sympy.Pow) and factor.exp == -1:
                is_open = bool(pieces) and isinstance(pieces[-1], list)
                above = pieces.pop() if is_open and all(map(is_short, pieces[-1])) else []
                if not any(isinstance(piece, str) for piece in pieces) and abs(coefficient) != 1:
                    above, coefficient = (
                        [sympy.Integer(abs(coefficient)), *above],
                        sign(coefficient),
                    )
                pieces.append(
                    rf"\frac{{{self.print_product(above) or 1}}}{{{self._print(factor.base)}}}"
                )
            elif pieces and isinstance(pieces[-1], list):
                pieces[-1].append(factor)
            else:
                pieces.append([factor])
        texts = [
            p if isinstance(p, str) else self.print_product(p, p is pieces[-1]) for p in pieces
        ]
        if abs(coefficient) != 1:
            texts.insert(0, str(abs(coefficient)))
        return ("- " if coefficient < 0 else "") + r" \, ".join(texts)

    def print_product(self, factors: list[Expr], is_last: bool = True) -> str:
        texts = []
        for i, factor in enumerate(factors):
            text = self._print(factor)
            is_last_sum = isinstance(factor, Sum) and is_last and i == len(factors) - 1
            if isinstance(factor, sympy.Add) or (isinstance(factor, Sum) and not is_last_sum):
                text = rf"\left({text}\right)"
            texts.append(text)
        return r" \, ".join(texts)

    def _print_log(self, expression: sympy.log, exp: str | None = None) -> str:
        return self.print_function(r"\ln", expression, exp)

    def _print_tanh(self, expression: sympy.tanh, exp: str | None = None) -> str:
        return self.print_function(r"\tanh", expression, exp)

    def print_function(self, name: str, expression: Any, exp: str | None) -> str:
        (argument,) = expression.args
        power = "" if exp is None else f"^{{{exp}}}"
        text = self._print(argument)
        is_letter = isinstance(argument, Indexed | Symbol | Sum)
        return f"{name}{power} {text}" if is_letter else rf"{name}{power}\left({text}\right)"


def flatten_sum(expression: Expr) -> Iterator[Expr]:
    """Yields the terms of a sum, and those of the sums within it."""
    for term in expression.args if isinstance(expression, sympy.Add) else [expression]:
        yield from flatten_sum(term) if isinstance(term, sympy.Add) else [term]


def flatten_product(expression: Expr) -> Iterator[Expr]:
    """Yields the factors of a product; a fraction a/b within it stays one factor."""
    if not isinstance(expression, sympy.Mul):
        yield expression
        return
    for factor in expression.args:
        if isinstance(factor, sympy.Rational) and not factor.is_Integer:
            yield sympy.Integer(factor.p)
            yield sympy.Pow(sympy.Integer(factor.q), -1, evaluate=False)
        elif isinstance(factor, sympy.Mul) and is_fraction(factor):
            numbers = [part for part in factor.args if part.is_Integer]
            rest = [part for part in factor.args if not part.is_Integer]
            yield sympy.Mul(*numbers)
            yield sympy.Mul(*rest, evaluate=False)
        elif isinstance(factor, sympy.Mul):
            yield from flatten_product(factor)
        else:
            yield factor


def is_fraction(product: sympy.Mul) -> bool:
    """Whether the product has a factor in the denominator and one above it that is no number."""
    factors = [factor for factor in product.args if not factor.is_Integer]
    return len(factors) > 1 and any(isinstance(f, sympy.Pow) and f.exp == -1 for f in factors)


def is_short(factor: Expr) -> bool:
    """Whether the factor may stand above a fraction's line beside others."""
    return not isinstance(factor, sympy.Add | Sum | sympy.Mul)


def sign(number: int) -> int:
    return -1 if number < 0 else 1


def typeset(expression: Expr) -> str:
    """Returns the expression in LaTeX."""
    return Printer().doprint(expression)


# Proof


class Ground:
    """Expressions with numbers for their indices, in the symbols of the reference."""

    def __init__(self, row: Row, statement: Statement):
        self.statement = statement
        self.symbols = {
            statement.inputs[name]: verify.make_symbols(name, spec)
            for name, spec in row.samples[0].inputs.items()
        }
        self.tangents = {
            letter: verify.make_symbols(f"d{name}", spec)
            for (name, spec), letter in zip(
                row.samples[0].inputs.items(), self.symbols, strict=True
            )
        }
        self.letters: dict[Any, Any] = {}
        for letter, entries in self.symbols.items():
            self.letters[letter] = entries
            self.letters[dot(letter)] = self.tangents[letter]
        left, right = statement.value
        self.definitions = {**statement.where, **statement.where_products, left: right}

    def __call__(self, expression: Any, indices: Mapping[Any, int]) -> Any:
        """Returns the expression without sums, indices and defined letters."""
        if isinstance(expression, Sum):
            ((index, *_),) = expression.limits
            numbers = range(self.statement.lengths[index])
            return sympy.Add(*(self(expression.function, {**indices, index: n}) for n in numbers))
        if isinstance(expression, Indexed):
            place = tuple(self(index, indices) for index in expression.indices)
            return self.look_up(expression.base, tuple(map(int, place)))
        if isinstance(expression, Symbol):
            if expression in indices:
                return sympy.Integer(indices[expression])
            return self.look_up(expression, ())
        if not expression.args:
            return expression
        return expression.func(*(self(part, indices) for part in expression.args))

    def look_up(self, letter: Any, place: tuple[int, ...]) -> Any:
        for left, right in self.definitions.items():
            base, names = split(left)
            if base == letter:
                return self(right, dict(zip(names, place, strict=True)))
        if letter in self.letters:
            entries = self.letters[letter]
            return entries[place] if place else entries.item()
        if letter in self.statement.constants:
            return sympy.Integer(np.asarray(self.statement.constants[letter])[place])
        return letter

    def list_indices(self, *expressions: Expr) -> Iterator[dict[Any, int]]:
        """Yields every choice of numbers for the indices of inputs and values."""
        names = list(dict.fromkeys(n for e in expressions for n in split(e)[1]))
        names = [name for name in names if name not in self.statement.constants]
        ranges = [range(self.statement.lengths[name]) for name in names]
        for numbers in itertools.product(*ranges):
            yield dict(zip(names, numbers, strict=True))

    def list_variables(self) -> list[tuple[Any, Any]]:
        """Returns each entry of each input with its tangent."""
        return [
            pair
            for letter, entries in self.symbols.items()
            for pair in zip(entries.ravel(), self.tangents[letter].ravel(), strict=True)
        ]

    def list_biases(self) -> dict[Any, tuple[Any, Any]]:
        """Returns, for each bias b of an affine map z = ... + b, the symbol z and z - ... of it.

        A later layer's comes first, since it contains biases of the layers before.
        """
        biases: dict[Any, tuple[Any, Any]] = {}
        for left, right in self.statement.where.items():
            terms = sympy.Add.make_args(right)
            for bias in (term for term in terms if split(term)[0] in self.letters):
                for indices in self.list_indices(left):
                    rest = sum(self(term, indices) for term in terms if term != bias)
                    if sympy.expand(rest).is_polynomial():
                        z = sympy.Dummy("z")
                        biases = {self(bias, indices): (z, z - sympy.expand(rest))} | biases
        return biases


def split(left: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the letter and the indices of a[j] or of a letter alone."""
    if isinstance(left, Indexed):
        return left.base, left.indices
    return left, ()


def prove(row: Row, statement: Statement) -> int:
    """Proves each equation of the statement and returns the number of proved entries.

    Raises `verify.Wrong` if the reference's value or one of its derivatives is another.
    """
    ground = Ground(row, statement)
    values = evaluate_reference(row)
    count = 0

    def compare(expression: Any, indices: dict[Any, int], expected: Any, name: str) -> None:
        nonlocal count
        count += 1
        difference = separate_exponentials(ground(expression, indices) - expected)
        verify.prove_zero(difference, f"{name} at {indices}")

    left, right = statement.value

    def get_value(indices: dict[Any, int]) -> Any:
        place = tuple(indices[name] for name in split(left)[1])
        return values[place] if place else values.item()

    for indices in ground.list_indices(left):
        value = get_value(indices)
        compare(right, indices, value, "value")
        tangent = sum(sympy.diff(value, x) * dx for x, dx in ground.list_variables())
        compare(statement.tangent, indices, tangent, "tangent")
    for variable, partial in statement.partials.items():
        for indices in ground.list_indices(left, variable):
            expected = sympy.diff(get_value(indices), ground(variable, indices))
            compare(partial, indices, expected, f"derivative in {variable}")
    if statement.products:
        return count + prove_products(ground)
    listed = set()
    for (first, second), expression in statement.seconds.items():
        for indices in ground.list_indices(left, first, second):
            pair = ground(first, indices), ground(second, indices)
            listed |= {pair, pair[::-1]}
            expected = sympy.diff(get_value(indices), *pair)
            compare(expression, indices, expected, f"derivative in {first} and {second}")
    variables = [x for x, _ in ground.list_variables()]
    for indices in ground.list_indices(left):
        for pair in itertools.combinations_with_replacement(variables, 2):
            if pair not in listed:
                compare(sympy.Integer(0), indices, sympy.diff(get_value(indices), *pair), "")
    return count


def prove_products(ground: Ground) -> int:
    """Proves that each product is the directional derivative of a partial derivative.

    The statement's partial derivatives are proved before. Instead of a bias b, z = ... + b is a
    variable here, so that the exponents are short.
    """
    statement, biases = ground.statement, ground.list_biases()

    def evaluate(expression: Any, indices: dict[Any, int]) -> Any:
        result = sympy.sympify(ground(expression, indices))
        for bias, (_, replacement) in biases.items():
            result = result.subs(bias, replacement)
        return result

    def change(variable: Any) -> Any:
        return biases[variable][0] if variable in biases else variable

    pairs = [(change(x), change(dx)) for x, dx in ground.list_variables()]
    count = 0
    for variable, product in statement.products.items():
        for indices in ground.list_indices(statement.value[0], variable):
            partial = evaluate(statement.partials[variable], indices)
            expected = sum(sympy.diff(partial, x) * dx for x, dx in pairs)
            difference = separate_exponentials(evaluate(product, indices) - expected)
            verify.prove_zero(difference, f"product for {variable} at {indices}")
            count += 1
    return count


def separate_exponentials(expression: Any) -> Any:
    """Returns the expression with a symbol for the exponential of each term of an exponent.

    So e^(2u + 2v) is the square of e^(u + v) also for SymPy. A logarithm's argument is
    expanded, so that 1 - u and -(u - 1) are one.
    """
    symbols: dict[Any, Any] = {}

    def separate(argument: Any) -> Any:
        terms = (term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(argument)))
        return sympy.Mul(
            *(
                symbols.setdefault(rest, sympy.Dummy(positive=True)) ** coefficient
                for coefficient, rest in terms
            )
        )

    separated = sympy.sympify(expression).replace(sympy.exp, separate)
    return separated.replace(sympy.log, lambda argument: sympy.log(sympy.expand(argument)))


def evaluate_reference(row: Row) -> Any:
    """Returns the value of the reference's element form, as an array of expressions."""
    columns = []
    for name, spec in row.samples[0].inputs.items():
        symbols = verify.make_symbols(name, spec)
        columns.append(symbols if symbols.ndim == 2 else symbols[:, None])
    options = verify.make_symbolic_options(row)
    value = row.reference.element.value(*columns, fn=verify.SYMBOLIC, **options)
    array = np.asarray(value, dtype=object)
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


__all__ = ["Statement", "dot", "kronecker", "over", "prove", "typeset"]
