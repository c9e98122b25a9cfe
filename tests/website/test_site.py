"""The built site: its links, its mathematics, and its pages in a browser.

The environment variable SITE names the folder of a site that `tools/website/build.py` has built;
without it the tests build one. They are skipped where a program for that is absent.
"""

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from scripts import ROOT, TOOLS, import_scripts

from torch_nnmath.catalog import CATALOG

MISSING = [
    *(name for name in ("mkdocs", "material", "mkdocstrings", "playwright") if not find_spec(name)),
    *(name for name in ("npm", "node", "chromium") if not shutil.which(name)),
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"the site's tests need {', '.join(MISSING)}"),
]

# One page of each kind.
PAGES = [
    "index.html",
    "swapping.html",
    "formulas.html",
    "formulas/f7-softmax.html",
    "formulas/f17-softmax-s-jacobian.html",
    "formulas/f23-scaled-and-capped-head-with-z-loss.html",
    "slips.html",
    "by_hand.html",
    "performance.html",
    "results.html",
    "migration.html",
    "api/functional.html",
    "api/nn.html",
    "contributing.html",
    "glossary.html",
    "files/torch_nnmath/reference.py.html",
]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The names, links and loaded files of an HTML file."""

    def __init__(self, path):
        super().__init__()
        self.names, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in LOADED and values.get(LOADED[tag]) and values.get("rel") != "canonical":
            self.loaded.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if "SITE" in os.environ:
        return Path(os.environ["SITE"])
    folder = tmp_path_factory.mktemp("website")
    command = [sys.executable, str(TOOLS / "website" / "build.py"), "--output", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.fixture(scope="module")
def address(site):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Returns a function that opens a page in one window; no page may have an error."""
    windows, errors = {}, []

    def open_path(path, width=1280, scheme="light"):
        if (width, scheme) not in windows:
            size = {"width": width, "height": 900}
            windows[width, scheme] = browser.new_page(viewport=size, color_scheme=scheme)
            watch(windows[width, scheme])
        page = windows[width, scheme]
        page.goto(f"{address}/{path}")
        return page

    def watch(page):
        page.on("console", lambda message: note(message.text, message.type == "error"))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("request", lambda request: note(f"loads {request.url}", is_foreign(request.url)))

    def is_foreign(url):
        return not url.startswith((f"{address}/", "data:", "blob:"))

    def note(error, is_error=True):
        if is_error:
            errors.append(error)

    yield open_path
    for page in windows.values():
        page.close()
    assert not errors


DOCSTRING = """The loss.

Args:
    input, target: (*, C) or (N, *), of
        one shape.
    weight: (C).

>>> 1 + 1
2
"""
REWRITTEN = """The loss.

Args:
    input: (\\*, C) or (N, \\*), of
        one shape.
    target: (\\*, C) or (N, \\*), of
        one shape.
    weight: (C).

Examples:
    >>> 1 + 1
    2
    """


def test_docstring_is_rewritten_for_the_page():
    with import_scripts("docstrings", folder=TOOLS / "website") as (docstrings,):
        assert docstrings.rewrite(DOCSTRING) == REWRITTEN


@pytest.fixture(scope="module")
def build():
    with import_scripts("build", folder=TOOLS / "website") as (build,):
        yield build


