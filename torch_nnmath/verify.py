"""`python -m torch_nnmath verify`: every formula of the catalog, or a function of the user's."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from torch_nnmath import testing
from torch_nnmath.catalog import CATALOG, EXAMPLES, Input, Row, Sample
from torch_nnmath.reference import Elementary, Form
from torch_nnmath.testing import Report, Verdict
from torch_nnmath.testing._report import Wrong, described, shortened

SYMBOLIC = Elementary(
    exp=np.frompyfunc(sympy.exp, 1, 1),
    log=np.frompyfunc(sympy.log, 1, 1),
    maximum=np.frompyfunc(sympy.Max, 2, 1),
    tanh=np.frompyfunc(sympy.tanh, 1, 1),
)


def proof(row: Row, device: str) -> None:
    """The reference, exactly: its pullback is its value's derivative, and both forms are one."""
    columns, leaves = [], []
    for name, spec in row.samples[0].inputs.items():
        symbols = _symbols(name, spec)
        columns.append(symbols if symbols.ndim == 2 else symbols[:, None])
        leaves.append(symbols.ravel())
    options = dict(row.options)
    for name in {"beta", "cap", "zeta"} & options.keys():
        options[name] = sympy.Symbol(name, positive=True)
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


def compared(row: Row, device: str) -> None:
    """The library's values and gradients in float64 against both reference forms."""
    sample = row.samples[0]
    inputs = sample.draw(device=device)
    got = sample.call(*inputs)
    g = torch.tensor(np.random.default_rng(1).normal(size=got.shape), device=device)
    gradients = torch.autograd.grad(got, inputs, g)
    for form in (row.reference.element, row.reference.matrix):
        members = [form.value(*one, **row.options) for one in _examples(sample, inputs)]
        want = np.stack([np.asarray(member, float) for member in members])
        _compare(got if sample.is_batch else got[None], want, "value")
        pairs = zip(gradients, _pulled_back(form, row, inputs, g), strict=True)
        for name, (mine, other) in zip(sample.inputs, pairs, strict=True):
            _compare(mine, other, f"gradient in {name}")


CHECKS: dict[str, Callable[[Row, str], None]] = {"proof": proof, "reference": compared}
TRANSFORMS = tuple(name for name in testing.TRANSFORMS if name != "value")  # the reference's
QUICK = tuple(name for name in TRANSFORMS if name in testing.QUICK)
BEYOND_PYTORCH = ("forward mode through compile", "second order through compile")

Found = tuple[Verdict, str]
RANK = (
    Verdict.NOT_APPLICABLE,
    Verdict.RIGHT,
    Verdict.CANNOT,
    Verdict.WRITES,
    Verdict.RAISES,
    Verdict.WRONG,
    Verdict.SILENT_ZERO,
)
SHORT = {
    Verdict.NOT_APPLICABLE: "-",
    Verdict.CANNOT: "cannot",
    Verdict.WRITES: "writes",
    Verdict.SILENT_ZERO: "zero",
}


