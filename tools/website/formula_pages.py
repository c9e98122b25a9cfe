"""A page for each row of the catalogue: statement, proof, source, picture and verification."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from document import PRINTED
from formula_statements import STATEMENTS
from plots import PICTURES, STYLES, draw_picture
from staging import ROOT, Stage, fence, make_table
from statements import Statement, typeset

from torch_nnmath import reference
from torch_nnmath.catalog import CATALOG, Row
from torch_nnmath.reference import Forms
from torch_nnmath.verify import SHORT_TEXTS

VERIFICATION = ROOT / "examples" / "results" / "verify-cpu.txt"


class Verification(NamedTuple):
    """What `verify` printed of a row, and of the environment."""

    summary: str
    verdicts: Counter[str]
    environment: str


VERDICTS = {short: str(verdict) for verdict, short in SHORT_TEXTS.items()}
DERIVATIONS = {
    "head": "[the head](../head.md#formulas)",
    "scale": "[several devices](../scale.md#the-formula)",
    "tuning": "[losses for tuning](../tuning.md#formulas)",
}
FEEDFORWARD = "feed-forward network"  # whose reference takes lists of parameters


def add_pages(stage: Stage) -> list[Any]:
    """Adds the pages of the formulas and returns their part of the navigation."""
    results = read_results()
    slips = read_slips()
    excerpts = read_by_hand()
    for row in CATALOG:
        page = "\n".join(write_page(stage, row, results, slips, excerpts))
        place = place_of(row)
        stage.write(place, stage.translate_links(page, f"docs/{place}", place))
    link_pages(stage)
    pages = [{row.name: place_of(row)} for row in CATALOG]
    return [
        {"All formulas": "formulas.md"},
        *pages,
        {"The document's slips": "slips.md"},
        {"By hand": "by_hand.md"},
    ]


def place_of(row: Row) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", row.title.lower()).strip("-")
    return f"formulas/{'-'.join(row.ids).lower()}-{words}.md"


def link_pages(stage: Stage) -> None:
    """Links each formula's name in the table of docs/formulas.md to its page."""
    path = stage.folder / "formulas.md"
    page = path.read_text(encoding="utf-8")
    for row in CATALOG:
        cells = f"| {' '.join(row.ids)} | {row.section} |"
        before = f"{cells} {row.title} |"
        if before not in page:
            raise ValueError(f"the table of docs/formulas.md lacks {before}")
        page = page.replace(before, f"{cells} [{row.title}]({place_of(row)}) |")
    path.write_text(page, encoding="utf-8")


def write_page(
    stage: Stage,
    row: Row,
    results: Mapping[str, Verification],
    slips: dict[str, list[str]],
    excerpts: dict[str, list[str]],
) -> list[str]:
    """Returns the parts of a formula's page."""
    statement = STATEMENTS[row.title]
    return [
        f"# {row.name}\n",
        write_origin(row),
        *write_document(row, slips),
        *write_statement(row, statement),
        *write_picture(stage, row),
        *write_by_hand(row, excerpts),
        *write_reference(row),
        *write_function(row),
        *write_verification(row, results),
    ]


def write_origin(row: Row) -> str:
    if row.title in PRINTED:
        return f"Section {row.section} of the document.\n"
    return f"Not in the document: {DERIVATIONS[row.section]} derives it.\n"


def write_document(row: Row, slips: dict[str, list[str]]) -> list[str]:
    if row.title not in PRINTED:
        return []
    parts = ["## What the document prints\n"]
    parts += [display(text) for text in PRINTED[row.title]]
    for slip in row.slips:
        _, _, printed, true, evidence, _ = slips[slip]
        parts.append(
            f'!!! warning "Slip {slip}"\n\n'
            f"    Printed: {printed}. True: {true}.\n\n"
            f"    {evidence} ([all slips](../slips.md))\n"
        )
    if not row.slips:
        parts.append("It has no slip here.\n")
    return parts


