"""``manifest.json``: who a student is, from what, with what, at what cost. One file a run, replaced atomically."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oprd.lineage import machine
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.records import read_json, write_json

NAME = "manifest.json"
SCHEMA = 1
INPUTS = ("student", "teacher", "bridge", "data")
PARTS = {"run": str, "directory": str, "config": dict, "student": dict, "teacher": dict, "sessions": list, "cost": dict}
COSTS = {"wall_seconds", "device_hours", "peak_memory_bytes", "tokens_trained"}
WRITE_SECONDS = 5.0


def now() -> str:
    """ISO time, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_name(run: Path) -> str:
    """The folder's name; a second stage has its run's before it."""
    path = Path(run).resolve()
    return f"{path.parent.name}-{path.name}" if path.name == "then" else path.name


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run directory.

    Raises:
        ValueError: none there, broken, or of a version of this file that is not known.
    """
    path = Path(run) / NAME
    if not path.exists():
        raise ValueError(f"{run} is not a run of oprd train: it holds no {NAME}.")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has another schema than {SCHEMA}: it was written by another version of oprd. Use that one."
        )
    for key, kind in PARTS.items():
        if not isinstance(manifest.get(key), kind) or (key == "sessions" and not manifest[key]):
            words = {str: "text", dict: "an object", list: "a list that is not empty"}[kind]
            raise ValueError(f"{path} is damaged: its {key} must be {words}. Restore the file.")
    if manifest["cost"] and not manifest["cost"].keys() >= COSTS:
        raise ValueError(f"{path} is damaged: its cost must have {', '.join(sorted(COSTS))}. Restore the file.")
    for role in ("student", "teacher"):
        if not {"name", "hash"} <= manifest[role].keys():
            raise ValueError(f"{path} is damaged: its {role} has no name or no hash. Restore the file.")
    return manifest


def differing_inputs(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Inputs whose content differs between two manifests, each as a line."""
    lines = []
    for name in INPUTS:
        was, is_now = before.get(name), after.get(name)
        named = [("", was, is_now)]
        if name == "data":
            keys = sorted({*(was or {}), *(is_now or {})})
            named = [(f" ({key})", (was or {}).get(key), (is_now or {}).get(key)) for key in keys]
        for part, one, other in named:
            hashes = [None if record is None else record["hash"] for record in (one, other)]
            if hashes[0] != hashes[1]:
                told = ["none" if r is None else f"{r['name']} {r['hash'][:12]}" for r in (one, other)]
                changed = ""
                if one and other and "files" in one and "files" in other:
                    files = sorted(
                        f for f in {*one["files"], *other["files"]} if one["files"].get(f) != other["files"].get(f)
                    )
                    changed = f", in {', '.join(files[:3])}" + (" and more" if len(files) > 3 else "")
                lines.append(f"{name}{part}: {told[0]} there, {told[1]} now{changed}")
    return lines


class Manifest:
    """The manifest of a run that is going on. Only the main process should hold one.

    A resumed run adds a session; cost is the sum over sessions, work that a kill threw away included.
    """

    def __init__(self, run: Path, content: dict[str, Any]) -> None:
        self._path, self.content = Path(run) / NAME, content
        self._clock, self._written = time.monotonic(), None

    @classmethod
    def start(cls, run: Path, *, identity: dict[str, Any], processes: int, resumed: bool) -> Manifest:
        """Begin or, where ``resumed``, go on; settings that have changed since are kept with the session. Nothing is
        written before the first `update`.

        Args:
            identity: config, student, teacher, bridge, data, seeds, parent, repeats, command.

        Raises:
            ValueError: a resumed run whose inputs are no longer those it began with.
        """
        import oprd as package

        session = {
            "started": now(),
            "updated": now(),
            "versions": machine.versions(),
            "hardware": machine.hardware(processes),
            "git": {"oprd": machine.git_state(Path(package.__file__)), "here": machine.git_state(Path.cwd())},
            "wall_seconds": 0.0,
            "tokens_generated": 0,
            "tokens_trained": 0,
            "updates": 0,
            "peak_memory_bytes": 0,
            "peak_memory_of": "host",
        }
        if resumed and (Path(run) / NAME).exists():
            content = read_manifest(run)
            differing = differing_inputs(content, identity)
            if differing:
                raise ValueError(
                    f"{run} began with other inputs: {'; '.join(differing)}. Restore them, or start a new run."
                )
            before, after = content["config"], identity["config"]
            changed = {k: [before.get(k), after.get(k)] for k in {**before, **after} if before.get(k) != after.get(k)}
            session |= {"changed_settings": changed} if changed else {}
            content |= {"config": after, "final": None}
            content["sessions"].append(session)
        else:
            content = {
                "schema": SCHEMA,
                "run": run_name(run),
                "status": "running",
                "created": now(),
                **identity,
                "sessions": [session],
                "cost": {},
                "final": None,
            }
        content["status"] = "running"
        return cls(run, content)

    @classmethod
    def reopen(cls, run: Path) -> Manifest:
        """Go on with the last session, whose work is done."""
        manifest = cls(run, read_manifest(run))
        manifest._clock -= manifest.content["sessions"][-1]["wall_seconds"]
        return manifest

    def update(self, *, force: bool = False, **session: Any) -> None:
        """Take in what the session has cost so far, and write unless that was done a moment ago."""
        elapsed = time.monotonic() - self._clock
        current = self.content["sessions"][-1]
        current |= session | {"updated": now(), "wall_seconds": round(elapsed, 1)}
        self.content["cost"] = total_cost(self.content["sessions"])
        if force or self._written is None or elapsed - self._written >= WRITE_SECONDS:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self.content)
            self._written = elapsed

    def finish(self, final: Path) -> None:
        """The run is done; ``final`` is hashed."""
        files = folder_hashes(final)
        self.content |= {"status": "finished", "final": {"hash": combined_hash(files), "files": files}}
        self.update(force=True)

    def fail(self, error: BaseException) -> None:
        """The run stopped with an error; one that never began leaves nothing behind."""
        if self._written is None:
            return
        on_request = isinstance(error, SystemExit) and error.code in (0, 130)
        stopped = on_request or isinstance(error, KeyboardInterrupt)
        self.content |= {"status": "interrupted" if stopped else "failed"}
        told = str(error) if on_request else "interrupted"
        with suppress(OSError):  # a full disk is what the error may be about
            self.update(force=True, error=told if stopped else f"{type(error).__name__}: {error}")


def total_cost(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over sessions: seconds, device hours (a process each, without the time for benchmarks), tokens; the highest peak."""
    return {
        "wall_seconds": round(sum(s["wall_seconds"] for s in sessions), 1),
        "benchmark_seconds": round(sum(s.get("benchmark_seconds", 0.0) for s in sessions), 1),
        "device_hours": round(
            sum((s["wall_seconds"] - s.get("benchmark_seconds", 0.0)) * s["hardware"]["processes"] for s in sessions)
            / 3600,
            4,
        ),
        "device": (sessions[-1]["hardware"]["gpus"] or [sessions[-1]["hardware"]["processor"]])[0],
        "tokens_generated": sum(s["tokens_generated"] for s in sessions),
        "tokens_trained": sum(s["tokens_trained"] for s in sessions),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in sessions),
        "peak_memory_of": sessions[-1]["peak_memory_of"],
        "sessions": len(sessions),
    }
