"""Curves along training, one picture per quantity (the paper's Figs. 4-6, 10, 11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def _key(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _highest_layer_cosine(row: Row) -> float | None:
    """Not the mean over layers: a run without the state loss knows the last layer only, and curves must be comparable."""
    layers = [key for key in row if key.startswith("cosine/layer_")]
    return row[max(layers, key=lambda name: int(name.rsplit("_", 1)[1]))] if layers else None


CURVES: dict[str, tuple[str, Callable[[Row], float | None]]] = {  # file name -> title, value of a logged row
    "accuracy": ("accuracy of the training rollouts", _key("accuracy")),
    "cosine": ("cosine to the teacher, highest layer compared", _highest_layer_cosine),
    "length": ("response length, tokens", _key("completions/mean_length")),
    "loss": ("loss", _key("loss")),
    "entropy": ("entropy of the student, nats", _key("entropy/student")),
    "overlap": ("overlap of the top-16 sets", _key("overlap/top16")),
}


def _curve(metrics: Sequence[Row], value: Callable[[Row], float | None]) -> tuple[list[int], list[float]]:
    points = [(row["step"], value(row)) for row in metrics if value(row) is not None]
    return [step for step, _ in points], [y for _, y in points]


def plot_runs(
    runs: Mapping[str, Sequence[Row]], directory: Path, *, references: Mapping[str, float] | None = None
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
    for name, (title, value) in CURVES.items():
        curves = {label: _curve(metrics, value) for label, metrics in runs.items()}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if not curves:
            continue
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for label, (steps, values) in curves.items():
            axes.plot(steps, values, label=label, linewidth=1.8)
        if name == "accuracy":
            for index, (label, level) in enumerate((references or {}).items()):
                axes.axhline(level, color="0.5", linestyle=("--", ":")[index % 2], linewidth=1.2, label=label)
            axes.set_ylim(0, 1.02)
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the curves, not on them
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def plot_bubbles(rows: Sequence[Row], path: str | Path) -> bool:
    """Accuracy against wall-clock time (benchmarks aside), the bubble's area being peak memory (the paper's Fig. 1), a panel a benchmark.

    Args:
        rows: of `oprd.insight.compare.compare`; those without a cost (no runs) are left out.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costed = [row for row in rows if row["cost"]]
    if not costed:
        return False
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in costed))
    most = max(row["cost"]["peak_memory_bytes"] for row in costed) or 1
    seconds = lambda row: row["cost"]["wall_seconds"] - row["cost"].get("benchmark_seconds", 0)  # noqa: E731
    longest = max(seconds(row) for row in costed)
    unit, name = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    figure = Figure(figsize=(7.6 * len(benchmarks), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
        for index, row in enumerate(r for r in costed if r["benchmark"] == benchmark):
            score, cost = row["summary"]["avg_at_k"], row["cost"]
            x, y, color = seconds(row) / unit, score["value"], f"C{index}"
            spread, memory = [[y - score["low"]], [score["high"] - y]], cost["peak_memory_bytes"]
            panel.errorbar(x, y, yerr=spread, color=color, capsize=3, linewidth=1.2, zorder=1)
            label = f"{row['model']}, {memory / 1e9:.2g} GB"
            panel.scatter(x, y, s=900 * memory / most, color=color, alpha=0.45, zorder=2, linewidths=0, label=label)
        k = next(row["summary"]["samples"] for row in costed if row["benchmark"] == benchmark)
        panel.set(title=benchmark, xlabel=f"wall-clock {name}", ylabel=f"Avg@{k}, % (95 % interval)")
        panel.margins(x=0.3, y=0.25)
        panel.set_xlim(left=0)  # a second more or less is not to look like twice the time
        for handle in panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)).legend_handles:
            handle.set_sizes([60])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
