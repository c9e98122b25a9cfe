"""The examples and links of README and pages, and the table of formulas in docs/formulas.md."""

import doctest
import inspect
import re
from importlib.util import find_spec

import pytest
from scripts import DOCS, ROOT

from torch_nnmath import testing
from torch_nnmath.catalog import CATALOG
from torch_nnmath.testing._transforms import REGISTRY

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"```text\n(.*?)```", re.DOTALL)
# Other tests run the examples of the remaining pages.
PAGES_WITH_EXAMPLES = [
    "index",
    "migration",
    "troubleshooting",
    *(
        f"api/{name}"
        for name in ("functional", "nn", "swap", "testing", "lightning", "kernels", "formulas")
    ),
]


def test_table_of_formulas_equals_catalog():
    page = (DOCS / "formulas.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| F\d.*$", page, re.MULTILINE)
    files = {row.function: row.function.__module__.replace(".", "/") + ".py" for row in CATALOG}
    assert lines == [
        f"| {' '.join(row.ids)} | {row.section} | {row.title} | "
        f"[`{row.function.__name__}`](../{files[row.function]}) |"
        for row in CATALOG
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_page_exist_and_have_names(page):
    text = page.read_text(encoding="utf-8")
    for title, link in re.findall(r"\[([^\[\]]*)\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).is_file(), link
        assert not title.endswith(".md"), title  # a page has a name


def test_readme_has_four_entry_points_of_at_most_four_lines_each(capsys):
    entries = PYTHON.findall(README)
    assert len(entries) == 4
    namespace: dict = {}
    exec(entries[0], namespace)
    assert namespace["report"].heads["1"].fused == 1
    for code in entries[1:]:
        exec(code, namespace)
    assert max(len([*filter(None, code.splitlines())]) for code in entries) <= 4
    assert namespace["weight"].grad is not None  # of the log-probabilities
    assert namespace["report"].right
    assert "second order" in capsys.readouterr().out  # a row of the checker's table


def test_example_of_swapping_prints_output_of_page(capsys):
    page = (DOCS / "swapping.md").read_text(encoding="utf-8")
    namespace = {}
    (text,) = OUTPUT.findall(page)
    for code in PYTHON.findall(page):
        if "opacus" not in code or find_spec("opacus") is not None:
            exec(code, namespace)
    assert 0 <= namespace["accuracy"] <= 1
    assert namespace["report"].heads["3"].fused == 2
    assert not namespace["report"].heads["3"].materialized
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", PAGES_WITH_EXAMPLES)
def test_examples_of_page_run_and_print_its_output(name, capsys):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    namespace: dict = {"__name__": "page"}
    for code in PYTHON.findall(page):
        exec(compile(code, f"{name}.md", "exec"), namespace)
    assert capsys.readouterr().out == "".join(OUTPUT.findall(page))


def test_function_with_faults_of_checking_page_prints_its_output(capsys):
    page = (DOCS / "checking.md").read_text(encoding="utf-8")
    namespace: dict = {"__name__": "page"}
    faulty, correct, *_ = PYTHON.findall(page)
    exec(faulty, namespace)
    assert capsys.readouterr().out == next(t for t in OUTPUT.findall(page) if "Square" in t)
    exec(correct, namespace)
    with pytest.raises(AssertionError, match=r"^Square: second order: silent zero"):  # the cause
        testing.assert_right(namespace["Square"], namespace["x"], transforms=testing.QUICK)


def test_table_of_transforms_has_what_each_check_says_in_the_order_of_the_report():
    page = (DOCS / "checking.md").read_text(encoding="utf-8")
    table = re.search(r"^## Transforms$.*?^\| --- .*?\n(.*?)\n\n", page, re.M | re.DOTALL)
    rows = [line.strip("|").split("|") for line in table[1].splitlines()]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [name, "yes" if name in testing.QUICK else "", inspect.getdoc(entry.check).split("\n")[0]]
        for name, entry in REGISTRY.items()
    ]


def test_table_of_verdicts_has_each_member():
    page = (DOCS / "checking.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[\w ]*) \| `(\w+)` \| (yes)? ?\|", page, re.MULTILINE)
    assert rows == [(v.value, v.name, "yes" if v.is_fault else "") for v in testing.Verdict]


def test_pages_that_messages_name_exist_under_these_titles():
    settings = (ROOT / "tools" / "website" / "mkdocs.yml").read_text(encoding="utf-8")
    titles = dict(re.findall(r"- ([^\n:]+): (\w+\.md)$", settings, re.MULTILINE))
    found = set()
    for path in (ROOT / "torch_nnmath").rglob("*.py"):
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))  # joined strings
        named = re.findall(r"page ([A-Z][\w ]*?)(?: of the documentation)?\s+\(docs/(.*?)\)", text)
        for title, file in named:
            assert titles[title] == file, path
        found |= set(named)
    assert ("Swap", "swapping.md") in found
    page = (DOCS / "swapping.md").read_text(encoding="utf-8")
    assert "\n## Why was memory not saved?\n" in page  # the warning of deferred/log.py names it


def test_session_of_gpu_page_prints_what_it_shows():
    results = doctest.testfile(str(DOCS / "gpu.md"), module_relative=False, encoding="utf-8")
    assert results.attempted >= 5
    assert results.failed == 0
