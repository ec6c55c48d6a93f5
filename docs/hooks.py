"""What the site adds to the pages: tables made from the code, equations as MathML, and files that links lead to outside of docs/."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, CHOICES, DATA_HELP, HELP, default_of
from oprd.training.shipped import about, shipped

ROOT = Path(__file__).parents[1]
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")
LIST_AT_ONCE = re.compile(r"^(?! |[-*] |[|#>]|\d+\. )(.*\S.*)\n(?=- |1\. )", re.MULTILINE)
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- (table|check|run): ?(.*?) -->\n", re.MULTILINE)
MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Pages that live at the top of the repository, and every file there that a page links to."""
    for name, source in INCLUDED.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    for page in [page for page in files.documentation_pages() if "/" not in page.src_uri]:
        for path in sorted(set(OUTSIDE.findall(page.content_string))):
            name = f"source/{path}"
            if files.get_file_from_path(name) is None:
                content = (ROOT / path).read_bytes()  # a link to nowhere ends the build
                files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Tables in the place of ``<!-- table: NAME -->``; marks for the tests are left out. A list may follow its paragraph at
    once, as on other sites that show Markdown."""
    parts = FENCED.split(markdown)
    markdown = "".join(
        LIST_AT_ONCE.sub(r"\1\n\n", part) if place % 2 == 0 else part for place, part in enumerate(parts)
    )
    markdown = MARKER.sub(lambda mark: TABLES[mark[2]]() if mark[1] == "table" else "", markdown)
    return markdown if "/" in page.file.src_uri else OUTSIDE.sub(r"](source/\1)", markdown)


def on_page_content(html, page, **_):
    """TeX becomes MathML, which browsers show without a script."""

    def mathml(found: re.Match) -> str:
        made = convert(unescape(found[3]), display="block" if found[1] == "div" else "inline")
        if "\\" in made:
            raise ValueError(
                f"{page.file.src_uri}: a command of {found[3]!r} is not known to latex2mathml. Write it otherwise."
            )
        return f'<div class="equation">{made}</div>' if found[1] == "div" else made

    return MATHS.sub(mathml, html)


def recipes() -> str:
    """Every recipe that ships, as ``oprd recipes`` lists them."""
    rows = ["| recipe | what | student; teacher; objective |", "|---|---|---|"]
    for one in map(about, shipped().values()):
        purpose = one["purpose"].replace("(docs/results.md)", "([results](results.md))")
        rows.append(f"| `{one['name']}` | {purpose} | {one['student']};<br>{one['teacher']};<br>{one['objective']} |")
    return "\n".join(rows) + "\n"


def _settings(table: dict[str, str]):
    def rows() -> str:
        lines = ["| key | what it does | default |", "|---|---|---|"]
        for name, text in table.items():
            default = f"`{default_of(name)}`" if default_of(name) else ""
            choices = " ".join(f"`{choice}`" for choice in CHOICES.get(name, ()))
            lines.append(
                f"| `{name}` | {text.replace('|', chr(92) + '|')}{f'<br>{choices}' if choices else ''} | {default} |"
            )
        return "\n".join(lines) + "\n"

    return rows


TABLES = {
    "recipes": recipes,
    "objective": _settings(HELP),
    "data": _settings(DATA_HELP),
    "bridge": _settings(BRIDGE_HELP),
    "benchmarks": _settings(BENCHMARK_HELP),
}
