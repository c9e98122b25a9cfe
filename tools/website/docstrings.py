"""The extension by which mkdocstrings shows the examples of docstrings as examples."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Puts lines that start with >>> into a section of examples, as Google's style has it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = mark_examples(escape_shapes(obj.docstring.value))


def escape_shapes(text: str) -> str:
    """Returns the docstring with a backslash before the star of a shape such as (*, C)."""
    return re.sub(r"(?<=\()\*(?=[,)])|(?<=, )\*(?=[,)])", r"\\*", text)


def mark_examples(text: str) -> str:
    """Returns the docstring with each example in a section of its own."""
    paragraphs = re.split(r"\n{2,}(?!\s)", text)
    return "\n\n".join(
        "Examples:\n" + re.sub("^", "    ", paragraph, flags=re.MULTILINE)
        if paragraph.startswith(">>>")
        else paragraph
        for paragraph in paragraphs
    )
