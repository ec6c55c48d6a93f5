"""A diagnosis as tables, as pictures and as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from oprd.records import write_text

Diagnosis = Mapping[str, Any]

RECIPE = "recipe.yaml"
SHARES = ("agreement", "top16_overlap", "teacher_under_student_head/agreement", "student_under_teacher_head/agreement")
MEASURES = {
    "agreement": "student chooses the teacher's token, %",
    "top16_overlap": "top-16 overlap, %",
    "kl": "KL to the teacher, nats",
    "entropy_student": "entropy of the student, nats",
    "entropy_teacher": "entropy of the teacher, nats",
    "teacher_under_student_head/agreement": "teacher's states under the student's head choose it, %",
    "teacher_under_student_head/kl": "teacher's states under the student's head, KL",
    "student_under_teacher_head/agreement": "student's states under the teacher's head choose it, %",
    "student_under_teacher_head/kl": "student's states under the teacher's head, KL",
}
SOLVED = {
    "student": "solved by the student, %",
    "teacher": "solved by the teacher, %",
    "teacher_under_student_head": "solved by the teacher's states under the student's head, %",
    "student_under_teacher_head": "solved by the student's states under the teacher's head, %",
}


def summary_rows(record: Diagnosis) -> list[dict[str, Any]]:
    """One row a measure, one column a student."""
    rows: list[dict[str, Any]] = []
    students = record["students"]

    def add(label: str, values: dict[str, Any]) -> None:
        if any(value is not None for value in values.values()):
            rows.append({"measure": label, **{name: "n/a" if v is None else v for name, v in values.items()}})

    add("positions with a partner, %", {n: _percent(s["paired_share"]) for n, s in students.items()})
    add("LM heads differ by, %", {n: _percent(s["heads"]["drift"]) for n, s in students.items()})
    for name, label in MEASURES.items():
        shown = _percent if name in SHARES else _round
        add(label, {n: shown(s["choices"].get(name)) for n, s in students.items()})
    for name, label in SOLVED.items():
        add(label, {n: _interval(s.get("accuracy", {}).get(name)) for n, s in students.items()})
    bridges = {n: s["bridge"] for n, s in students.items()}
    for key, label in (("explained", "a linear map explains, %"), ("explained_by_chance", "the same by chance, %")):
        add(label, {n: None if b is None else _percent(b[key]) for n, b in bridges.items()})
    return rows


def layer_rows(record: Diagnosis) -> list[dict[str, Any]]:
    """One row a layer; of a run, before and after side by side."""
    students = record["students"]
    shown = {"cosine": "cosine", "explained": "explained", "cka": "CKA"}
    if len(students) == 1:
        chance = {"cosine_shuffled": "by chance", "cosine_trimmed": "w/o 4 largest dims"}
        shown = {"cosine": "cosine", **chance, "explained": "explained", "cka": "CKA"}
    rows = []
    for place, first in enumerate(first_of(students)["layers"]):
        row: dict[str, Any] = {"layer": first["layer"], "teacher's": first["teacher_layer"]}
        for name, label in shown.items():
            for who, found in students.items():
                if name in found["layers"][place]:
                    row[label if len(students) == 1 else f"{label} {who}"] = _round(found["layers"][place][name])
        if len(students) == 1:
            for role, index in (("student", first["layer"]), ("teacher", first["teacher_layer"])):
                size = first_of(students)["activations"][role][index - 1]
                row[f"peak/median {role}"] = f"{size['peak_over_median']:.0f}{' massive' if size['massive'] else ''}"
        rows.append(row)
    return rows


def first_of(students: Mapping[str, Any]) -> Any:
    """The only, or the earlier, student."""
    return next(iter(students.values()))


def position_rows(record: Diagnosis) -> list[dict[str, Any]]:
    """One row a k: cosine and KL over the first and the last k positions (Fig. 8)."""
    students = record["students"]
    rows: dict[int, dict[str, Any]] = {}
    for who, found in students.items():
        for entry in found["positions"]:
            row = rows.setdefault(entry["k"], {"k": entry["k"]})
            for name, label in (("cosine", "cosine"), ("kl", "KL")):
                for side in ("first", "last"):
                    if f"{name}_{side}" in entry:
                        row[f"{label} {side} k" + ("" if len(students) == 1 else f" {who}")] = _round(
                            entry[f"{name}_{side}"]
                        )
    return [row for row in rows.values() if len(row) > 1]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def _round(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _interval(score: Mapping[str, float] | None) -> str | None:
    return None if score is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def write_recipe(record: Diagnosis, folder: Path) -> Path:
    """``recipe.yaml``: what was advised, ready for ``oprd train --config``."""
    path = Path(folder) / RECIPE
    said = "".join(f"# {one['topic']}: {one['say']}\n" for one in record["advice"])
    text = yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True, width=120)
    write_text(path, f"# Made by oprd diagnose. Sweep the learning rate; the budget is a beginning.\n{said}\n{text}")
    return path


def plot_diagnosis(record: Diagnosis, folder: Path) -> list[Path]:
    """``layers.png``, ``cka.png``, ``positions.png`` and ``activations.png``, where there is something to draw."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in (
        ("layers", _draw_layers),
        ("cka", _draw_kernels),
        ("positions", _draw_positions),
        ("activations", _draw_activations),
    ):
        figure, path = draw(record["students"]), folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of a diagnosis before this one
        else:
            paths.append(path)
            figure.savefig(path, dpi=120)
    return paths


