"""`python -m torch_nnmath verify`: every formula of the catalog, proved and compared."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_nnmath.catalog import CATALOG, EXAMPLES, Input, Row, Sample
from torch_nnmath.reference import Elementary, Form

SYMBOLIC = Elementary(
    exp=np.frompyfunc(sympy.exp, 1, 1),
    log=np.frompyfunc(sympy.log, 1, 1),
    maximum=np.frompyfunc(sympy.Max, 2, 1),
    tanh=np.frompyfunc(sympy.tanh, 1, 1),
)


class Wrong(AssertionError):
    """A formula that is not what it should be; the message says by how much."""


def proof(row: Row, device: str) -> None:
    """The reference, exactly: its pullback is its value's derivative, and both forms are one."""
    columns, leaves = [], []
    for name, spec in row.samples[0].inputs.items():
        symbols = _symbols(name, spec)
        columns.append(symbols if symbols.ndim == 2 else symbols[:, None])
        leaves.append(symbols.ravel())
    options = dict(row.options)
    if "beta" in options:
        options["beta"] = sympy.Symbol("beta", positive=True)
    forms = (row.reference.element, row.reference.matrix)
    values = [_flat(form.value(*columns, fn=SYMBOLIC, **options)) for form in forms]
    for i, (element, matrix) in enumerate(zip(*values, strict=True)):
        _prove_zero(element - matrix, f"element form minus matrix form, entry {i}")
    value = forms[0].value(*columns, fn=SYMBOLIC, **options)
    g = _symbols("g", Input(np.shape(value)))
    contracted = sum(map(sympy.Mul, _flat(g), values[0]))
    for form in forms:
        gradients = form.pullback(g if g.ndim else g.item(), *columns, fn=SYMBOLIC, **options)
        for symbols, gradient in zip(leaves, gradients, strict=True):
            for symbol, entry in zip(symbols, _flat(gradient), strict=True):
                _prove_zero(sympy.diff(contracted, symbol) - entry, f"derivative in {symbol}")


def value(row: Row, device: str) -> None:
    """The library's values against both reference forms."""
    sample = row.samples[0]
    inputs = sample.draw(device=device)
    got = sample.call(*inputs)
    for form in (row.reference.element, row.reference.matrix):
        members = [form.value(*one, **row.options) for one in _examples(sample, inputs)]
        want = np.stack([np.asarray(member, float) for member in members])
        _compare(got, want, "value")


def gradient(row: Row, device: str) -> None:
    """Gradients against the reference's, and those of all samples against numerical ones."""
    sample = row.samples[0]
    inputs = sample.draw(device=device)
    out = sample.call(*inputs)
    g = torch.tensor(np.random.default_rng(1).normal(size=out.shape), device=device)
    got = torch.autograd.grad(out, inputs, g)
    for form in (row.reference.element, row.reference.matrix):
        for name, mine, want in zip(
            sample.inputs, got, _pulled_back(form, row, inputs, g), strict=True
        ):
            _compare(mine, want, f"gradient in {name}")
    for each in row.samples:
        _numerically(gradcheck, each, device, fast_mode=False)


def second_order(row: Row, device: str) -> None:
    """Second derivatives of all samples, reverse over reverse and forward over reverse."""
    for sample in row.samples:
        _numerically(gradgradcheck, sample, device, check_fwd_over_rev=True)


def forward_mode(row: Row, device: str) -> None:
    """Tangents of all samples."""
    for sample in row.samples:
        _numerically(gradcheck, sample, device, check_forward_ad=True, check_backward_ad=False)


def batched(row: Row, device: str) -> None:
    """Gradients for several cotangents at once, by vmap over the backward."""
    for sample in row.samples:
        _numerically(gradcheck, sample, device, check_batched_grad=True)


CHECKS: dict[str, Callable[[Row, str], None]] = {
    "proof": proof,
    "value": value,
    "gradient": gradient,
    "second order": second_order,
    "forward mode": forward_mode,
    "batched": batched,
}


@dataclass(frozen=True)
class Outcome:
    """What each check said of a formula: "" where it is right, else what is wrong."""

    row: Row
    faults: dict[str, str]

    @property
    def right(self) -> bool:
        return not any(self.faults.values())


def verify(device: str = "cpu") -> list[Outcome]:
    """Runs every check on every formula, printing a line each."""
    width = max(len(row.name) for row in CATALOG)
    print(f"{'formula':{width}}  " + "  ".join(CHECKS))
    outcomes = []
    for row in CATALOG:
        outcome = Outcome(row, {name: _fault(check, row, device) for name, check in CHECKS.items()})
        marks = (f"{'WRONG' if fault else 'right':{len(n)}}" for n, fault in outcome.faults.items())
        print(f"{row.name:{width}}  " + "  ".join(marks), flush=True)
        for name, fault in outcome.faults.items():
            if fault:
                print(f"    {name}: {fault}")
        outcomes.append(outcome)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m torch_nnmath verify", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="write the outcomes there too")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    start = time.perf_counter()
    outcomes = verify(arguments.device)
    seconds = time.perf_counter() - start
    wrong = sum(not outcome.right for outcome in outcomes)
    ids = {id for outcome in outcomes for id in outcome.row.ids}
    print(
        f"{len(ids)} formulas in {len(outcomes)} rows, {wrong} wrong; PyTorch {torch.__version__}, "
        f"{arguments.device}, float64, {seconds:.1f} s"
    )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(_as_json(outcomes, arguments.device, seconds), file, indent=2)
    return int(wrong > 0)


