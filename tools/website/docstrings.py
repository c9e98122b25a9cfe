"""The extension by which mkdocstrings reads this library's docstrings in Google's style."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An entry of a section for several names, with its further lines.
GROUP = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)
# The star of a shape such as (*, C), which would begin emphasis.
STAR = re.compile(r"(?<=\()\*(?=[,)])|(?<=, )\*(?=[,)])")


class GoogleStyle(griffe.Extension):
    """Rewrites the docstring of each object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)
        if isinstance(obj, griffe.Function) and str(obj.returns) == "Any":
            obj.returns = "Tensor | tuple"  # a tuple if an option asks for more results


def rewrite(text: str) -> str:
    """Returns the docstring with an entry for each name and a section for each example."""
    text = GROUP.sub(split_group, STAR.sub(r"\\*", text))
    paragraphs = re.split(r"\n{2,}(?!\s)", text)
    return "\n\n".join(
        "Examples:\n" + re.sub("^", "    ", paragraph, flags=re.MULTILINE)
        if paragraph.startswith(">>>")
        else paragraph
        for paragraph in paragraphs
    )


def split_group(match: re.Match[str]) -> str:
    names, text = match.groups()
    return "\n".join(f"    {name}: {text}" for name in names.split(", "))
