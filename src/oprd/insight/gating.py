"""Gates on runs: open what they hold, judge, and keep the outcome with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oprd.evaluation.evaluate import read_evaluation
from oprd.insight.compare import Contender, open_contender, unequal_settings
from oprd.lineage.gates import Candidate, is_passed, read_gates, run_gates
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.manifest import NAME, now, read_manifest
from oprd.records import write_json

OUTCOME = "gate.json"


def _final_hash(run: Path) -> str | None:
    is_run = (run / NAME).exists() and (run / "final").is_dir()
    return combined_hash(folder_hashes(run / "final")) if is_run else None


def _candidate(one: Contender, path: str, final: str | None) -> Candidate:
    opened = {name: read_evaluation(folder) for name, folder in one.folders.items()}
    for name, (_, summary) in opened.items() if final else ():
        source = summary["settings"]["benchmark"]["source"]
        made = read_manifest(Path(path))["final"] or {}
        judged = summary["settings"].get("model_hash", made.get("hash"))  # scores made in training name no content
        if judged not in (None, final):
            raise ValueError(
                f"{path}/final has changed since it was evaluated on {name}. Remove {one.folders[name]}, then: oprd eval "
                f"{path} --on {source}"
            )
    return Candidate(path, {name: evaluation for name, (evaluation, _) in opened.items()}, one.cost)


def gate_run(path: str, against: str | None, config_path: str) -> dict[str, Any]:
    """Verdicts on ``path``; for a run, kept in its ``gate.json`` with the content hash of ``final/``.

    Raises:
        ValueError: a fault in the gates file, something that a threshold needs is missing, or ``final/`` is not what was
            evaluated.
    """
    config = read_gates(Path(config_path))
    run = Path(path)
    final = _final_hash(run)
    own = _candidate(open_contender(path), path, final)
    other = None if against is None else _candidate(open_contender(against), against, _final_hash(Path(against)))
    verdicts = run_gates(config, own, other)
    notes = []
    for name in own.evaluations if against is not None else ():
        if name in other.evaluations:
            pair = [read_evaluation(open_contender(one).folders[name])[1] for one in (path, against)]
            notes += [f"{name}: {path} and {against} differ in {told}." for told in unequal_settings(*pair)]
    outcome = {
        "passed": is_passed(config, verdicts),
        "at": now(),
        "candidate": path,
        "against": against,
        "model_hash": final,
        "config": config,
        "notes": notes,
        "verdicts": [vars(verdict) for verdict in verdicts],
    }
    if (run / NAME).exists():
        write_json(run / OUTCOME, outcome)
    return outcome