def write_statement(row: Row, statement: Statement) -> list[str]:
    left, right = statement.value
    parts = [
        "## What is true\n",
        display(f"{typeset(left)} = {typeset(right)}"),
    ]
    tangents = {a: b for a, b in statement.where.items() if r"\dot" in typeset(a)}
    others = {a: b for a, b in statement.where.items() if a not in tangents}
    if others:
        parts += ["where\n", display_equations((typeset(a), typeset(b)) for a, b in others.items())]
    if statement.note:
        parts.append(f"{statement.note}\n")
    parts += [
        "### Derivative\n",
        display_equations(
            (statement.left_of_partial(variable), typeset(partial))
            for variable, partial in statement.partials.items()
        ),
        "### Tangent\n",
        "A dot marks a tangent, the derivative in forward mode.\n",
        display_equations(
            [
                (statement.left_of_tangent, typeset(statement.tangent)),
                *((typeset(a), typeset(b)) for a, b in tangents.items()),
            ]
        ),
        "### Second order\n",
        *write_second_order(statement),
    ]
    parts.append(
        "These expressions are proved by SymPy: for the sizes of the catalogue's first sample, "
        "each entry equals that of the NumPy form below, or its derivative. The sums run over all "
        "values of the index, δ with two indices is Kronecker's.\n"
    )
    return parts


def write_second_order(statement: Statement) -> list[str]:
    """Returns the second derivatives in pairs of inputs, or those along a direction."""
    if statement.products:
        products = [
            (statement.left_of_product(variable), typeset(product))
            for variable, product in statement.products.items()
        ]
        parts = [
            "D is the derivative along the direction of the dotted inputs: the product of the "
            "Hessian and a vector.\n",
            display_equations(products),
        ]
        where = [(typeset(a), typeset(b)) for a, b in statement.where_products.items()]
        return [*parts, "where\n", display_equations(where)]
    parts = []
    if statement.seconds:
        seconds = [
            (statement.left_of_second(*pair), typeset(second))
            for pair, second in statement.seconds.items()
        ]
        parts.append(display_equations(seconds))
    if len(statement.seconds) < len(statement.inputs) * (len(statement.inputs) + 1) // 2:
        parts.append(f"All {'other ' if statement.seconds else ''}second derivatives are 0.\n")
    return parts


def display(text: str) -> str:
    return f"$$\n{text}\n$$\n"


def display_equations(equations: Any) -> str:
    lines = [rf"{left} &= {right}" for left, right in equations]
    if len(lines) == 1:
        return display(lines[0].replace("&=", "=", 1))
    joined = " \\\\[0.6em]\n".join(lines)
    return display(f"\\begin{{aligned}}\n{joined}\n\\end{{aligned}}")


def write_picture(stage: Stage, row: Row) -> list[str]:
    if row.title not in PICTURES:
        return []
    caption, draw = PICTURES[row.title]
    stem = place_of(row).removesuffix(".md")
    for style in STYLES:
        stage.write(f"{stem}-{style}.svg", draw_picture(draw, style))
    name = stem.split("/")[-1]
    pictures = "\n".join(f"![{caption}]({name}-{style}.svg#only-{style})" for style in STYLES)
    return ["## Picture\n", f"{pictures}\n", f"{caption}, computed by the library.\n"]


def write_by_hand(row: Row, excerpts: dict[str, list[str]]) -> list[str]:
    blocks = list(dict.fromkeys(block for id in row.ids for block in excerpts.get(id, ())))
    if row.title in ("tanh", "relu"):  # F2 is both, and the sigmoid
        blocks = [block for block in blocks if f"{row.title}" in block]
    if not blocks:
        return []
    intro = (
        "From [by hand](../by_hand.md), for a network of 2, 3 and 2 nodes. The columns are the "
        "element form, the matrix form, the library, and central differences.\n"
    )
    return ["## With numbers\n", intro, fence("\n".join(blocks), "text")]


def write_reference(row: Row) -> list[str]:
    forms = reference.FEEDFORWARD if row.title == FEEDFORWARD else row.reference
    parts = ["## In NumPy\n"]
    module = forms.element.rule.__module__
    path = module.replace(".", "/") + ".py"
    parts.append(f"From [`{path.split('/')[-1]}`](../../{path}), for one example.\n")
    for title, code in list_sources(forms):
        parts += [f"### {title}\n", fence(code, "python")]
    return parts


def list_sources(forms: Forms) -> list[tuple[str, str]]:
    element, matrix = (list_functions(form.rule) for form in (forms.element, forms.matrix))
    if inspect.getsource(element[-1]) == inspect.getsource(matrix[-1]):
        shared = [function for function in element if function in matrix]
        both = [*shared, element[-1]]
        only = [[f for f in functions[:-1] if f not in shared] for functions in (element, matrix)]
        titles = ("Element form", "Matrix form", "Element form and matrix form")
        groups = zip(titles, (*only, both), strict=True)
    else:
        groups = zip(("Element form", "Matrix form"), (element, matrix), strict=True)
    return [(title, join_sources(functions)) for title, functions in groups if functions]


