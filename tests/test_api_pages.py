"""Every public name is on a page of the API, with its errors and an example that runs."""

import inspect
import re

import pytest
from scripts import DOCS

import torch_nnmath
from torch_nnmath import functional, kernels, lightning, nn, parallel, swapping, testing
from torch_nnmath.deferred import HeadLog, MaterializedLogits

NAMES = {
    functional: functional.__all__,
    nn: nn.__all__,
    torch_nnmath: ["swap", "unswap"],
    swapping: ["Report", "Change"],
    torch_nnmath.deferred: ["HeadLog", "MaterializedLogits"],
    testing: testing.__all__,
    lightning: lightning.__all__,
    parallel: parallel.__all__,
    kernels: ["explain", "set_memory_budget", "get_memory_budget"],
}
# These raise nothing of their own: results, constants, errors, and functions of any arguments.
WITHOUT_ERRORS = {
    *(swapping.Report, swapping.Change, HeadLog, MaterializedLogits),
    *(testing.Report, testing.Row, testing.Verdict, testing.QUICK, testing.TRANSFORMS),
    *(lightning.GradientError, kernels.get_memory_budget),
}


def read_sections():
    """Returns the text that follows each name's directive, up to the next one, with its page."""
    sections = {}
    for path in sorted((DOCS / "api").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^::: (\S+)$(.*?)(?=^:::|\Z)", page, re.M | re.DOTALL):
            assert match[1] not in sections, f"{match[1]} is documented twice"
            sections[match[1]] = match[2], page
    return sections


SECTIONS = read_sections()
PUBLIC = [
    pytest.param(module, name, id=f"{module.__name__}.{name}")
    for module, names in NAMES.items()
    for name in names
]


def test_pages_have_no_other_names():
    public = {f"{module.__name__}.{name}" for module, names in NAMES.items() for name in names}
    assert set(SECTIONS) == public


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_name_has_a_docstring_its_errors_and_an_example(module, name):
    section, page = SECTIONS[f"{module.__name__}.{name}"]
    value = getattr(module, name)
    docstring = inspect.getdoc(value) or ""
    if not isinstance(value, tuple):  # a constant
        assert docstring
    if value not in WITHOUT_ERRORS:
        assert re.search(r"[Rr]aises|errors", docstring + section)
    examples = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert ">>>" in docstring or re.search(rf"\b{name}\b", examples)
