"""Gates on runs: open what they hold, judge, and keep the outcome with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oprd.evaluation.evaluate import read_evaluation
from oprd.insight.compare import Contender, open_contender
from oprd.lineage.gates import Candidate, is_passed, read_gates, run_gates
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.manifest import NAME, now
from oprd.records import write_json

OUTCOME = "gate.json"


def _candidate(one: Contender, path: str) -> Candidate:
    return Candidate(path, {name: read_evaluation(folder)[0] for name, folder in one.folders.items()}, one.cost)


def gate_run(path: str, against: str | None, config_path: str) -> dict[str, Any]:
    """Verdicts on ``path``; for a run, kept in its ``gate.json`` with the content hash of ``final/``.

    Raises:
        ValueError: a fault in the gates file, or something that a threshold needs is missing.
    """
    config = read_gates(Path(config_path))
    own = _candidate(open_contender(path), path)
    other = None if against is None else _candidate(open_contender(against), against)
    verdicts = run_gates(config, own, other)
    run = Path(path)
    final = combined_hash(folder_hashes(run / "final")) if (run / "final").is_dir() else None
    outcome = {
        "passed": is_passed(config, verdicts),
        "at": now(),
        "candidate": path,
        "against": against,
        "model_hash": final,
        "config": config,
        "verdicts": [vars(verdict) for verdict in verdicts],
    }
    if (run / NAME).exists():
        write_json(run / OUTCOME, outcome)
    return outcome
