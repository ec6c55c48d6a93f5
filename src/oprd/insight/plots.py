"""Curves along training, one picture per quantity (the paper's Figs. 4-6, 10, 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVES = {  # file name -> (title, keys: the first that a run logged)
    "accuracy": ("accuracy of the training rollouts", ("accuracy",)),
    "cosine": ("cosine to the teacher", ("cosine", "cosine/last")),
    "length": ("response length, tokens", ("completions/mean_length",)),
    "loss": ("loss", ("loss",)),
    "entropy": ("entropy of the student, nats", ("entropy/student",)),
    "overlap": ("overlap of the top-16 sets", ("overlap/top16",)),
}


def _last_layer_cosine(row: Mapping[str, Any]) -> float | None:
    layers = [key for key in row if key.startswith("cosine/layer_")]
    return row[max(layers, key=lambda name: int(name.rsplit("_", 1)[1]))] if layers else None


def _curve(metrics: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[list[int], list[float]]:
    for key in keys:
        read = _last_layer_cosine if key == "cosine/last" else lambda row, key=key: row.get(key)
        points = [(row["step"], read(row)) for row in metrics if read(row) is not None]
        if points:
            return [step for step, _ in points], [value for _, value in points]
    return [], []


def plot_runs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path, *, references: Mapping[str, float] | None = None
) -> list[Path]:
    """Draw every curve that some run logged; returns the PNG files.

    Args:
        runs: label -> lines of its ``metrics.jsonl``.
        references: label -> accuracy in [0, 1], drawn as horizontal lines (a teacher, a student before training).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (title, keys) in CURVES.items():
        curves = {label: _curve(metrics, keys) for label, metrics in runs.items()}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if not curves:
            continue
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for label, (steps, values) in curves.items():
            axes.plot(steps, values, label=label, linewidth=1.8)
        if name == "accuracy":
            for index, (label, value) in enumerate((references or {}).items()):
                axes.axhline(value, color="0.5", linestyle=("--", ":")[index % 2], linewidth=1.2, label=label)
            axes.set_ylim(0, 1.02)
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
