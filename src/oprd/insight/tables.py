"""Rows of numbers as text."""

from __future__ import annotations

from typing import Any


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns under their names; one row alone is printed as ``name  value`` lines."""
    if len(rows) == 1:
        width = max(map(len, rows[0]))
        return "\n".join(f"{name:<{width}}  {_cell(value)}" for name, value in rows[0].items())
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def run_summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of what a reader asks first: loss, cosine, accuracy, length, speed."""
    wanted = {
        "loss": "loss",
        "cosine": "cosine",
        "accuracy": "accuracy",
        "completions/mean_length": "mean length",
        "completions/clipped_ratio": "cut off",
        "tokens_per_second": "tokens/s",
        "train_runtime": "seconds",
    }
    summary: dict[str, Any] = {"steps": metrics[-1]["step"] if metrics else 0}
    for key, label in wanted.items():
        values = [row[key] for row in metrics if row.get(key) is not None]
        if values:
            summary[label] = values[-1]
    return summary
