"""May this student replace that one: thresholds on accuracy, length, repetition and cost, a reason for each verdict."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd.evaluation.summary import Evaluation, paired
from oprd.yaml_file import read_yaml

# group -> threshold -> metric, how it is read (value, difference to the baseline, ratio to it in percent), its direction
GATES: dict[str, dict[str, tuple[str, str, str]]] = {
    "accuracy": {
        "min": ("avg_at_k", "value", "min"),
        "min_gain": ("avg_at_k", "difference", "min"),
        "max_drop": ("avg_at_k", "difference", "min"),
    },
    "length": {"max": ("mean_length", "value", "max"), "max_increase_percent": ("mean_length", "percent", "max")},
    "repetition": {"min_distinct_4": ("distinct_4", "value", "min"), "max_drop": ("distinct_4", "difference", "min")},
    "cut_off": {"max": ("cut_off", "value", "max"), "max_increase": ("cut_off", "difference", "max")},
    "no_box": {"max": ("no_box", "value", "max"), "max_increase": ("no_box", "difference", "max")},
    "cost": {
        "max_wall_hours": ("wall_seconds", "value", "max"),
        "max_device_hours": ("device_hours", "value", "max"),
        "max_peak_memory_gb": ("peak_memory_bytes", "value", "max"),
        "max_increase_percent": ("device_hours", "percent", "max"),
    },
}
UNITS = {"wall_seconds": (3600, "hours"), "device_hours": (1, "device hours"), "peak_memory_bytes": (1e9, "GB")}
SETTINGS = {"benchmarks", "decide_by", "undecided"}


@dataclass(frozen=True)
class Candidate:
    """What a gate looks at: evaluations by benchmark, and the cost of the run (empty where it is not one)."""

    label: str
    evaluations: Mapping[str, Evaluation]
    cost: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One threshold: ``state`` is pass, fail or undecided (the interval holds the threshold)."""

    gate: str
    benchmark: str | None
    state: str
    reason: str


