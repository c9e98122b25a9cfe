"""Copies the repository's pages to the site's folder, with links that hold there.

Pages link to each other and to files of the repository by relative paths, which hold in a checkout.
In the site, a linked page is a page. A linked file of text is a page that shows it, in the folder
`files`. Any other linked file is copied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {".py": "python", ".toml": "toml", ".txt": "text", ".cff": "yaml", "": "text"}
COPIED = {".png", ".svg", ".json"}

# Pages outside of docs/, by their paths in the repository and in the site.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "examples/results/README.md": "results.md",
}
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


class Stage:
    """The folder of the site's pages, as MkDocs reads them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, path: str, text: str) -> None:
        """Writes a page or a file of the site."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def add_pages(self) -> None:
        """Adds every page of the repository that is written by hand."""
        for page in sorted((ROOT / "docs").rglob("*.md")):
            path = page.relative_to(ROOT / "docs").as_posix()
            self.add_page(f"docs/{path}", path)
        for path, place in PAGES.items():
            if path != "README.md":  # docs/index.md is the site's first page
                self.add_page(path, place)

    def add_page(self, path: str, place: str) -> None:
        text = (ROOT / path).read_text(encoding="utf-8")
        self.write(place, self.translate_links(text, path, place))

    def translate_links(self, text: str, path: str, place: str) -> str:
        """Returns the page's text with links that hold in the site.

        `path` is that of the page in the repository, to which its links are relative, and `place`
        its path in the site. Raises FileNotFoundError for a link to a file that does not exist.
        """

        def translate(match: re.Match[str]) -> str:
            target = self.place(os.path.normpath(os.path.join(os.path.dirname(path), match[1])))
            return f"]({os.path.relpath(target, os.path.dirname(place))}{match[2] or ''})"

        parts = CODE.split(text)
        parts[::2] = [LINK.sub(translate, part) for part in parts[::2]]
        return "".join(parts)

    def place(self, path: str) -> str:
        """Returns the path in the site of a file of the repository; adds the file if needed."""
        source = ROOT / path
        generated = path.removeprefix("docs/")
        if not source.exists() and (self.folder / generated).is_file():
            return generated
        if not source.is_file():
            raise FileNotFoundError(f"a page links to {path}, which is no file")
        if path in PAGES:
            return PAGES[path]
        if path.startswith("docs/") and source.suffix == ".md":
            return path.removeprefix("docs/")
        if source.suffix in COPIED:
            target = self.folder / "files" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            return f"files/{path}"
        place = f"files/{path}.md"
        if not (self.folder / place).exists():
            code = fence(source.read_text(encoding="utf-8"), LANGUAGES[source.suffix])
            self.write(place, f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n{code}")
        return place


def fence(code: str, language: str) -> str:
    """Returns a block of code for Markdown, whatever the code contains."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{code.rstrip()}\n{marks}\n"


def make_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
