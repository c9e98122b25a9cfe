"""`python -m torch_nnmath verify`: checks the catalogue, a user's function, or PyTorch's own."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch
from torch import Tensor

from torch_nnmath import testing
from torch_nnmath._catalog_rows import EXAMPLES, Input, Row, Sample
from torch_nnmath.catalog import CATALOG
from torch_nnmath.reference import Elementary, Form
from torch_nnmath.testing import Report, Verdict
from torch_nnmath.testing._pytorch import make_examples
from torch_nnmath.testing._report import Wrong, describe_error, shorten

SYMBOLIC = Elementary(
    exp=np.frompyfunc(sympy.exp, 1, 1),
    log=np.frompyfunc(sympy.log, 1, 1),
    maximum=np.frompyfunc(sympy.Max, 2, 1),
    tanh=np.frompyfunc(sympy.tanh, 1, 1),
)


def prove(row: Row, device: str) -> None:
    """Proves with symbols that both reference forms are equal and their pullbacks are right.

    Raises Wrong if the forms differ or a pullback is not the derivative of the value.
    """
    columns, leaves = [], []
    for name, spec in row.samples[0].inputs.items():
        symbols = make_symbols(name, spec)
        columns.append(symbols if symbols.ndim == 2 else symbols[:, None])
        leaves.append(symbols.ravel())
    options = make_symbolic_options(row)
    forms = (row.reference.element, row.reference.matrix)
    values = [_flatten(form.value(*columns, fn=SYMBOLIC, **options)) for form in forms]
    for i, (element, matrix) in enumerate(zip(*values, strict=True)):
        prove_zero(element - matrix, f"element form minus matrix form, entry {i}")
    value = forms[0].value(*columns, fn=SYMBOLIC, **options)
    g = make_symbols("g", Input(np.shape(value)))
    contraction = sum(map(sympy.Mul, _flatten(g), values[0]))
    for form in forms:
        gradients = form.pullback(g if g.ndim else g.item(), *columns, fn=SYMBOLIC, **options)
        for symbols, gradient in zip(leaves, gradients, strict=True):
            for symbol, entry in zip(symbols, _flatten(gradient), strict=True):
                prove_zero(sympy.diff(contraction, symbol) - entry, f"derivative in {symbol}")


def compare_with_reference(row: Row, device: str) -> None:
    """Compares the library's value and gradients in float64 with both reference forms.

    Raises Wrong if they differ by more than rounding.
    """
    sample = row.samples[0]
    inputs = sample.draw(device=device)
    value = sample.call(*inputs)
    g = torch.tensor(np.random.default_rng(1).normal(size=value.shape), device=device)
    gradients = torch.autograd.grad(value, inputs, g)
    for form in (row.reference.element, row.reference.matrix):
        examples = _split_examples(sample, inputs)
        values = [form.value(*example, **row.options) for example in examples]
        expected = np.stack([np.asarray(entry, float) for entry in values])
        _compare(value if sample.is_batch else value[None], expected, "value")
        pairs = zip(gradients, _compute_reference_gradients(form, row, inputs, g), strict=True)
        for name, (gradient, expected) in zip(sample.inputs, pairs, strict=True):
            _compare(gradient, expected, f"gradient of {name}")


CHECKS: dict[str, Callable[[Row, str], None]] = {
    "proof": prove,
    "reference": compare_with_reference,
}
TRANSFORMS = tuple(
    name for name in testing.TRANSFORMS if name != "value"
)  # the check "reference" covers it
QUICK = tuple(name for name in TRANSFORMS if name in testing.QUICK)
BEYOND_PYTORCH = ("forward mode through compile", "second order through compile")

Judgement: TypeAlias = tuple[Verdict, str]  # a verdict and its detail
SEVERITY = (
    Verdict.NOT_APPLICABLE,
    Verdict.RIGHT,
    Verdict.CANNOT,
    Verdict.UNKNOWN,
    Verdict.WRITES,
    Verdict.RAISES,
    Verdict.WRONG,
    Verdict.SILENT_ZERO,
)
SHORT_TEXTS = {
    Verdict.NOT_APPLICABLE: "-",
    Verdict.CANNOT: "cannot",
    Verdict.UNKNOWN: "unknown",
    Verdict.WRITES: "writes",
    Verdict.SILENT_ZERO: "zero",
}


@dataclass(frozen=True)
class Outcome:
    """The results for a row: the judgement of each check by name, the report of each sample."""

    row: Row
    checks: dict[str, Judgement]
    reports: dict[str, Report]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all checks and transforms."""
        return (*self.checks, *(row.transform for row in next(iter(self.reports.values()))))

    def worst_verdict(self, name: str) -> Verdict:
        """Returns the worst verdict of a check or a transform over the samples."""
        return max((verdict for _, verdict, _ in self.list_verdicts(name)), key=SEVERITY.index)

    def list_verdicts(self, name: str) -> Iterator[tuple[str, Verdict, str]]:
        """Yields the sample, verdict and detail of a check or a transform."""
        if name in self.checks:
            yield ("", *self.checks[name])
        else:
            for sample, report in self.reports.items():
                yield sample, report[name].verdict, report[name].detail

    @property
    def faults(self) -> list[str]:
        """A message for each fault, and for each "PyTorch cannot" that is not expected."""
        return [
            f"{self.row.name}{f' ({sample})' if sample else ''}: {name}: {verdict}: {detail}"
            for name in self.names
            for sample, verdict, detail in self.list_verdicts(name)
            if verdict.is_fault
            or verdict is Verdict.UNKNOWN
            or (verdict is Verdict.CANNOT and name not in BEYOND_PYTORCH)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as a dict of plain values, for JSON."""
        return {
            "ids": self.row.ids,
            "section": self.row.section,
            "title": self.row.title,
            "function": self.row.function.__name__,
            "right": not self.faults,
            "table": {name: self.worst_verdict(name) for name in self.names},
            "checks": {
                name: {"verdict": verdict, "detail": detail}
                for name, (verdict, detail) in self.checks.items()
            },
            "samples": [
                {"name": name, "rows": report.to_dict()["rows"]}
                for name, report in self.reports.items()
            ],
        }


def verify(
    device: str = "cpu",
    transforms: Sequence[str] = TRANSFORMS,
    rows: Sequence[Row] | None = None,
) -> list[Outcome]:
    """Runs every check on every row, and every transform on each of its samples.

    `rows` are those of the catalogue by default. Prints a line for each row as soon as it is
    checked, then its faults.
    """
    outcomes = []
    for row in CATALOG if rows is None else rows:
        start = time.perf_counter()
        checks = {name: _run_check(check, row, device) for name, check in CHECKS.items()}
        reports = {
            sample.name: testing.check(
                sample.on(device), sample.draw(device=device), transforms=transforms
            )
            for sample in row.samples
        }
        outcome = Outcome(row, checks, reports)
        outcomes.append(outcome)
        result = f"{len(outcome.faults)} WRONG" if outcome.faults else "right"
        samples = f"{len(reports)} sample{'s' if len(reports) > 1 else ''}"
        print(f"{row.name}: {result}, {samples}, {time.perf_counter() - start:.1f} s", flush=True)
        for fault in outcome.faults:
            print(f"    {shorten(fault, 500)}", flush=True)
    return outcomes


def format_table(outcomes: Sequence[Outcome]) -> str:
    """Formats a table of checks and transforms by formulas; below, why cells are not "right"."""
    names = outcomes[0].names
    name_width = max(map(len, names))
    headings = [" ".join(outcome.row.ids) for outcome in outcomes]
    widths = [max(len(heading), 6) for heading in headings]
    lines = ["  ".join([" " * name_width, *map(str.ljust, headings, widths)])]
    for name in names:
        verdicts = [outcome.worst_verdict(name) for outcome in outcomes]
        cells = [SHORT_TEXTS.get(verdict, verdict) for verdict in verdicts]
        lines.append("  ".join([name.ljust(name_width), *map(str.ljust, cells, widths)]))
    reasons = dict.fromkeys(
        f"{name}: {verdict}: {shorten(detail, 160)}"
        for name in names
        for verdict, detail in _list_reasons(outcomes, name)
    )
    return "\n".join([*(line.rstrip() for line in lines), "", *reasons])


def _list_reasons(outcomes: Sequence[Outcome], name: str) -> Iterator[Judgement]:
    """Yields each distinct judgement that is not "right"; one "PyTorch cannot" per control."""
    listed_kinds = set()
    for outcome in outcomes:
        for _, verdict, detail in outcome.list_verdicts(name):
            if verdict is not outcome.worst_verdict(name) or verdict is Verdict.RIGHT:
                continue
            kind = detail.split(":")[0] if verdict is Verdict.CANNOT else detail
            if (verdict, kind) not in listed_kinds:
                listed_kinds.add((verdict, kind))
                yield verdict, detail


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 if a result is wrong, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_nnmath verify",
        description="Checks every formula of the catalogue: by a symbolic proof, against its NumPy "
        "forms and under every transform of PyTorch. Or checks a function of yours, or functions "
        "of PyTorch, under every transform.",
    )
    metavar = "PACKAGE.MODULE:FUNCTION"
    parser.add_argument("function", nargs="?", metavar=metavar, help="a function of yours")
    parser.add_argument("--inputs", metavar=metavar, help="a function that returns its inputs")
    parser.add_argument(
        "--reference", metavar=metavar, help="a function that returns the right value"
    )
    parser.add_argument(
        "--surrogate", metavar=metavar, help="a function with the derivatives that yours declares"
    )
    parser.add_argument(
        "--pytorch", action="store_true", help="check functions and modules of PyTorch"
    )
    parser.add_argument("--quick", action="store_true", help="run only the essential transforms")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    if (arguments.function is None) != (arguments.inputs is None):
        parser.error("a function requires --inputs, and --inputs requires a function")
    if arguments.function is None and (arguments.reference or arguments.surrogate):
        parser.error("--reference and --surrogate require a function")
    if arguments.pytorch and (arguments.function or arguments.device != "cpu"):
        parser.error("--pytorch takes neither a function nor a device")
    start = time.perf_counter()
    if arguments.function:
        try:
            results, is_right = _check_user_function(arguments)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            parser.error(str(error))
    elif arguments.pytorch:
        results, is_right = _check_pytorch(arguments)
    else:
        results, is_right = _check_catalog(arguments)
    seconds = time.perf_counter() - start
    print(f"PyTorch {torch.__version__}, {arguments.device}, float64, {seconds:.1f} s")
    if arguments.json:
        environment = {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "device": arguments.device,
            "dtype": "float64",
            "seconds": round(seconds, 1),
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({**environment, **results}, file, indent=2)
    return int(not is_right)


def _check_user_function(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    function, make_inputs = _import_name(arguments.function), _import_name(arguments.inputs)
    reference = _import_name(arguments.reference) if arguments.reference else None
    surrogate = _import_name(arguments.surrogate) if arguments.surrogate else None
    inputs = make_inputs() if callable(make_inputs) else make_inputs
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    inputs = [x.to(arguments.device) if isinstance(x, Tensor) else x for x in inputs]
    transforms = testing.QUICK if arguments.quick else testing.TRANSFORMS
    report = testing.check(
        function, inputs, reference=reference, surrogate=surrogate, transforms=transforms
    )
    print(report)
    return report.to_dict(), report.right


def _check_pytorch(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Prints a line for each function of PyTorch, and below it each fault."""
    reports = {}
    for name, (function, inputs) in make_examples().items():
        transforms = QUICK if arguments.quick else TRANSFORMS
        report = reports[name] = testing.check(function, inputs, transforms=transforms)
        counts = Counter(row.verdict for row in report)
        counts.pop(Verdict.NOT_APPLICABLE, None)
        texts = [f"{count} {verdict}" for verdict, count in counts.items()]
        print(f"{name:24}{', '.join(texts)}", flush=True)
        for row in report:
            if row.verdict.is_fault or row.verdict is Verdict.UNKNOWN:
                fault = f"{row.transform}: {row.verdict}: {row.detail}"
                print(f"    {shorten(fault, 160)}", flush=True)
    wrong = sum(not report.right for report in reports.values())
    print(f"\n{len(reports)} functions and modules of PyTorch, {wrong} of them with a fault")
    functions = {name: report.to_dict()["rows"] for name, report in reports.items()}
    return {"wrong": wrong, "pytorch": functions}, not wrong


def _import_name(name: str) -> Any:
    """Imports the object named PACKAGE.MODULE:FUNCTION."""
    module, _, path = name.partition(":")
    if not (module and path):
        raise ValueError(f"{name!r} is not of the form PACKAGE.MODULE:FUNCTION")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _check_catalog(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    outcomes = verify(arguments.device, QUICK if arguments.quick else TRANSFORMS)
    print(f"\n{format_table(outcomes)}\n")
    wrong = sum(bool(outcome.faults) for outcome in outcomes)
    ids = {id for outcome in outcomes for id in outcome.row.ids}
    print(f"{len(ids)} formulas in {len(outcomes)} rows, {wrong} wrong")
    return {"wrong": wrong, "formulas": [outcome.to_dict() for outcome in outcomes]}, not wrong


def _run_check(check: Callable[[Row, str], None], row: Row, device: str) -> Judgement:
    """Returns the check's verdict and the message of the error that it raised."""
    try:
        check(row, device)
    except Wrong as wrong:
        return Verdict.WRONG, str(wrong)
    except Exception as error:  # a broken formula may raise any exception
        return Verdict.RAISES, describe_error(error)
    return Verdict.RIGHT, ""


def _compare(result: Tensor, expected: Any, name: str) -> None:
    """Raises Wrong if they differ by more than 1e-12, relative to an expected entry above 1."""
    array = result.detach().cpu().numpy()
    if expected.ndim == array.ndim + 1:  # the reference's vectors are columns
        expected = expected.squeeze(-1)
    if array.shape != expected.shape:
        raise Wrong(f"{name} has shape {array.shape}, the reference {expected.shape}")
    distance = np.abs(array - expected).max() if expected.size else 0.0
    if not distance <= 1e-12 * max(np.abs(expected).max(), 1):
        raise Wrong(f"{name} differs from the reference by {distance:.3g}")


def _split_examples(sample: Sample, inputs: Sequence[Tensor]) -> list[list[Any]]:
    """Returns the inputs of each example in the reference's shapes: vectors are columns."""
    examples = []
    for i in range(EXAMPLES if sample.is_batch else 1):
        example = []
        for spec, x in zip(sample.inputs.values(), inputs, strict=True):
            array = x.detach().cpu().numpy()
            array = array if spec.shared else array[i]
            example.append(array if array.ndim == 2 else array[:, None])
        examples.append(example)
    return examples


def _compute_reference_gradients(
    form: Form, row: Row, inputs: Sequence[Tensor], g: Tensor
) -> list[Any]:
    """Returns the reference's gradient of each input, summed over the examples if it is shared."""
    sample = row.samples[0]
    gradients_by_example = []
    cotangents = g.cpu().numpy() if sample.is_batch else g.cpu().numpy()[None]
    for example, cotangent in zip(_split_examples(sample, inputs), cotangents, strict=True):
        column = cotangent[:, None] if cotangent.ndim == 1 else cotangent
        cotangent = column if column.ndim else float(column)
        gradients_by_example.append(form.pullback(cotangent, *example, **row.options))
    gradients = []
    columns = zip(*gradients_by_example, strict=True)
    for spec, parts in zip(sample.inputs.values(), columns, strict=True):
        arrays = [np.asarray(part, float).reshape(spec.shape) for part in parts]
        gradients.append(np.sum(arrays, 0) if spec.shared else np.stack(arrays))
    return gradients


def make_symbolic_options(row: Row) -> dict[str, Any]:
    """Returns the options of the row's reference, with symbols for real numbers."""
    options = dict(row.options)
    for name in {"alpha", "beta", "cap", "mix", "tau", "zeta"} & options.keys():
        options[name] = sympy.Symbol(name, positive=True)
    return options


def make_symbols(name: str, spec: Input) -> Any:
    """Returns an array of symbols; those of a "signed" input alternate in sign."""
    array = np.empty(spec.shape, dtype=object)
    signs = itertools.cycle(({"positive": True}, {"negative": True}))
    assumptions: dict[str, Any] = {"positive": {"positive": True}}
    for index in np.ndindex(spec.shape):
        assumption = (
            next(signs) if spec.kind == "signed" else assumptions.get(spec.kind, {"real": True})
        )
        array[index] = sympy.Symbol("_".join([name, *map(str, index)]), **assumption)
    return array


def _flatten(entries: Any) -> list[Any]:
    return [sympy.sympify(entry) for entry in np.asarray(entries, dtype=object).ravel()]


def prove_zero(expression: Any, name: str) -> None:
    """Raises Wrong unless the expression simplifies to 0.

    Each exponential, logarithm and tanh becomes a symbol, so that a rational function remains.
    """
    atoms = sorted(
        sympy.sympify(expression).atoms(sympy.exp, sympy.log, sympy.tanh),
        key=sympy.count_ops,
        reverse=True,
    )
    for atom in atoms:
        expression = expression.subs(atom, sympy.Dummy(positive=True))
    numerator, _ = sympy.fraction(sympy.together(expression))
    if sympy.expand(numerator) != 0:
        raise Wrong(f"{name} does not simplify to 0")
