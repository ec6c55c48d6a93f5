"""What the troubleshooting page puts in code is in the code: settings, metrics, the words of errors and warnings."""

import ast
import re
from dataclasses import fields
from pathlib import Path

from oprd.training.options import CHOICES
from oprd.training.recipe import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))))
FROM_LIBRARIES = (  # TRL, torch, NCCL
    "completions/",
    "Watchdog caught collective operation timeout",
    "NCCL_DEBUG=INFO",
    "<|",
    "grad_norm",
    "loss",
    "generation_config.json",
)


def strings_of_the_package() -> str:
    """What an f-string fills in is a tab."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\t" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_code_says_so():
    from oprd.cli import build_parser

    keys = {field.name for kind in KINDS for field in fields(kind)} | {
        word for words in CHOICES.values() for word in words
    }
    said, helped, unknown = strings_of_the_package(), build_parser().format_help(), []
    assert len(QUOTES) > 80
    for quote in QUOTES:
        if quote.startswith(FROM_LIBRARIES) or quote.split(":")[0] in keys:
            continue
        if quote.startswith("oprd "):  # whole commands are in fenced blocks
            unknown += [] if "--traceback" in quote or quote.split()[1] in helped else [quote]
            continue
        parts = (part.strip(" ;().?") for part in re.split(r"\.\.\.|\b[A-Z]\b|\b\d+\b", quote))
        unknown += [f"{quote}: {part}" for part in parts if part and part not in said]
    assert not unknown