def list_functions(rule: Any) -> list[Any]:
    """Returns the rule after the functions that it calls by a variable of its closure.

    Functions of `reference` are left out, since they have pages of their own.
    """
    found: list[Any] = []

    def add(function: Any) -> None:
        module = inspect.getmodule(function)
        if module is reference or function.__module__ != rule.__module__ or function in found:
            return
        found.append(function)
        for name in function.__code__.co_names:
            called = vars(module).get(name)
            if inspect.isfunction(called):
                add(called)

    for called in inspect.getclosurevars(rule).nonlocals.values():
        if inspect.isfunction(called):
            add(called)
    return [*reversed(found), rule]


def join_sources(functions: Any) -> str:
    return "\n\n".join(textwrap.dedent(inspect.getsource(function)) for function in functions)


def write_function(row: Row) -> list[str]:
    path = row.function.__module__.replace(".", "/") + ".py"
    parents = [base for base in row.function.__mro__[1:] if base.__module__.endswith("_formula")]
    link = f"From [`{path.split('/')[-1]}`](../../{path})."
    if parents and parents[0].__name__ != "Formula":
        link += (
            f" `{parents[0].__name__}`, in "
            "[`_formula.py`](../../torch_nnmath/formulas/_formula.py), derives the rest."
        )
    return ["## The Function\n", f"{link}\n", fence(inspect.getsource(row.function), "python")]


def write_verification(row: Row, results: Mapping[str, Verification]) -> list[str]:
    result = results.get(row.name)
    if result is None:
        return [
            "## Verification\n",
            "The [kept output](../../examples/results/verify-cpu.txt) of `python -m torch_nnmath "
            "verify` is older than this formula. The tests verify it in the same way.\n",
        ]
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in result.verdicts.items())
    samples = ", ".join(sample.name or "plain" for sample in row.samples)
    return [
        "## Verification\n",
        "`python -m torch_nnmath verify` proves the NumPy forms by symbols, compares the library "
        "with them, and checks each sample under every transform against numerical "
        "differentiation in float64.\n",
        make_table(
            ("samples", "checks and transforms", "result"), [(samples, verdicts, result.summary)]
        ),
        f"From a run with {result.environment} ([its output]"
        "(../../examples/results/verify-cpu.txt), which explains what is not `right`). "
        "[On a GPU](../../examples/results/verify-cuda.txt), the run is that of the code before "
        "the GPU's kernels.\n",
    ]


def read_results() -> dict[str, Verification]:
    """Returns what the kept output of `verify` says of each row, by the row's name."""
    lines = VERIFICATION.read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"(F\d.*): ((?:right|\d+ WRONG), \d+ samples?), .* s", s) for s in lines)
    summaries = {match[1]: match[2] for match in found if match}
    header = next(n for n, line in enumerate(lines) if line.startswith(" ") and " F1 " in line)
    starts = [match.start() for match in re.finditer(r"(?<=\s\s)F\d", lines[header])]
    starts = [start for start in starts if lines[header][start - 2 : start] == "  "]
    verdicts: list[Counter[str]] = [Counter() for _ in starts]
    for line in itertools.takewhile(bool, lines[header + 1 :]):
        for counter, start, end in zip(verdicts, starts, [*starts[1:], None], strict=True):
            verdict = line[start:end].strip()
            counter[VERDICTS.get(verdict, verdict)] += 1
    if len(summaries) != len(starts):
        raise ValueError(f"{VERIFICATION} has {len(summaries)} rows, its table {len(starts)}")
    return {
        name: Verification(summary, counter, lines[-1].rpartition(",")[0])
        for (name, summary), counter in zip(summaries.items(), verdicts, strict=True)
    }


def read_slips() -> dict[str, list[str]]:
    """Returns the cells of each slip of docs/slips.md, by its id."""
    page = (ROOT / "docs" / "slips.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (E\d+) \|(.*)\|$", page, re.MULTILINE)
    return {id: [id, *(cell.strip() for cell in cells.split(" | "))] for id, cells in rows}


def read_by_hand() -> dict[str, list[str]]:
    """Returns the items of docs/by_hand/by_hand.txt, by the ids of their formulas."""
    text = (ROOT / "docs" / "by_hand" / "by_hand.txt").read_text(encoding="utf-8")
    items = re.findall(r"^  (F[F\d, ]*?) {2,}(.*?)(?=^  [EF]\d|^\S|\Z)", text, re.M | re.DOTALL)
    excerpts: dict[str, list[str]] = {}
    for ids, body in items:
        for id in ids.split(", "):
            excerpts.setdefault(id, []).append(f"  {ids:9}{body.rstrip()}")
    return excerpts