def _panels(columns: int, height: float = 3.4):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _by_layer(axes, title: str) -> None:
    axes.set(title=title, xlabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_layers(students: Mapping[str, Any]):
    same_width = "cosine" in first_of(students)["layers"][0]
    figure, panels = _panels(2 if same_width else 1)
    styles = ("--", "-") if len(students) > 1 else ("-",)
    for style, (who, found) in zip(styles, students.items(), strict=True):
        x = [row["layer"] for row in found["layers"]]
        named = "" if len(students) == 1 else f", {who}"
        panels[-1].plot(
            x, [row["cka"] for row in found["layers"]], style, color="C2", marker="o", ms=3, label=f"CKA{named}"
        )
        if same_width:
            for key, label, color in (
                ("cosine", "cosine", "C0"),
                ("cosine_trimmed", "w/o 4 largest dims", "C1"),
                ("cosine_shuffled", "pairs by chance", "0.6"),
            ):
                values = [row[key] for row in found["layers"]]
                panels[0].plot(x, values, style, color=color, marker="o", ms=3, label=label + named)
            shown = [max(row["explained"], -1) for row in found["layers"]]
            panels[-1].plot(x, shown, style, color="C3", marker="o", ms=3, label=f"variance explained{named}")
    if same_width:
        _by_layer(panels[0], "cosine of student and teacher")
    _by_layer(panels[-1], "CKA" + (", and variance explained" if same_width else ""))
    for axes in panels:
        axes.set_ylim(top=1.03)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_kernels(students: Mapping[str, Any]):
    figure, panels = _panels(len(students), 3.8)
    for axes, (who, found) in zip(panels, students.items(), strict=True):
        image = axes.imshow(found["cka"], origin="lower", vmin=0, vmax=1, cmap="viridis", aspect="auto")
        depth, other = len(found["cka"]), len(found["cka"][0])
        for axis, count in ((axes.yaxis, depth), (axes.xaxis, other)):
            ticks = list(range(0, count, max(1, count // 8)))
            axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
        axes.grid(False)
        axes.set(title="CKA" if len(students) == 1 else f"CKA, {who}", xlabel="teacher layer", ylabel="student layer")
        figure.colorbar(image, ax=axes)
    return figure


def _draw_positions(students: Mapping[str, Any]):
    shown = [
        (name, title)
        for name, title in (("cosine", "cosine, mean over layers"), ("kl", "KL to the teacher, nats"))
        if f"{name}_first" in first_of(students)["positions"][0]
    ]
    if not shown:
        return None
    figure, panels = _panels(len(shown))
    for axes, (name, title) in zip(panels, shown, strict=True):
        for color, (who, found) in zip(("C0", "C1"), students.items(), strict=False):
            for side, style in (("first", "-"), ("last", "--")):
                label = f"{side} k" + ("" if len(students) == 1 else f", {who}")
                x = [row["k"] for row in found["positions"]]
                axes.plot(x, [row[f"{name}_{side}"] for row in found["positions"]], style, color=color, label=label)
        axes.set_xscale("log", base=2)
        k = [row["k"] for row in first_of(students)["positions"]][:: max(1, len(first_of(students)["positions"]) // 8)]
        axes.set_xticks(k, [str(one) for one in k])
        axes.set(title=title, xlabel="k, positions of a response")
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_activations(students: Mapping[str, Any]):
    figure, panels = _panels(2)
    for who, found in students.items():
        for role, sums in found["activations"].items():
            if role == "teacher" and found is not first_of(students):
                continue
            label = role if len(students) == 1 or role == "teacher" else who
            x = range(1, len(sums) + 1)
            panels[0].plot(x, [one["peak_over_median"] for one in sums], marker="o", ms=3, label=label)
            panels[1].plot(x, [one["outlier_share"] for one in sums], marker="o", ms=3, label=label)
    panels[0].set_yscale("log")
    _by_layer(panels[0], "largest activation over the median one")
    _by_layer(panels[1], "mean square in the 4 largest dimensions")
    panels[1].set_ylim(0, 1.03)
    for axes in panels:
        axes.legend(frameon=False, fontsize=8)
    return figure