def read_gates(path: Path) -> dict[str, Any]:
    """Thresholds from a YAML file; every key is checked.

    Raises:
        ValueError: no such file, not YAML, an unknown key (with the nearest known one), a threshold that is not a number
            or not finite, or none at all.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no {path}. A gates file says, for example: accuracy: {{min: 40, max_drop: 2}}")
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a mapping, such as accuracy: {{min: 40, max_drop: 2}}")
    _known(str(path), config, {*GATES, *SETTINGS})
    for group in config.keys() & GATES.keys():
        if not isinstance(config[group], dict):
            raise ValueError(f"{path}: {group} must be a mapping of {', '.join(GATES[group])}.")
        _known(f"{path}, {group}", config[group], GATES[group])
        for name, threshold in config[group].items():
            is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
            if not is_number or not math.isfinite(threshold):
                raise ValueError(f"{path}: {group}.{name} must be a finite number, got {threshold!r}.")
    for name, allowed in (("decide_by", ("interval", "value")), ("undecided", ("fail", "pass"))):
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} must be {' or '.join(allowed)}, got {config[name]!r}.")
    benchmarks = config.get("benchmarks", [])
    if not isinstance(benchmarks, list) or not all(isinstance(name, str) for name in benchmarks):
        raise ValueError(f"{path}: benchmarks must be a list of names.")
    if not any(config.get(group) for group in GATES):
        raise ValueError(f"{path} holds no threshold; groups are {', '.join(GATES)}.")
    return config


def _known(where: str, given: Mapping[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "."))


def run_gates(config: Mapping[str, Any], candidate: Candidate, baseline: Candidate | None) -> list[Verdict]:
    """One verdict for every threshold and benchmark.

    Thresholds on scores are held against 95 % intervals (``decide_by: interval``): passed where the whole interval is on
    the right side, failed where it is on the wrong one. Differences are paired by problem.

    Raises:
        ValueError: a threshold needs a baseline, a benchmark or a cost that is not there.
    """
    verdicts = []
    for group, thresholds in config.items():
        for name, threshold in thresholds.items() if group in GATES else ():
            gate, (metric, reading, direction) = f"{group}.{name}", GATES[group][name]
            if reading != "value" and baseline is None:
                raise ValueError(f"{gate} compares with a baseline. Name one with --against.")
            if group == "cost":
                verdicts.append(_cost_verdict(gate, metric, reading, threshold, candidate, baseline))
                continue
            limit = 0 - threshold if name == "max_drop" else threshold  # 0 and not -0.0
            for benchmark in _benchmarks(config, candidate, baseline if reading != "value" else None):
                judged = [candidate] if reading == "value" else [candidate, baseline]
                if any(one.evaluations[benchmark].estimate(metric)["value"] is None for one in judged):
                    reason = f"{metric} cannot be measured: no answer has four words. Remove {gate}, or judge another benchmark"
                    verdicts.append(Verdict(gate, benchmark, "undecided", reason))
                    continue
                estimate, shown = _estimate(metric, reading, benchmark, candidate, baseline)
                by_value = config.get("decide_by", "interval") == "value"
                verdicts.append(_verdict(gate, benchmark, estimate, shown, limit, direction, by_value))
    return verdicts


def _benchmarks(config: Mapping[str, Any], candidate: Candidate, baseline: Candidate | None) -> Sequence[str]:
    both = [name for name in candidate.evaluations if baseline is None or name in baseline.evaluations]
    wanted = config.get("benchmarks") or both
    for name in wanted:
        for one in (candidate, baseline):
            if one is not None and name not in one.evaluations:
                raise ValueError(f"{one.label} was not evaluated on {name}: oprd eval {one.label} --on {name}")
    if not wanted:
        raise ValueError(f"{candidate.label} and its baseline share no evaluation. Evaluate both on one benchmark.")
    return wanted


def _estimate(
    metric: str, reading: str, benchmark: str, candidate: Candidate, baseline: Candidate | None
) -> tuple[dict[str, float], str]:
    own = candidate.evaluations[benchmark]
    if reading == "value":
        return own.estimate(metric), metric
    other = baseline.evaluations[benchmark]
    found = paired(other, own, metric, names=(baseline.label, candidate.label))
    difference = {"value": found.difference, "low": found.low, "high": found.high}
    if reading == "difference":
        return difference, f"difference in {metric}"
    base = other.estimate(metric)["value"]
    if not base:
        raise ValueError(f"{baseline.label} has a {metric} of 0 on {benchmark}: no percentage of it can be taken.")
    return {name: 100 * value / base for name, value in difference.items()}, f"change of {metric} in percent"


def _verdict(
    gate: str, benchmark: str, estimate: dict[str, float], shown: str, limit: float, direction: str, by_value: bool
) -> Verdict:
    ends = (estimate["value"],) if by_value else (estimate["low"], estimate["high"])
    inside = [end >= limit if direction == "min" else end <= limit for end in ends]
    state = "pass" if all(inside) else "fail" if not any(inside) else "undecided"
    told = f"{shown} {estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"
    needed = f"{'at least' if direction == 'min' else 'at most'} {limit:g}"
    ending = {
        "pass": f"meets {needed}",
        "fail": f"misses {needed}",
        "undecided": f"cannot be told from {needed}: draw more problems, or set a wider margin",
    }
    return Verdict(gate, benchmark, state, f"{told} {ending[state]}")


def _cost_verdict(
    gate: str, metric: str, reading: str, threshold: float, candidate: Candidate, baseline: Candidate | None
) -> Verdict:
    for one in (candidate, baseline if reading != "value" else None):
        if one is not None and metric not in one.cost:
            raise ValueError(f"{gate} needs a cost, and {one.label} is not a finished run of oprd train.")
    unit, name = UNITS[metric]
    value, shown = candidate.cost[metric] / unit, f"{candidate.cost[metric] / unit:.3g} {name}"
    if reading == "percent":
        before = baseline.cost[metric] / unit
        if not before:
            raise ValueError(f"{baseline.label} cost 0 {name}: no percentage of it can be taken.")
        value = 100 * (value - before) / before
        shown = f"{value:+.1f} % {name} ({shown} after {before:.3g})"
    is_met = value <= threshold
    return Verdict(
        gate, None, "pass" if is_met else "fail", f"{shown} {'meets' if is_met else 'misses'} at most {threshold:g}"
    )


def is_passed(config: Mapping[str, Any], verdicts: Sequence[Verdict]) -> bool:
    """No threshold failed, and none is undecided unless ``undecided: pass``."""
    refused = {"fail"} if config.get("undecided") == "pass" else {"fail", "undecided"}
    return not any(verdict.state in refused for verdict in verdicts)
