"""The table of docs/versions.md, the releases of noxfile.py, and the tool that writes rows."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from scripts import DOCS, ROOT, TOOLS, import_scripts

TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_is_skipped(n): pytest.skip("no | here")

@pytest.mark.skipif(True, reason="never")
def test_is_never_run(): pass

@pytest.mark.xfail(reason="known")
def test_fails_as_expected(): assert False
"""
FAILURES = """
def test_fails(): assert False

@pytest.fixture
def broken(): raise RuntimeError

def test_has_a_broken_fixture(broken): pass
"""
PAGE = """# Page

| before | table |
| --- | --- |
| 2.0.0 | stays |

| PyTorch | Triton | date | passed | failed | skipped | reasons |
| --- | --- | --- | --- | --- | --- | --- |
| 2.9.0 | 3.5.0 | 2026-01-01 | 1 | 0 | 0 |  |
| 2.90.0 | 3.5.0 | 2026-01-01 | 1 | 0 | 0 |  |

After the table.
"""


@pytest.fixture(scope="module")
def tool():
    with import_scripts("tested_versions", folder=TOOLS) as (module,):
        yield module


def run_tests(folder, code):
    """Returns the JUnit file of a test file with this code."""
    (folder / "test_planted.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_planted.py"]
    done = subprocess.run([*command, "--junitxml=results.xml"], cwd=folder, capture_output=True)
    assert done.returncode in (0, 1), done.stdout
    return folder / "results.xml"


def read_rows():
    return re.findall(r"^\| (\d+\.\d+\.\d+) \|(.*)\|$", (DOCS / "versions.md").read_text(), re.M)


def read_releases():
    (releases,) = re.findall(r"^RELEASES = \((.*)\)$", (ROOT / "noxfile.py").read_text(), re.M)
    return re.findall(r'"([\d.]+)"', releases)


@pytest.mark.parametrize("fails", [False, True])
def test_command_replaces_the_row_of_the_installed_release(tool, tmp_path, capsys, fails):
    results = run_tests(tmp_path, TESTS + FAILURES * fails)
    page = tmp_path / "page.md"
    release = torch.__version__.partition("+")[0]
    page.write_text(PAGE.replace("2.9.0", release), encoding="utf-8")
    assert tool.main([str(results), str(page)]) == fails
    (row,) = (line for line in page.read_text().splitlines() if line.startswith(f"| {release} "))
    assert row == capsys.readouterr().out.rstrip("\n")
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    failed = "2" if fails else "0"
    assert cells[1] == version("triton")
    assert cells[3:] == ["2", failed, "3", "2 no \\| here<br>1 never"]


def test_rows_are_sorted_and_the_rest_of_the_page_stays(tool):
    for release, place in (("2.8.0", 0), ("2.10.0", 1), ("2.100.0", 2)):
        row = f"| {release} | 3.6.0 | 2026-02-02 | 5 | 0 | 0 |  |\n"
        page = tool.insert_row(PAGE, row)
        assert page.replace(row, "", 1) == PAGE
        table = page[page.index("| PyTorch") :].splitlines()[2:]
        assert table[place] == row.rstrip("\n")


def test_run_without_a_passed_test_is_refused(tool, tmp_path):
    with pytest.raises(ValueError, match="no test that passed"):
        tool.read_result([run_tests(tmp_path, FAILURES.replace("@", "import pytest\n@"))])


def test_later_run_replaces_tests_of_the_first(tool, tmp_path):
    (tmp_path / "again").mkdir()
    first = run_tests(tmp_path, TESTS + FAILURES)
    again = run_tests(tmp_path / "again", "def test_fails(): pass")
    result = tool.read_result([first, again])
    assert (result.passed, result.failed, result.skipped.total()) == (3, 1, 3)


def test_rows_of_the_page_are_the_releases_of_nox_without_failures():
    rows = dict(read_rows())
    assert list(rows) == read_releases()
    for release, row in rows.items():
        _, _, passed, failed, _, _ = row.split("|", 5)
        assert int(passed) > 1000, release
        assert int(failed) == 0, release


def test_tested_releases_include_the_oldest_supported_and_the_pinned_one():
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    (pinned,) = re.findall(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    releases = read_releases()
    assert releases[0].startswith(f"{oldest}.")
    assert pinned in releases