def _as_json(outcomes: list[Outcome], device: str, seconds: float) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": device,
        "dtype": "float64",
        "seconds": round(seconds, 1),
        "wrong": sum(not outcome.right for outcome in outcomes),
        "formulas": [
            {
                "ids": outcome.row.ids,
                "section": outcome.row.section,
                "title": outcome.row.title,
                "function": outcome.row.function.__name__,
                "samples": [sample.name for sample in outcome.row.samples],
                "right": outcome.right,
                "checks": {name: fault or "right" for name, fault in outcome.faults.items()},
            }
            for outcome in outcomes
        ],
    }


def _fault(check: Callable[[Row, str], None], row: Row, device: str) -> str:
    """What a check finds: its message, or the error that a formula raised on the way."""
    try:
        check(row, device)
    except Exception as error:  # whatever a broken formula raises is a finding
        message = " ".join(str(error).split())
        return f"{type(error).__name__}: {message[:400]}" if message else type(error).__name__
    return ""


def _numerically(check: Callable[..., bool], sample: Sample, device: str, **options: Any) -> None:
    try:
        check(sample.call, sample.draw(device=device), **options)
    except Exception as error:
        raise Wrong(f"{sample.name or 'first sample'}: {error}") from error


def _compare(got: Tensor, want: Any, what: str) -> None:
    """To the rounding of float64: 1e-12 of the largest entry."""
    array = got.detach().cpu().numpy()
    if want.ndim == array.ndim + 1:  # columns
        want = want.squeeze(-1)
    if array.shape != want.shape:
        raise Wrong(f"{what} has shape {array.shape}, the reference {want.shape}")
    off = np.abs(array - want).max() if want.size else 0.0
    if not off <= 1e-12 * max(np.abs(want).max(), 1):
        raise Wrong(f"{what} is off by {off:.3g} from the reference")


def _examples(sample: Sample, inputs: Sequence[Tensor]) -> list[list[Any]]:
    """Each example's inputs as the reference takes them: vectors as columns."""
    members = []
    for i in range(EXAMPLES):
        member = []
        for spec, x in zip(sample.inputs.values(), inputs, strict=True):
            array = x.detach().cpu().numpy()
            array = array if spec.shared else array[i]
            member.append(array if array.ndim == 2 else array[:, None])
        members.append(member)
    return members


def _pulled_back(form: Form, row: Row, inputs: Sequence[Tensor], g: Tensor) -> list[Any]:
    """The reference's gradient in each input, summed over the examples where it is shared."""
    sample = row.samples[0]
    members = []
    for one, cotangent in zip(_examples(sample, inputs), g.cpu().numpy(), strict=True):
        column = cotangent[:, None] if cotangent.ndim == 1 else cotangent
        members.append(form.pullback(column if column.ndim else float(column), *one, **row.options))
    gradients = []
    for spec, parts in zip(sample.inputs.values(), zip(*members, strict=True), strict=True):
        arrays = [np.asarray(part, float).reshape(spec.shape) for part in parts]
        gradients.append(np.sum(arrays, 0) if spec.shared else np.stack(arrays))
    return gradients


def _symbols(name: str, spec: Input) -> Any:
    """An array of symbols; "signed" ones are positive and negative in turn."""
    array = np.empty(spec.shape, dtype=object)
    signs = itertools.cycle(({"positive": True}, {"negative": True}))
    assumptions: dict[str, Any] = {"real": {"real": True}, "positive": {"positive": True}}
    for index in np.ndindex(spec.shape):
        chosen = next(signs) if spec.kind == "signed" else assumptions[spec.kind]
        array[index] = sympy.Symbol("_".join([name, *map(str, index)]), **chosen)
    return array


def _flat(entries: Any) -> list[Any]:
    return [sympy.sympify(entry) for entry in np.asarray(entries, dtype=object).ravel()]


def _prove_zero(expression: Any, what: str) -> None:
    """A symbol for each exponential, logarithm and tanh: what is left is a rational function."""
    atoms = sorted(
        sympy.sympify(expression).atoms(sympy.exp, sympy.log, sympy.tanh),
        key=sympy.count_ops,
        reverse=True,
    )
    for atom in atoms:
        expression = expression.subs(atom, sympy.Dummy(positive=True))
    numerator, _ = sympy.fraction(sympy.together(expression))
    if sympy.expand(numerator) != 0:
        raise Wrong(f"{what} does not simplify to 0")
