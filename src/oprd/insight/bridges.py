"""A bridge's report as tables and pictures: what it carries, against which controls (the paper's Fig. 12 and more)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]


def rank_rows(report: Report) -> list[dict[str, Any]]:
    """One row a rank: held-out cosine before and after the fit and without the largest directions, R^2 on both sides."""
    rows = []
    cosine, explained = report.get("cosine", {}), report["explained"]
    for place, rank in enumerate(report["ranks"]):
        row: dict[str, Any] = {"rank": rank}
        for column, values in (
            ("cosine before", cosine.get("before")),
            ("cosine after", cosine.get("after")),
            ("R2 fitted rows", explained.get("train")),
            ("R2 held out", explained.get("held_out")),
        ):
            if values:
                row[column] = values[place]
        for name, values in cosine.items():
            if name.startswith("without_first_"):
                taken = int(name.rsplit("_", 1)[1])
                beyond = [r for r in report["ranks"] if r > taken]
                row[f"cosine w/o first {taken}"] = values[beyond.index(rank)] if rank in beyond else None
        rows.append(row)
    return rows


def control_rows(report: Report) -> list[dict[str, Any]]:
    """The bridge beside its controls, at its rank and the layers where controls were fitted."""
    controls = report.get("controls", {})
    return [
        {"fit": name.replace("_", " "), "held-out cosine": scores["cosine"], "held-out R2": scores["explained"]}
        for name, scores in controls.items()
        if isinstance(scores, Mapping)
    ]


def verdict(report: Report) -> list[str]:
    """In words: the rank and why, the intercept, whether the bridge will probably help."""
    rank, fit = report["rank"], report["fit"]
    by = {"theorem": "Theorem 3's rule", "request": "as asked"}[rank["by"]]
    others = [f"Theorem 3's rule says {rank['theorem']}"] if rank["by"] != "theorem" else []
    if "held_out_cosine" in rank:
        others.append(f"the highest held-out cosine is at {rank['held_out_cosine']}")
    lines = [
        f"rank {rank['taken']}: {by}" + (f" ({'; '.join(others)})" if others else ""),
        f"fitted on {fit['rows']:,} positions, {fit['rows_held_out']:,} held out; "
        f"{'with' if fit['intercept'] else 'without'} an intercept",
    ]
    predicted = report.get("prediction")
    if predicted:
        helps = predicted["mapped_teacher_agreement"] > predicted["student_agreement"]
        lines.append(
            f"the teacher's choice of token: student's own states {predicted['student_agreement']:.1%}, teacher's states mapped "
            f"into the student's space {predicted['mapped_teacher_agreement']:.1%}: under the student's own LM head this bridge will "
            + (
                "probably help"
                if helps
                else "probably do harm; solve the head (lm_head: solved) or distil with output_loss"
            )
        )
    return lines


def plot_bridge(report: Report, directory: Path) -> list[Path]:
    """``bridge-rank.png``, ``bridge-directions.png`` and, with controls, ``bridge-controls.png``."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = [_plot_ranks(report), _plot_directions(report)]
    if report.get("controls"):
        drawn.append(_plot_controls(report))
    paths = []
    for name, figure in drawn:
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _figure(title: str, xlabel: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _plot_ranks(report: Report):
    figure, axes = _figure("held-out cosine in the bridge, and what of the teacher it explains", "rank")
    rows = rank_rows(report)
    for column in [name for name in rows[0] if name != "rank"]:
        points = [(row["rank"], row[column]) for row in rows if row.get(column) is not None]
        style = "--" if column.startswith("R2") else ":" if "w/o" in column else "-"
        axes.plot(*zip(*points, strict=True), style, label=column, linewidth=1.8, marker="o", markersize=3)
    axes.axvline(report["rank"]["taken"], color="0.5", linewidth=1, label="rank taken")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["rank"] for row in rows], [str(row["rank"]) for row in rows])
    _legend(axes)
    return "bridge-rank", figure


def _plot_directions(report: Report):
    figure, axes = _figure("R2 of each teacher direction, predicted from the student", "direction, by falling variance")
    name = "r2_held_out" if "r2_held_out" in report["layers"][0] else "r2_train"
    depth = len(report["layers"])
    from matplotlib import colormaps

    for entry in report["layers"]:
        shade = colormaps["viridis"]((entry["layer"] - 1) / max(depth - 1, 1))
        values = entry[name]
        axes.plot(range(1, len(values) + 1), values, color=shade, linewidth=1.2, label=f"layer {entry['layer']}")
    axes.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
    axes.set_ylim(-0.1, 1.02)
    if depth <= 12:
        _legend(axes)
    return "bridge-directions", figure


def _plot_controls(report: Report):
    figure, axes = _figure(f"bridge and controls at rank {report['controls']['rank']}, held out", "")
    rows = control_rows(report)
    for place, column in enumerate(("held-out cosine", "held-out R2")):
        axes.bar([i + 0.4 * place for i in range(len(rows))], [row[column] for row in rows], width=0.38, label=column)
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [row["fit"] for row in rows])
    _legend(axes)
    return "bridge-controls", figure
