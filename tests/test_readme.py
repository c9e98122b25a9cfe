"""The README says what is there."""

import re
from pathlib import Path

from torch_nnmath.catalog import CATALOG

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_formulas_is_the_catalog():
    lines = re.findall(r"^\| F\d.*$", README, re.MULTILINE)
    files = {row.function: row.function.__module__.replace(".", "/") + ".py" for row in CATALOG}
    assert lines == [
        f"| {' '.join(row.ids)} | {row.section} | {row.title} | "
        f"[`{row.function.__name__}`]({files[row.function]}) |"
        for row in CATALOG
    ]


def test_links_lead_somewhere():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    for page in (README, *pages):
        for link in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link


def test_the_example_of_use_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert "3 modules changed" in capsys.readouterr().out
    assert names["HV"].shape == names["W"].shape
    assert abs(names["J"].sum()) < 1e-6