@pytest.fixture(scope="module")
def katex(build, tmp_path_factory):
    return build.install_katex(tmp_path_factory.mktemp("katex") / "npm")


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("[x](other.md#place) $a_j$", True),
        ("[x](other.md#nowhere)", False),
        ("[x](nowhere.md)", False),
        (r"$\nothing$", False),
        (r"$\frac{1}{$", False),
    ],
)
def test_build_refuses_broken_links_and_formulas(build, katex, tmp_path, text, is_right):
    pages = tmp_path / "pages"
    build.copy_styles(katex, pages / "assets")
    (pages / "index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    (pages / "other.md").write_text("# Other\n\n## Place\n", encoding="utf-8")
    settings = build.make_settings([]) | {"nav": ["index.md", "other.md"]}
    with contextlib.nullcontext() if is_right else pytest.raises(subprocess.CalledProcessError):
        build.make_site(tmp_path, settings, katex)


@pytest.mark.parametrize("link", ["nowhere.md", "../nowhere.py"])
def test_page_with_a_link_to_no_file_is_refused(tmp_path, link):
    with import_scripts("staging", folder=TOOLS / "website") as (staging,):
        stage = staging.Stage(tmp_path)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            stage.translate_links(f"[x]({link})", "docs/index.md", "index.md")
        assert stage.translate_links(f"`[x]({link})`", "docs/index.md", "index.md")


def test_every_formula_has_a_page(site):
    found = {
        re.search(r"<h1[^>]*>(.*?)<a", path.read_text(encoding="utf-8"))[1]
        for path in (site / "formulas").glob("*.html")
    }
    assert {name.replace("&#39;", "'") for name in found} == {row.name for row in CATALOG}


def test_each_function_says_what_it_returns(site):
    text = (site / "api" / "functional.html").read_text(encoding="utf-8")
    returns = re.findall(r"Returns:.*?<code>(.*?)</code>", text, re.DOTALL)
    types = {re.sub("<[^>]*>", "", each) for each in returns}
    assert len(returns) == text.count("Returns:</span>")
    assert types == {"Tensor", "Tensor | tuple"}


def test_links_between_pages_lead_to_a_place(site, pages):
    count = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].names, f"{path}: {link}"
            count += 1
    assert count > 1000


def test_pages_load_only_the_sites_own_files(site, pages):
    for path, page in pages.items():
        assert page.loaded
        for file in page.loaded:
            assert not urlsplit(file).scheme or file.startswith("data:"), f"{path}: {file}"
            assert not file.startswith("//"), f"{path}: {file}"
            if not file.startswith("data:"):
                assert (path.parent / unquote(urlsplit(file).path)).is_file(), f"{path}: {file}"
    for style in site.rglob("*.css"):
        addresses = re.findall(r"url\(['\"]?([^'\")]*)", style.read_text(encoding="utf-8"))
        assert not [a for a in addresses if a.startswith(("http", "//"))], style


def test_mathematics_is_typeset_in_the_files(site):
    count = 0
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text, path
        assert "katex-error" not in text, path
        count += text.count('<span class="katex">')
    assert count > 5 * len(CATALOG)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_into_the_window_without_errors(open_page, width, scheme):
    for path in PAGES:
        page = open_page(path, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.locator("h1").count() == 1
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red, green, blue = map(int, re.findall(r"\d+", background)[:3])
        assert (red + green + blue < 3 * 64) == (scheme == "dark"), (path, background)
        if path.startswith("formulas/"):
            formulas = page.locator(".katex-display")
            assert formulas.count() >= 4
            assert formulas.first.bounding_box()["height"] > 20
            assert page.evaluate("document.fonts.check('1em KaTeX_Main')")
            visible = [image.is_visible() for image in page.locator("article img").all()]
            assert visible.count(True) == 1  # the picture in the colours of the scheme


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    ("words", "path"),
    [("softcap", "head.html"), ("MaterializedLogits", "troubleshooting.html")],
)
def test_search_finds_a_page_and_opens_it(open_page, width, words, path):
    page = open_page("index.html", width)
    if width < 1000:
        page.locator("label.md-header__button[for=__search]").click()
    page.locator("input.md-search__input").click()
    page.keyboard.type(words)
    result = page.locator(f".md-search-result__link[href*='{path}']").first
    result.wait_for(timeout=20_000)
    result.click()
    page.wait_for_url(f"**/{path}*")
    assert words in page.locator("article").inner_text()


def test_button_changes_the_colours(open_page):
    page = open_page("index.html", scheme="light")
    page.locator("label.md-header__button[title='Dark colours']").click()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
