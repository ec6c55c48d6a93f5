"""Recompute an evaluation's summary from its responses.jsonl, with nothing of oprd: the standard library and math-verify.

    python benchmarks/recompute_summary.py EVALUATION_FOLDER [...]

Grades every response again (last balanced box; exact numbers; else math-verify), and compares Avg@k, Best@k, pass@k, Dist-4g,
mean length, shares cut off and without a box with ``summary.json``; intervals are held against a bootstrap written out here.
Exits with 1 on any disagreement.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from decimal import Decimal, InvalidOperation
from itertools import combinations
from pathlib import Path


def last_box(text: str) -> str | None:
    """The last whole \\boxed{...}, by counting braces backwards from every opening."""
    for start in sorted((i for i in range(len(text)) if text.startswith(("\\boxed{", "\\fbox{"), i)), reverse=True):
        depth = 0
        opening = text.index("{", start)
        for place in range(opening, len(text)):
            if text[place] == "{" and text[place - 1] != "\\":
                depth += 1
            elif text[place] == "}" and text[place - 1] != "\\":
                depth -= 1
                if depth == 0:
                    return text[opening + 1 : place].strip()
    return None


def is_right(response: str, answer: str) -> bool:
    box = last_box(response)
    if box is None:
        return False
    gold = last_box(answer)
    gold = answer.strip() if gold is None else gold
    if box == gold:
        return True
    try:
        return Decimal(box.replace(",", "")) == Decimal(gold.replace(",", ""))
    except InvalidOperation:
        from math_verify import parse, verify

        one, other = (parse(f"\\boxed{{{text}}}") for text in (gold, box))
        return bool(one and other and verify(one, other))


def pass_at(right: list[bool], k: int) -> float:
    """By listing every choice of k samples: the share with a right one."""
    choices = list(combinations(right, k))
    return 100 * sum(any(choice) for choice in choices) / len(choices)


def distinct_4(texts: list[str]) -> float | None:
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 100 * len(set(grams)) / len(grams) if grams else None


def recompute(folder: Path) -> dict[str, float]:
    """Every number of the summary, from the lines."""
    problems: dict[str, list[dict]] = defaultdict(list)
    for line in (folder / "responses.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            problems[row["problem"]].append(row)
    right = {name: [is_right(row["response"], row["answer"]) for row in rows] for name, rows in problems.items()}
    rows = [row for one in problems.values() for row in one]
    mean = lambda values: None if None in values else sum(values) / len(values)  # noqa: E731
    found = {
        "problems": len(problems),
        "samples": len(next(iter(problems.values()))),
        "avg_at_k": mean([100 * mean(one) for one in right.values()]),
        "best_at_k": mean([100 * any(one) for one in right.values()]),
        "distinct_4": mean([v for v in (distinct_4([r["response"] for r in one]) for one in problems.values()) if v is not None] or [None]),
        "mean_length": mean([row["tokens"] for row in rows]),
        "cut_off": 100 * mean([row["cut_off"] for row in rows]),
        "no_box": 100 * mean([last_box(row["response"]) is None for row in rows]),
        "tokens": sum(row["tokens"] for row in rows),
    }  # fmt: skip
    for k in (1, 2, 4):
        if k < found["samples"]:
            found[f"pass_at_{k}"] = mean([pass_at(one, k) for one in right.values()])
    generator, values = random.Random(0), [100 * mean(one) for one in right.values()]
    means = sorted(mean(generator.choices(values, k=len(values))) for _ in range(4000))
    found["plain bootstrap"] = (means[100], means[3899])
    return found


def main() -> int:
    faults = 0
    for name in sys.argv[1:] or ["."]:
        folder = Path(name)
        summary, again = json.loads((folder / "summary.json").read_text()), recompute(folder)
        plain = again.pop("plain bootstrap")
        for key, value in again.items():
            said = summary[key]["value"] if isinstance(summary[key], dict) else summary[key]
            agrees = said is value if value is None else abs(said - value) < 1e-9 * max(1, abs(value))
            faults += not agrees
            said, value = (float("nan") if number is None else number for number in (said, value))
            print(
                f"{folder.name:12} {key:12} summary {said:12.6g}   recomputed {value:12.6g}   {'' if agrees else 'DIFFERS'}"
            )
        said = summary["avg_at_k"]
        print(f"{folder.name:12} interval     summary [{said['low']:.1f}, {said['high']:.1f}]   plain bootstrap [{plain[0]:.1f}, {plain[1]:.1f}]")  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
