"""The quickstart example, and the links of the pages in examples/."""

import re

import pytest
from scripts import EXAMPLES, list_files, run_script

QUICKSTART = EXAMPLES / "quickstart.py"


def test_quickstart_prints_falling_losses_and_report(tmp_path):
    done = run_script(QUICKSTART, folder=tmp_path)
    losses = [float(x) for x in re.findall(r"^step \d  loss (\S+)$", done.stdout, re.M)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert "torch.nn.Linear  ->  torch_nnmath.nn.Linear  head" in done.stdout
    assert re.search(r"^head 2: 5 losses without logits", done.stdout, re.M)
    assert not list_files(tmp_path)


def test_quickstart_imports_only_torch_and_the_library():
    imports = re.findall(r"^(?:import|from) (\S+)", QUICKSTART.read_text(encoding="utf-8"), re.M)
    assert imports == ["torch", "torch_nnmath"]


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_of_pages_exist(page):
    text = (EXAMPLES / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    for link in links:
        assert ((EXAMPLES / page).parent / link).exists(), link


def test_readme_lists_every_script():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert script.name in text
