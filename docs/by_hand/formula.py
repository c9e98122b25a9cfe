"""A formula in NumPy and in the library, and rules that combine formulas."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from items import Array, Quantity

from torch_nnmath import reference as ref
from torch_nnmath.reference import Form, Forms, central_difference

Steps = str | dict[int, str]  # a template for the first entry, or one for each given position


@dataclass(frozen=True)
class Formula:
    """A formula's NumPy forms and the library's function, both of column vectors.

    A quantity's name is the left side of its text. Templates in `steps` take numbers from
    `values`, by name.
    """

    forms: Forms
    library: Callable[..., torch.Tensor]
    values: Mapping[str, Any]

    def value(self, formulas: str, text: str, *inputs: Array, steps: Steps = "") -> Quantity:
        columns = {
            "element": np.asarray(self.forms.element.value(*inputs)),
            "matrix": np.asarray(self.forms.matrix.value(*inputs)),
            "library": self.library(*map(torch.tensor, inputs)).numpy(),
            "numerical": None,
        }
        return self._make_quantity(formulas, text, columns, steps)

    def derivative(
        self,
        formulas: str,
        text: str,
        *inputs: Array,
        wrt: int = 0,
        part: Callable[[Array], Array] = np.asarray,
        name: str = "",
        steps: Steps = "",
    ) -> Quantity:
        """The derivative in input number `wrt`; `part` selects entries of the Jacobian."""
        columns = {
            "element": compute_jacobian(self.forms.element, inputs, wrt),
            "matrix": compute_jacobian(self.forms.matrix, inputs, wrt),
            "library": compute_library_jacobian(self.library, inputs, wrt),
            "numerical": self.differentiate(*inputs, wrt=wrt),
        }
        selected = {column: part(value) for column, value in columns.items()}
        return self._make_quantity(formulas, text, selected, steps, name)

    def differentiate(self, *inputs: Array, wrt: int = 0) -> Array:
        """Differentiates numerically, by central differences of the matrix form."""

        def f(v: Array) -> Any:
            return self.forms.matrix.value(*inputs[:wrt], v, *inputs[wrt + 1 :])

        return central_difference(f, inputs[wrt])

    def _make_quantity(
        self, formulas: str, text: str, columns: Any, steps: Steps, name: str = ""
    ) -> Quantity:
        templates = steps if isinstance(steps, dict) else {0: steps} if steps else {}
        filled = {i: look_up_numbers(line, self.values) for i, line in templates.items()}
        return Quantity(name or text.split(" = ")[0], formulas, text, columns, filled)


def look_up_numbers(template: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Turns "{W2[0][1]}·{a1[1]}" into ("{}·{}", W2[0][1], a1[1])."""
    formatter = string.Formatter()
    fields = [name for _, name, _, _ in formatter.parse(template) if name]
    numbers = (float(formatter.get_field(name, (), values)[0]) for name in fields)
    return re.sub(r"{.*?}", "{}", template), *numbers


def compute_jacobian(form: Form, inputs: Sequence[Array], wrt: int) -> Array:
    """Row by row from the pullback, of shape value.shape + input.shape; a loss's gradient."""
    value, pullback = form.rule(*inputs)
    if np.ndim(value) == 0:
        return pullback(1.0)[wrt]
    units = np.eye(value.size).reshape(value.size, *value.shape)
    rows = np.stack([pullback(unit)[wrt] for unit in units])
    return rows.reshape(value.shape + inputs[wrt].shape)


def compute_library_jacobian(
    function: Callable[..., torch.Tensor], inputs: Sequence[Array], wrt: int
) -> Array:
    """The same by backward passes through the library."""
    tensors = [torch.tensor(v) for v in inputs]

    def f(v: torch.Tensor) -> torch.Tensor:
        return function(*tensors[:wrt], v, *tensors[wrt + 1 :])

    return torch.autograd.functional.jacobian(f, tensors[wrt]).numpy()


def combine(rule: Callable[..., Any], *forms: Forms) -> Forms:
    """Builds a rule's element form from the element forms of `forms`, and its matrix form from
    their matrix forms."""
    return Forms(
        Form(lambda *v: rule(*(f.element.rule for f in forms), *v)),
        Form(lambda *v: rule(*(f.matrix.rule for f in forms), *v)),
    )


def set_base(forms: Forms, beta: float) -> Forms:
    return combine(lambda rule, *v: rule(*v, beta=beta), forms)


def compose(first: Forms, second: Forms) -> Forms:
    """second(first(z), ...), with the chain rule that E8 gets wrong."""

    def rule(f: Any, g: Any, z: Array, *rest: Array) -> Any:
        a, f_pullback = f(z)
        c, g_pullback = g(a, *rest)

        def pullback(d: Any) -> Any:
            da, *others = g_pullback(d)
            return *f_pullback(da), *others

        return c, pullback

    return combine(rule, first, second)


def compose_network(output_activation: str, loss: Forms) -> Forms:
    """x, W^{L−1}, b^{L−1}, W^L, b^L, t -> c."""

    def rule(net: Any, loss: Any, x: Any, W1: Any, b1: Any, W2: Any, b2: Any, t: Any) -> Any:
        a, net_pullback = net(x, [W1, W2], [b1, b2], "sigmoid", output_activation)
        c, loss_pullback = loss(a, t)

        def pullback(d: Any) -> Any:
            da, dt = loss_pullback(d)
            dx, (dW1, dW2), (db1, db2) = net_pullback(da)
            return dx, dW1, db1, dW2, db2, dt

        return c, pullback

    return combine(rule, ref.FEEDFORWARD, loss)


def compose_mean(loss: Forms, t: Array, t_: Array) -> Forms:
    """F3 of two examples with targets t and t': a, a' -> C."""

    def rule(loss: Any, cost: Any, a: Array, a_: Array) -> Any:
        (c, pullback), (c_, pullback_) = loss(a, t), loss(a_, t_)
        C, pullback_C = cost(ref.column([c, c_]))

        def pullbacks(d: Any) -> Any:
            (dc,), (dc_,) = pullback_C(d)[0]
            return pullback(dc)[0], pullback_(dc_)[0]

        return C, pullbacks

    return combine(rule, loss, ref.COST)
