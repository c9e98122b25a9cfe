"""The README's table, links and examples, and the example of docs/swapping.md."""

import re
from importlib.util import find_spec
from pathlib import Path

from torch_nnmath.catalog import CATALOG

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_formulas_equals_catalog():
    lines = re.findall(r"^\| F\d.*$", README, re.MULTILINE)
    files = {row.function: row.function.__module__.replace(".", "/") + ".py" for row in CATALOG}
    assert lines == [
        f"| {' '.join(row.ids)} | {row.section} | {row.title} | "
        f"[`{row.function.__name__}`]({files[row.function]}) |"
        for row in CATALOG
    ]


def test_links_of_pages_exist():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    for page in (README, *pages):
        for link in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link


def test_examples_of_readme_run(capsys):
    namespace: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, namespace)
    printed = capsys.readouterr().out
    assert "3 modules changed\nhead 2: 1 loss without logits" in printed
    assert "second order" in printed  # a row of the checker's table
    assert namespace["HV"].shape == namespace["W"].shape
    assert abs(namespace["J"].sum()) < 1e-6


def test_example_of_swapping_prints_output_of_page(capsys):
    page = (ROOT / "docs" / "swapping.md").read_text(encoding="utf-8")
    namespace = {}
    (text,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "opacus" not in code or find_spec("opacus") is not None:
            exec(code, namespace)
    assert 0 <= namespace["accuracy"] <= 1
    assert namespace["report"].heads["3"].fused == 2
    assert not namespace["report"].heads["3"].materialized
    assert capsys.readouterr().out == text
