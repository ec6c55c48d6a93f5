"""``report.html``: one run on one page that opens from disk, without a network and without a script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from oprd.evaluation.evaluate import PROBLEMS, read_evaluation
from oprd.evaluation.summary import Evaluation, Graded, paired
from oprd.insight.charts import Chart, Curve, area_chart, interval_chart, line_chart
from oprd.insight.compare import interval, p_value, result_row
from oprd.lineage.evaluations import Found, find_evaluations, last_update
from oprd.lineage.manifest import read_manifest
from oprd.records import check_folder, read_json, write_text
from oprd.training.callbacks import read_metrics
from oprd.training.validation import best_score

COLUMNS = {"teacher": "teacher", "before": "student before", "after": "student after"}
SAMPLES = 6
LAYERS_DRAWN = 8  # more lines than that cannot be told apart

Rows = Sequence[Mapping[str, Any]]


def _series(rows: Rows, key: str) -> Curve:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return Curve([x for x, _ in points], [y for _, y in points])


def _named(rows: Rows, prefix: str) -> dict[str, Curve]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    return {key.removeprefix(prefix): _series(rows, key) for key in keys}


def _cosine_by_layer(rows: Rows) -> Chart | None:
    """Cosine against depth, at the first, a middle and the last log."""
    logged = [row for row in rows if any(key.startswith("cosine/layer_") for key in row)]
    if not logged:
        return None
    chosen = {row["step"]: row for row in (logged[0], logged[len(logged) // 2], logged[-1])}
    curves = {}
    for step, row in chosen.items():
        layers = {int(key.rsplit("_", 1)[1]): value for key, value in row.items() if key.startswith("cosine/layer_")}
        curves[f"update {step}"] = Curve(sorted(layers), [layers[layer] for layer in sorted(layers)])
    return line_chart("layers", "Cosine to the teacher by layer", curves, xlabel="layer", ylabel="cosine", whole_x=True)


def training_charts(rows: Rows) -> list[Chart]:
    """Every curve that the log has numbers for."""
    layers = _named(rows, "cosine/layer_")
    step = max(1, -(-len(layers) // LAYERS_DRAWN))
    drawn = {f"layer {int(name)}": curve for name, curve in list(layers.items())[::-1][::step][::-1]}
    total = {"total": _series(rows, "loss")}
    terms = _named(rows, "loss/")
    charts = [
        line_chart(
            "accuracy", "Accuracy of the training rollouts", {"": _series(rows, "accuracy")}, ylabel="share right"
        ),
        line_chart("cosine", "Cosine to the teacher", drawn or {"all": _series(rows, "cosine")}, ylabel="cosine"),
        _cosine_by_layer(rows),
        line_chart("loss", "Loss", total | terms if len(terms) > 1 else total),
        line_chart(
            "length",
            "Response length",
            {
                "mean": _series(rows, "completions/mean_length"),
                "longest": _series(rows, "completions/max_length"),
                "shortest": _series(rows, "completions/min_length"),
            },
            ylabel="tokens",
        ),
        line_chart(
            "cut", "Share of responses cut off", {"": _series(rows, "completions/clipped_ratio")}, limits=(-0.02, 1.02)
        ),
        line_chart("entropy", "Entropy", _named(rows, "entropy/"), ylabel="nats"),
        line_chart("overlap", "Overlap of the top sets", _named(rows, "overlap/"), limits=(-0.02, 1.02)),
        line_chart("gradient", "Gradient norm, before clipping", {"": _series(rows, "grad_norm")}),
        line_chart("rate", "Learning rate", {"": _series(rows, "learning_rate")}),
    ]
    return [chart for chart in charts if chart]


def cost_charts(rows: Rows) -> list[Chart]:
    """Speed, time by phase, memory."""
    phases = {name: curve for name, curve in _named(rows, "time/").items()}
    memory = {name.replace("_", " "): curve for name, curve in _named(rows, "memory/").items()}
    charts = [
        line_chart("speed", "Response tokens per second", {"": _series(rows, "tokens_per_second")}),
        area_chart("time", "Seconds of an update, by phase", phases, ylabel="seconds"),
        line_chart("memory", "Memory", memory, ylabel="GB"),
    ]
    return [chart for chart in charts if chart]


def _score_curves(found: Sequence[Found]) -> list[Chart]:
    """Avg@k along training with intervals, one chart for each benchmark scored at several updates."""
    charts = []
    for index, name in enumerate(dict.fromkeys(one.benchmark for one in found if one.step is not None)):
        scored = sorted(
            (one.step, one.summary["avg_at_k"]) for one in found if one.benchmark == name and one.step is not None
        )
        curve = Curve(
            [step for step, _ in scored],
            *([estimate[end] for _, estimate in scored] for end in ("value", "low", "high")),
        )
        title = f"Avg@k on {name} during training"
        charts.append(line_chart(f"scores{index}", title, {"": curve}, ylabel="% (95 % interval)"))
    return [chart for chart in charts if chart]


def _by_role(found: Sequence[Found], last: int | None, best: int | None = None) -> dict[str, dict[str, Found]]:
    """benchmark -> teacher, before, after, best -> evaluation. Scores of the first and last update stand in where the
    student before or the final one was not evaluated by itself."""
    steps = {"before": 0, "after": last, "best": best}
    roles: dict[str, dict[str, Found]] = {}
    for one in found:
        role = {"student": "before", "final": "after"}.get(one.who, one.who)
        here = roles.setdefault(one.benchmark, {})
        if role in ("teacher", "before", "after", "best"):
            here[role] = one
    for role, step in steps.items():
        for one in found:
            if one.step is not None and one.step == step:
                roles[one.benchmark].setdefault(role, one)
    return {name: here for name, here in roles.items() if here}


def _label(role: str, one: Found) -> str:
    stands_in = {"before": "student at update 0", "after": "student after the last update"}
    stands_in["best"] = f"best student (update {one.step})"
    return stands_in.get(role, role) if one.step is not None else COLUMNS.get(role, role)


def results(roles: Mapping[str, Mapping[str, Found]]) -> list[dict[str, Any]]:
    """For each benchmark a table of who was evaluated, with the paired difference to the student before; and a chart."""
    tables = []
    for index, (name, here) in enumerate(roles.items()):
        order = [role for role in ("teacher", "before", "after", "best") if role in here]
        opened = {role: read_evaluation(here[role].directory) for role in order}
        alike = opened[order[0]][1]["samples"]  # a score made during training is no row among others of more samples
        order = [role for role in order if opened[role][1]["samples"] == alike]
        rows, points = [], []
        for role in order:
            evaluation, summary = opened[role]
            label = _label(role, here[role])
            row = {"": label, **{k: v for k, v in result_row(summary).items() if k not in ("benchmark", "problems")}}
            row["difference to before"] = row["p"] = ""
            if role != "before" and "before" in order and opened["before"][0].ids == evaluation.ids:
                difference = paired(opened["before"][0], evaluation, "avg_at_k")
                row["difference to before"] = interval(vars(difference) | {"value": difference.difference})
                row["p"] = p_value(difference.p_value)
            rows.append(row)
            points.append((label, *(summary["avg_at_k"][end] for end in ("value", "low", "high"))))
        summary = opened[order[-1]][1]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        silent = {"undecided %": "0.0"}
        columns = [name for name in columns if any(row[name] not in ("", silent.get(name)) for row in rows)]
        chart = interval_chart(f"interval{index}", f"Avg@k on {name}", points, xlabel="% (95 % interval over problems)")
        settings = summary["settings"]["sampling"]
        tables.append(
            {
                "name": name,
                "problems": summary["problems"],
                "columns": columns,
                "rows": rows,
                "chart": chart,
                "settings": f"{summary['samples']} samples, temperature {settings['temperature']}, top_p {settings['top_p']}, "
                f"at most {settings['max_new_tokens']} new tokens",
            }
        )
    return tables


def _chosen(evaluations: Mapping[str, Evaluation]) -> list[int]:
    """A few problems that show something: gained, lost, missed although the teacher knows, and the rest in order."""
    right = {role: [row[0].verdict == "right" for row in one.answers] for role, one in evaluations.items()}
    count = min(len(values) for values in right.values())
    before, after = right.get("before", [False] * count), right.get("after", [False] * count)
    teacher = right.get("teacher", [True] * count)
    kinds = [
        [i for i in range(count) if after[i] and not before[i]],
        [i for i in range(count) if before[i] and not after[i]],
        [i for i in range(count) if teacher[i] and not after[i]],
        list(range(count)),
    ]
    chosen: list[int] = []
    for kind, most in zip(kinds, (2, 2, 1, SAMPLES), strict=True):
        fresh = [i for i in kind if i not in chosen]
        chosen += fresh[: min(most, SAMPLES - len(chosen))]
    return sorted(chosen)


def side_by_side(roles: Mapping[str, Mapping[str, Found]]) -> list[dict[str, Any]]:
    """First answers of teacher, student before and student after to a few problems of the first benchmark that has most."""
    having = {name: {r: one for r, one in here.items() if r in COLUMNS} for name, here in roles.items()}
    having = {name: here for name, here in having.items() if here}
    if not having:
        return []
    name = max(having, key=lambda benchmark: len(having[benchmark]))
    here = having[name]
    opened = {role: read_evaluation(here[role].directory)[0] for role in COLUMNS if role in here}
    if len({tuple(one.ids) for one in opened.values()}) > 1:
        opened = {role: one for role, one in opened.items() if role == next(iter(opened))}
    role = next(iter(opened))
    prompts = {p["id"]: p["prompt"] for p in read_json(here[role].directory / PROBLEMS)}
    shown = []
    for place in _chosen(opened):
        first: Graded = opened[role].answers[place][0]
        prompt = prompts.get(first.problem, "")
        shown.append(
            {
                "benchmark": name,
                "prompt": prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt),
                "answer": first.answer,
                "answers": [(_label(r, here[r]), one.answers[place][0]) for r, one in opened.items()],
            }
        )
    return shown


def _ancestry(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """This run's manifest, its parent's, and so on, as far as their folders are still there."""
    line, seen = [manifest], set()
    while line[-1].get("parent") and line[-1]["parent"]["run"] not in seen:
        seen.add(line[-1]["parent"]["run"])
        try:
            line.append(read_manifest(Path(line[-1]["parent"]["run"])))
        except ValueError:
            break
    return line


def report_page(run: Path) -> str:
    """The whole page.

    Raises:
        ValueError: ``run`` is not a run of ``oprd train``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    manifest, rows, found = read_manifest(run), read_metrics(Path(run) / "metrics.jsonl"), find_evaluations(run)
    best = best_score(run)
    roles = _by_role(found, last_update(manifest), best and best["step"])
    loader = PackageLoader("oprd.insight", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        manifest=manifest,
        line=_ancestry(manifest),
        session=manifest["sessions"][-1],
        best=best,
        results=results(roles),
        scores=_score_curves(found),
        curves=training_charts(rows),
        costs=cost_charts(rows),
        samples=side_by_side(roles),
        missing=[who for who in ("teacher", "student", "final") if not any(one.who == who for one in found)],
        config=yaml.safe_dump(manifest["config"], sort_keys=True),
        raw=json.dumps(manifest, indent=2, ensure_ascii=False),
        run=str(run),
    )


def write_report(run: Path, path: Path | None = None) -> Path:
    """Write the page to ``path``, by default the run's ``report.html``."""
    path = Path(run) / "report.html" if path is None else Path(path)
    check_folder(path.parent, "--out")
    page = report_page(Path(run))  # before a folder is made for it: it may be no run
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path