@dataclass(frozen=True)
class Outcome:
    """What was found of a formula: by each check of the row, and of each of its samples."""

    row: Row
    checks: dict[str, Found]
    reports: dict[str, Report]

    def cell(self, name: str) -> Verdict:
        """The worst that a check or a transform found."""
        return max((verdict for _, verdict, _ in self.found(name)), key=RANK.index)

    def found(self, name: str) -> Iterator[tuple[str, Verdict, str]]:
        """Sample, verdict and detail of a check or a transform."""
        if name in self.checks:
            yield ("", *self.checks[name])
        else:
            for sample, report in self.reports.items():
                found = report[name]
                yield sample, found.verdict, found.detail

    @property
    def faults(self) -> list[str]:
        """A line for each thing that is not as it should be."""
        return [
            f"{self.row.name}{f' ({sample})' if sample else ''}: {name}: {verdict}: {detail}"
            for name in self.names
            for sample, verdict, detail in self.found(name)
            if verdict.is_fault or (verdict is Verdict.CANNOT and name not in BEYOND_PYTORCH)
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """All checks and transforms."""
        return (*self.checks, *(row.transform for row in next(iter(self.reports.values()))))


def verify(device: str = "cpu", transforms: Sequence[str] = TRANSFORMS) -> list[Outcome]:
    """Runs every check on every formula, and every transform on each of its samples."""
    outcomes = []
    for row in CATALOG:
        start = time.perf_counter()
        checks = {name: _found(check, row, device) for name, check in CHECKS.items()}
        reports = {
            sample.name: testing.check(
                sample.on(device), sample.draw(device=device), transforms=transforms
            )
            for sample in row.samples
        }
        outcomes.append(Outcome(row, checks, reports))
        faults = outcomes[-1].faults
        said = f"{len(faults)} WRONG" if faults else "right"
        samples = f"{len(reports)} sample{'s' if len(reports) > 1 else ''}"
        print(f"{row.name}: {said}, {samples}, {time.perf_counter() - start:.1f} s", flush=True)
        for fault in faults:
            print(f"    {shortened(fault, 500)}", flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Checks and transforms by formulas, and the reasons where a cell is not simply right."""
    names = outcomes[0].names
    first = max(map(len, names))
    heads = [" ".join(outcome.row.ids) for outcome in outcomes]
    widths = [max(len(head), 6) for head in heads]
    lines = ["  ".join([" " * first, *map(str.ljust, heads, widths)])]
    for name in names:
        cells = (SHORT.get(outcome.cell(name), outcome.cell(name)) for outcome in outcomes)
        lines.append("  ".join([name.ljust(first), *map(str.ljust, cells, widths)]))
    reasons = dict.fromkeys(
        f"{name}: {verdict}: {shortened(detail, 160)}"
        for name in names
        for verdict, detail in _exceptions(outcomes, name)
    )
    return "\n".join([*(line.rstrip() for line in lines), "", *reasons])


def _exceptions(outcomes: Sequence[Outcome], name: str) -> Iterator[Found]:
    """Why a cell is not "right": PyTorch's message once, of faults all."""
    seen = set()
    for outcome in outcomes:
        for _, verdict, detail in outcome.found(name):
            if verdict is not outcome.cell(name) or verdict is Verdict.RIGHT:
                continue
            kind = detail.split(":")[0] if verdict is Verdict.CANNOT else detail
            if (verdict, kind) not in seen:
                seen.add((verdict, kind))
                yield verdict, detail


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_nnmath verify",
        description="Holds every formula of the catalog to the symbolic proof, to its NumPy forms "
        "and to every transform of PyTorch; or a function of yours to the transforms.",
    )
    name = "PACKAGE.MODULE:FUNCTION"
    parser.add_argument("function", nargs="?", metavar=name, help="a function of yours")
    parser.add_argument("--inputs", metavar=name, help="what makes its inputs, in a list")
    parser.add_argument("--reference", metavar=name, help="a function with the right value")
    parser.add_argument("--quick", action="store_true", help="the essential transforms only")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="write what was found there too")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if (arguments.function is None) != (arguments.inputs is None):
        parser.error("a function goes with --inputs")
    if arguments.function is None and arguments.reference is not None:
        parser.error("--reference goes with a function")
    start = time.perf_counter()
    if arguments.function:
        try:
            found, right = _of_yours(arguments)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            parser.error(str(error))
    else:
        found, right = _of_catalog(arguments)
    seconds = time.perf_counter() - start
    print(f"PyTorch {torch.__version__}, {arguments.device}, float64, {seconds:.1f} s")
    if arguments.json:
        about = {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "device": arguments.device,
            "dtype": "float64",
            "seconds": round(seconds, 1),
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({**about, **found}, file, indent=2)
    return int(not right)


def _of_yours(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    function, make = _named(arguments.function), _named(arguments.inputs)
    reference = _named(arguments.reference) if arguments.reference else None
    inputs = make() if callable(make) else make
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    given = [x.to(arguments.device) if isinstance(x, Tensor) else x for x in inputs]
    transforms = testing.QUICK if arguments.quick else testing.TRANSFORMS
    report = testing.check(function, given, reference=reference, transforms=transforms)
    print(report)
    return report.to_dict(), report.right


def _named(name: str) -> Any:
    """What PACKAGE.MODULE:FUNCTION names."""
    module, _, path = name.partition(":")
    if not (module and path):
        raise ValueError(f"{name!r} is not of the form PACKAGE.MODULE:FUNCTION")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _of_catalog(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    outcomes = verify(arguments.device, QUICK if arguments.quick else TRANSFORMS)
    print(f"\n{table(outcomes)}\n")
    wrong = sum(bool(outcome.faults) for outcome in outcomes)
    ids = {id for outcome in outcomes for id in outcome.row.ids}
    print(f"{len(ids)} formulas in {len(outcomes)} rows, {wrong} wrong")
    return {"wrong": wrong, "formulas": [_as_dict(outcome) for outcome in outcomes]}, not wrong


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "ids": outcome.row.ids,
        "section": outcome.row.section,
        "title": outcome.row.title,
        "function": outcome.row.function.__name__,
        "right": not outcome.faults,
        "table": {name: outcome.cell(name) for name in outcome.names},
        "checks": {
            name: {"verdict": verdict, "detail": detail}
            for name, (verdict, detail) in outcome.checks.items()
        },
        "samples": [
            {"name": name, "rows": report.to_dict()["rows"]}
            for name, report in outcome.reports.items()
        ],
    }


def _found(check: Callable[[Row, str], None], row: Row, device: str) -> Found:
    """What a check finds: its message, or the error that a formula raised on the way."""
    try:
        check(row, device)
    except Wrong as wrong:
        return Verdict.WRONG, str(wrong)
    except Exception as error:  # whatever a broken formula raises is a finding
        return Verdict.RAISES, described(error)
    return Verdict.RIGHT, ""


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
    for i in range(EXAMPLES if sample.is_batch else 1):
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
    cotangents = g.cpu().numpy() if sample.is_batch else g.cpu().numpy()[None]
    for one, cotangent in zip(_examples(sample, inputs), cotangents, strict=True):
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
