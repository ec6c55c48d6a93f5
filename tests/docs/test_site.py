"""The site as ``make docs`` builds it: whole, from the code as it is, and nothing of it is fetched from elsewhere."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, CHOICES, DATA_HELP, HELP

ROOT = Path(__file__).parents[2]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
WINGS = ("oprd", "oprd.objectives", "oprd.states", "oprd.bridge", "oprd.evaluation", "oprd.insight", "oprd.compression")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a broken link or anchor, a page outside of the navigation, or an unknown equation fails here."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """What a page loads, and the ids in it."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.ids = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        is_for_people = tag == "link" and found.get("rel") in ("canonical", "prev", "next")
        if tag in LOADED and LOADED[tag] in found and not is_for_people:
            self.loaded.append(found[LOADED[tag]])


def test_nothing_comes_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        outside = [target for target in Page(path).loaded if re.match(r"(https?:)?//", target)]
        assert not outside, f"{path.relative_to(site)}: {outside}"


def test_recipes_and_settings_are_those_of_the_code(site):
    text = (site / "recipes.html").read_text()
    rows = re.findall(r"<tr>\s*<td><code>([\w.-]+)</code></td>", text)
    recipes = {path.name.removesuffix(".yaml") for path in files("oprd").joinpath("recipes").iterdir()}
    assert {*recipes, *HELP, *DATA_HELP, *BRIDGE_HELP, *BENCHMARK_HELP} <= set(rows)
    assert all(f"<code>{choice}</code>" in text for choices in CHOICES.values() for choice in choices)
    assert "<!--" not in re.sub(r"<!--\[if.*?-->", "", text.split("<article")[1].split("</article")[0])


def test_every_public_name_is_in_the_reference(site):
    ids = set().union(*(Page(path).ids for path in (site / "api").glob("*.html")))
    missing = []
    for wing in WINGS:
        for name in importlib.import_module(wing).__all__:
            home = getattr(getattr(importlib.import_module(wing), name), "__module__", wing).split(".")
            places = {wing, *(".".join(home[:depth]) for depth in range(1, len(home) + 1))}
            if not {f"{place}.{name}" for place in places} & ids:
                missing.append(f"{wing}.{name}")
    assert missing == ["oprd.__version__"], "no entry, or no docstring"


def test_equations_are_mathml(site):
    text = (site / "method.html").read_text()
    assert text.count("<math") > 20
    assert "arithmatex" not in text


def test_lists_are_lists(site):
    for path in sorted(site.rglob("*.html")):
        prose = re.sub(r"<code>.*?</code>", "", path.read_text(), flags=re.DOTALL)
        loose = re.findall(r"<p>(?:(?!</p>).)*?\n(?:- |1\. ).{0,60}", prose, re.DOTALL)
        assert not loose, f"{path.relative_to(site)}: {loose[0][-80:]}"


def test_readme_leads_to_every_guide():
    said = (ROOT / "README.md").read_text()
    guides = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {name for name in guides if f"docs/{name}" not in said} == set()


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        assert not os.environ.get("OPRD_BROWSER_REQUIRED"), "install chromium"
        pytest.skip("needs a browser: install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk light", "phone dark"])
def test_pages_fit_the_screen(site, browser, size, scheme):
    """Wide tables, code and equations scroll by themselves; the page does not."""
    page = browser.new_context(viewport=size, color_scheme=scheme, offline=True).new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for name in ("index", "method", "recipes", "comparison", "troubleshooting", "results"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 300) == (scheme == "dark")
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)
    page.context.close()
