"""Evaluates the LaTeX that the site's pages typeset, so that a test can compare it with SymPy's."""

import math
import re

TOKEN = re.compile(r"\\\\|\\[a-z]+|\\[,:]|[A-Za-z']|\d+|\S")
SPACE = {r"\,", r"\:"}
DECORATED = {r"\dot", r"\mathrm"}


class Evaluator:
    """A parser of products, sums, fractions, powers, indexed letters, ln, tanh, max and cases.

    `look_up` returns the number of a letter with its indices, `lengths` the number of values of
    each index. Raises ValueError for anything else.
    """

    def __init__(self, text, look_up, lengths):
        self.tokens = [token for token in TOKEN.findall(text) if token not in SPACE]
        self.look_up, self.lengths = look_up, lengths
        self.place = 0

    def evaluate(self, indices):
        self.place = 0
        value = self.add(dict(indices))
        if self.place != len(self.tokens):
            raise ValueError(f"cannot read {self.tokens[self.place :]}")
        return value

    def peek(self):
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self, expected=None):
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            raise ValueError(f"expected {expected}, found {token} in {' '.join(self.tokens)}")
        self.place += 1
        return token

    def add(self, indices):
        total = 0.0
        sign = -1 if self.peek() == "-" else 1
        if sign < 0:
            self.take()
        while True:
            total += sign * self.multiply(indices)
            if self.peek() not in ("+", "-"):
                return total
            sign = -1 if self.take() == "-" else 1

    def multiply(self, indices):
        product = self.power(indices)
        while self.peek() is not None and self.starts_factor():
            product *= self.power(indices)
        return product

    def starts_factor(self):
        token = self.peek()
        ends = {"+", "-", "}", ",", "&", r"\right", r"\\", r"\end", r"\leq", r"\text", "=", ")"}
        return token not in ends

    def power(self, indices):
        base = self.atom(indices)
        if self.peek() == "^":
            self.take()
            return base ** self.group(indices)
        return base

    def group(self, indices):
        self.take("{")
        value = self.add(indices)
        self.take("}")
        return value

    def atom(self, indices):
        token = self.peek()
        if token.isdigit():
            return float(self.take())
        if token == r"\left":
            return self.parentheses(indices)
        if token == r"\frac":
            self.take()
            return self.group(indices) / self.group(indices)
        if token == r"\sum":
            return self.sum(indices)
        if token in (r"\ln", r"\tanh"):
            return self.function(indices)
        if token == r"\max":
            self.take()
            return self.maximum(indices)
        if token == r"\begin":
            return self.cases(indices)
        return self.letter(indices)

    def parentheses(self, indices):
        self.take(r"\left")
        self.take("(")
        value = self.add(indices)
        self.take(r"\right")
        self.take(")")
        return value

    def sum(self, indices):
        self.take()
        index = self.read_names("_")[0]
        start, total = self.place, 0.0
        for number in range(self.lengths[index]):
            self.place = start
            total += self.multiply({**indices, index: number})
        return total

    def function(self, indices):
        function = {r"\ln": math.log, r"\tanh": math.tanh}[self.take()]
        power = 1.0
        if self.peek() == "^":
            self.take()
            power = self.group(indices)
        return function(self.atom(indices)) ** power

    def maximum(self, indices):
        self.take(r"\left")
        self.take("(")
        first = self.add(indices)
        self.take(",")
        second = self.add(indices)
        self.take(r"\right")
        self.take(")")
        return max(first, second)

    def cases(self, indices):
        """0 for a letter <= 0, else 1."""
        text = "".join(self.tokens[self.place :])
        found = re.fullmatch(
            r"\\begin\{cases\}0&\\text\{for\}(.+?)\\leq0\\\\1&\\text\{otherwise\}\\end\{cases\}",
            text,
        )
        if found is None:
            raise ValueError(f"cannot read {text}")
        self.place = len(self.tokens)
        value = Evaluator(found[1], self.look_up, self.lengths).evaluate(indices)
        return 0.0 if value <= 0 else 1.0

    def letter(self, indices):
        name = self.read_name()
        if name == "e" and self.peek() == "^":
            return math.e
        layer = ""
        if self.peek() == "^" and self.is_layer():
            self.take()
            layer = "^{" + "".join(self.read_braces()) + "}"
        names = self.read_names("_") if self.peek() == "_" else []
        numbers = tuple(indices[n] if n in indices else self.look_up(n, ()) for n in names)
        return self.look_up(name + layer, numbers)

    def is_layer(self):
        """Whether the exponent at this place is a layer, which has an index after it."""
        return self.tokens[self.place + 4 : self.place + 5] == ["_"]

    def read_name(self):
        token = self.take()
        if token in DECORATED:
            return f"{token}{{{''.join(self.read_braces())}}}"
        if token == "{":
            self.place -= 1
            return "".join(self.read_braces())
        if not re.fullmatch(r"[A-Za-z]|\\[a-z]+", token):
            raise ValueError(f"cannot read {token} in {' '.join(self.tokens)}")
        return token

    def read_braces(self):
        self.take("{")
        inside = []
        while self.peek() != "}":
            inside.append(self.take())
        self.take("}")
        return inside

    def read_names(self, mark):
        self.take(mark)
        return self.read_braces()
