"""Builds the site: pages written by hand, a page for each formula, and the API.

    pip install -c constraints.txt ".[docs]"
    python tools/website/build.py            # into build/website/site

A broken link, a page that the navigation lacks, and a formula that cannot be typeset are errors. It
needs npm, which fetches KaTeX. The site itself loads nothing from a network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import formula_pages
import yaml
from staging import ROOT, Stage

HERE = Path(__file__).resolve().parent
PACKAGES = ("package.json", "package-lock.json")


def build(folder: Path) -> Path:
    """Builds the site in the folder and returns the site's own folder."""
    shutil.rmtree(folder, ignore_errors=True)
    katex = install_katex(folder / "npm")
    stage = Stage(folder / "pages")
    stage.add_pages()
    formulas = formula_pages.add_pages(stage)
    copy_styles(katex, stage.folder / "assets")
    return make_site(folder, make_settings(formulas), katex)


def make_site(folder: Path, settings: dict[str, Any], katex: Path) -> Path:
    """Makes the site of the folder `pages` and typesets its mathematics. A warning is an error."""
    file = folder / "mkdocs.yml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(file))
    site = folder / "site"
    run("node", str(HERE / "render.mjs"), str(katex), *map(str, sorted(site.rglob("*.html"))))
    return site


def install_katex(folder: Path) -> Path:
    """Installs KaTeX from npm, in the version of package.json, and returns its folder."""
    folder.mkdir(parents=True)
    for name in PACKAGES:
        shutil.copy(HERE / name, folder)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", cwd=folder)
    return folder / "node_modules" / "katex"


def copy_styles(katex: Path, folder: Path) -> None:
    """Copies KaTeX's style sheet and fonts, and the site's own style sheet."""
    fonts = folder / "katex" / "fonts"
    fonts.mkdir(parents=True)
    shutil.copy(katex / "dist" / "katex.min.css", folder / "katex")
    for font in (katex / "dist" / "fonts").glob("*.woff2"):  # the others are for old browsers
        shutil.copy(font, fonts)
    shutil.copy(HERE / "site.css", folder)


def make_settings(formulas: list[Any]) -> dict[str, Any]:
    """Returns the settings of MkDocs with the folders and the pages of the formulas."""
    settings: dict[str, Any] = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    settings |= {"docs_dir": "pages", "site_dir": "site"}  # beside the settings
    for section in settings["nav"]:
        if section.get("Formulas") == []:
            section["Formulas"] = formulas
    for plugin in settings["plugins"]:
        if isinstance(plugin, dict):
            handler = plugin["mkdocstrings"]["handlers"]["python"]
            handler["paths"] = [str(ROOT)]
            handler["options"]["extensions"] = [str(HERE / "docstrings.py")]
    return settings


def run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "website", metavar="FOLDER")
    print(build(parser.parse_args(argv).output.resolve()))


if __name__ == "__main__":
    main()
