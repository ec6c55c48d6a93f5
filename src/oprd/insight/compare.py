"""Runs and evaluations side by side: one table with intervals, paired differences, and what each cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oprd.evaluation.evaluate import SUMMARY, read_evaluation, read_summary
from oprd.evaluation.summary import paired
from oprd.lineage.evaluations import find_evaluations, last_update, of_final
from oprd.lineage.manifest import NAME, read_manifest

SETTINGS = ("samples", "temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class Contender:
    """One entry of a comparison: evaluations by benchmark, and the cost of the run where there is one."""

    label: str
    folders: Mapping[str, Path]
    cost: Mapping[str, Any] = field(default_factory=dict)


def interval(estimate: Mapping[str, float], digits: int = 1) -> str:
    """``41.2 [33.0, 49.1]``, or n/a where nothing could be measured."""
    if estimate["value"] is None:
        return "n/a"
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def p_value(value: float) -> str:
    """Two digits; permutations by chance tell no small ones apart."""
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def unequal_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two evaluations did not have in common, in words: sampling, engine, and how the problems were asked."""
    ours, theirs = first["settings"], second["settings"]
    unequal = [
        f"{key} {ours['sampling'][key]} and {theirs['sampling'][key]}"
        for key in SETTINGS
        if ours["sampling"][key] != theirs["sampling"][key]
    ]
    if ours["benchmark"]["hash"] != theirs["benchmark"]["hash"]:
        unequal.append("how the problems were asked (instruction or format)")
    if ours["engine"] != theirs["engine"]:
        unequal.append(f"engine {ours['engine']} and {theirs['engine']}")
    return unequal


def result_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of one evaluation."""
    k = summary["samples"]
    return {
        "benchmark": summary["settings"]["benchmark"]["name"],
        "problems": summary["problems"],
        f"Avg@{k}": interval(summary["avg_at_k"]),
        f"Best@{k}": interval(summary["best_at_k"]),
        "Dist-4g": interval(summary["distinct_4"]).split(" ")[0],
        "length": f"{summary['mean_length']['value']:.0f}",
        "cut off %": f"{summary['cut_off']:.1f}",
        "no box %": f"{summary['no_box']:.1f}",
        "undecided %": f"{summary['undecided']:.1f}",
    }


def open_contender(path: str) -> Contender:
    """A run (its final student), or a folder of evaluations: of one benchmark, or with one below for each.

    Raises:
        ValueError: neither, or a run that has not been evaluated.
    """
    folder = Path(path)
    named = Path(os.path.abspath(path))  # "." has no name
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        chosen = of_final(find_evaluations(folder), last_update(manifest))
        if not chosen and not (folder / "final").is_dir():
            raise ValueError(
                f"{folder} has not finished. The command that started it continues it; or compare {folder}/evaluations/best."
            )
        if not chosen:
            raise ValueError(f"{folder} has no evaluation of its final student: oprd eval {folder} --on BENCHMARK")
        return Contender(manifest["run"], {name: one.directory for name, one in chosen.items()}, manifest["cost"])
    if (folder / SUMMARY).exists():
        name = read_summary(folder / SUMMARY)["settings"]["benchmark"]["name"]
        return Contender(f"{named.parent.name}/{named.name}", {name: folder})
    below = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{SUMMARY}"))}
    if not below:
        raise ValueError(f"{folder} is neither a run (no {NAME}) nor an evaluation (no {SUMMARY}).")
    return Contender(named.name, below)


def open_contenders(paths: Sequence[str]) -> list[Contender]:
    """All of them, with labels that tell them apart."""
    found = [open_contender(path) for path in paths]
    labels = [one.label for one in found]
    return [
        Contender(path if labels.count(one.label) > 1 else one.label, one.folders, one.cost)
        for path, one in zip(paths, found, strict=True)
    ]


def shared_benchmarks(contenders: Sequence[Contender], wanted: Sequence[str] | None = None) -> list[str]:
    """Benchmarks that every contender was evaluated on, in the order of the first.

    Raises:
        ValueError: none in common, or one that was asked for is missing somewhere.
    """
    for name in wanted or ():
        for one in contenders:
            if name not in one.folders:
                raise ValueError(f"{one.label} was not evaluated on {name}; it has {', '.join(one.folders)}.")
    shared = [name for name in contenders[0].folders if all(name in one.folders for one in contenders)]
    if not shared:
        told = "; ".join(f"{one.label}: {', '.join(one.folders)}" for one in contenders)
        raise ValueError(f"No benchmark in common ({told}). Evaluate all of them on one.")
    return list(wanted) if wanted else shared


def compare(
    contenders: Sequence[Contender], *, benchmarks: Sequence[str] | None = None, metric: str = "avg_at_k"
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, one for each contender and benchmark, the first contender being the baseline; and notes on what is unequal.

    Every row holds ``avg_at_k`` and the like as numbers with intervals, and ``against_baseline``: the paired difference in
    ``metric`` with its interval and p-value.
    """
    rows, notes = [], []
    for benchmark in shared_benchmarks(contenders, benchmarks):
        baseline = None
        for one in contenders:
            evaluation, summary = read_evaluation(one.folders[benchmark])
            row: dict[str, Any] = {
                "model": one.label,
                "benchmark": benchmark,
                "summary": summary,
                "cost": dict(one.cost),
            }
            if baseline is None:
                baseline, base_summary = evaluation, summary
                evaluation.values(metric)  # an unknown one is told although there may be nothing to compare with
            else:
                found = paired(baseline, evaluation, metric, names=(contenders[0].label, one.label))
                row["against_baseline"] = vars(found)
                unequal = unequal_settings(base_summary, summary)
                if unequal:
                    notes.append(f"{benchmark}: {contenders[0].label} and {one.label} differ in {', '.join(unequal)}.")
            rows.append(row)
    return rows, notes


def table_rows(rows: Sequence[Mapping[str, Any]], metric: str = "avg_at_k") -> list[dict[str, Any]]:
    """The rows of `compare` as text for a table."""
    table = []
    for row in rows:
        shown = {"model": row["model"], **result_row(row["summary"])}
        found = row.get("against_baseline")
        shown[f"difference ({metric})"] = "" if found is None else interval({**found, "value": found["difference"]})
        shown["p"] = "" if found is None else p_value(found["p_value"])
        cost = row["cost"]
        shown["minutes"] = f"{(cost['wall_seconds'] - cost.get('benchmark_seconds', 0)) / 60:.1f}" if cost else ""
        shown["device hours"] = f"{cost['device_hours']:.3g}" if cost else ""
        shown["peak GB"] = f"{cost['peak_memory_bytes'] / 1e9:.2f}" if cost else ""
        shown["tokens trained"] = f"{cost['tokens_trained']:,}" if cost else ""
        table.append(shown)
    names = dict.fromkeys(name for row in table for name in row)  # with another k, other columns
    silent = {"undecided %": "0.0"}  # told only where there is something to tell, like every empty column
    keep = [name for name in names if any(row.get(name, "") not in ("", silent.get(name)) for row in table)]
    return [{name: row.get(name, "") for name in keep} for row in table]
