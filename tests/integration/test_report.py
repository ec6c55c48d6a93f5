"""The report of a real run, as a browser sees it: every chart drawn, in light and dark, on a phone, without a network."""

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from oprd.cli import main

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """``report.html`` of a run of two terms with benchmarks, and with its teacher and student evaluated."""
    run = tmp_path_factory.mktemp("runs") / "a <run> & more"
    flags = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "output_loss": "top_k"}
    flags |= {"validation_benchmark": "miniature:validation.jsonl", "benchmark_steps": 2, "benchmark_limit": 8}
    flags |= {"benchmark_samples": 2, "output_dir": run}
    assert main(["train", "--config", "miniature", *(str(p) for k, v in flags.items() for p in (f"--{k}", v))]) == 0
    roles = ["--of", "teacher", "student", "final", "--on", "miniature:test.jsonl", "--limit", "8", "--samples", "2"]
    assert main(["eval", str(run), *roles]) == 0
    assert main(["report", str(run)]) == 0
    return run / "report.html"


class Tags(HTMLParser):
    """Tags in order, with attributes; complains about what is not closed."""

    VOID = {"meta", "br", "img", "input", "hr", "link"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_one_file_without_a_network_or_a_script(page):
    text = page.read_text(encoding="utf-8")
    found = Tags(text).found
    assert not [tag for tag, _ in found if tag in ("script", "link", "img", "iframe")]
    outside = [value for _, given in found for name, value in given.items() if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in outside)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [given["id"] for _, given in found if "id" in given]
    assert len(ids) == len(set(ids))
    assert {given["href"][1:] for tag, given in found if tag == "use" and "href" in given} <= set(ids)


def test_names_are_escaped(page):
    assert "a &lt;run&gt; &amp; more" in page.read_text(encoding="utf-8")
    assert "<run>" not in page.read_text(encoding="utf-8")


def test_what_is_on_it(page):
    text = page.read_text(encoding="utf-8")
    charts = set(re.findall(r'data-chart="([^"]+)"', text))
    assert charts >= {"accuracy", "cosine", "layers", "loss", "length", "cut", "entropy", "overlap", "gradient", "rate"}
    assert charts >= {"speed", "time", "interval0", "interval1", "scores0"}
    for words in (
        "teacher",
        "student before",
        "student after",
        "manifest.json",
        "miniature:teacher",
        "layer 4",
        "95 %",
    ):
        assert words in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(svg)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        assert not os.environ.get("OPRD_BROWSER_REQUIRED"), "install chromium"
        pytest.skip("needs a browser: install chromium")  # a page is still checked by its text above
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


DRAWN = """() => [...document.querySelectorAll('figure[data-chart]')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const seen = [...svg.querySelectorAll('[id*="-line2d"] path, [id*="PolyCollection"] path, [id*="PolyCollection"] use, [id*="-line2d"] use')]
    .filter(mark => { const b = mark.getBoundingClientRect(); return b.width + b.height > 0.5; });
  const texts = [...svg.querySelectorAll('text')];
  return {name: figure.dataset.chart, marks: +figure.dataset.marks, width: box.width, height: box.height,
    drawn: seen.length, texts: texts.length, ink: getComputedStyle(texts[0]).fill,
    inside: texts.every(t => { const b = t.getBoundingClientRect(); return b.left >= box.left - 2 && b.right <= box.right + 2; })};
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_every_chart_is_drawn(page, browser, scheme, size):
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    opened = context.new_page()
    faults, asked = [], []
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page.as_uri())
    charts = opened.evaluate(DRAWN)
    assert len(charts) >= 14
    for chart in charts:
        assert chart["drawn"] >= chart["marks"] > 0, chart
        assert chart["width"] > 0.7 * min(size["width"], 330) and chart["height"] > 60, chart
        assert chart["texts"] >= 4 and chart["inside"], chart
    ground = opened.evaluate("() => getComputedStyle(document.body).backgroundColor")
    ink = {chart["ink"] for chart in charts}
    light = lambda color: sum(map(int, re.findall(r"\d+", color)[:3])) / 3  # noqa: E731
    assert (light(ground) > 200) is (scheme == "light")
    assert all(abs(light(color) - light(ground)) > 120 for color in ink)  # text that can be read on it
    assert opened.evaluate("() => document.documentElement.scrollWidth") <= size["width"]  # nothing sticks out
    assert faults == []
    assert asked == [page.as_uri()]
    context.close()


def test_a_run_without_evaluations_says_how_to_get_them(tmp_path):
    run = tmp_path / "run"
    flags = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--output_dir", str(run)]
    assert main(["train", "--config", "miniature", *flags]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert f"oprd eval {run} --of teacher student final --on BENCHMARK" in text
    assert "No evaluation yet" in text


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "is not a run of oprd train" in capsys.readouterr().err
    assert list(Path(tmp_path).iterdir()) == []
