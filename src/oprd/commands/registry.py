"""``oprd registry``: students that passed their gates, and the way back."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oprd.commands.shared import show_events, show_rows


def add_registry(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "registry",
        help="promote, list, retire and roll back students that passed their gates",
        description="A folder of promoted students. REGISTRY/current is the one in use and loads with from_pretrained. Every "
        "change is atomic and safe beside other processes.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.add_argument("registry", metavar="REGISTRY", help="folder of the registry")
        made.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return made

    promote = action(
        "promote", "copy a run's final student in and make it the current one; its gate.json must say passed"
    )
    promote.add_argument("source", metavar="RUN", help="a run that oprd gate has passed")
    promote.add_argument("--note", default=None, help="words to keep with it")
    promote.add_argument("--without_gate", default=None, metavar="REASON", help="promote all the same, and record why")
    action("list", "list all versions")
    retire = action("retire", "take a version that is not current out of use; its files stay")
    retire.add_argument("version", type=int, help="its number")
    retire.add_argument("--reason", required=True, help="why; it is kept")
    rollback = action("rollback", "go back to the version before, and retire the current one")
    rollback.add_argument("--to", type=int, default=None, metavar="VERSION", help="go back to this one")
    rollback.add_argument("--reason", required=True, help="why; it is kept")
    action("verify", "check every file against its hash; exit code 1 if something is wrong")
    parser.set_defaults(run_command=run_registry)


def run_registry(options: argparse.Namespace) -> int:
    """Do it, then show where things stand."""
    show_events()
    from oprd.lineage.registry import Registry
    from oprd.records import read_json

    registry = Registry(options.registry)
    if options.action == "verify":
        faults = registry.verify()
        print(json.dumps(faults, indent=2) if options.json else "\n".join(faults) or "All files are what they were.")
        return 1 if faults else 0
    if options.action == "promote":
        path = Path(options.source) / "gate.json"
        gate = read_json(path) if path.exists() else None
        version = registry.promote(options.source, gate=gate, note=options.note, force_reason=options.without_gate)
        print(f"Version {version} is current.", file=sys.stderr)
    elif options.action == "retire":
        registry.retire(options.version, options.reason)
    elif options.action == "rollback":
        print(f"Version {registry.rollback(options.reason, to=options.to)} is current.", file=sys.stderr)
    versions, current = registry.versions(), registry.current()
    if options.json:
        print(json.dumps({"current": current and current["version"], "versions": versions}, indent=2))
        return 0
    if not versions:
        raise ValueError(f"{options.registry} holds no version yet: oprd registry promote {options.registry} RUN")
    show_rows(
        [
            {
                "version": one["version"],
                "current": "yes" if current and one["version"] == current["version"] else "",
                "state": one["state"],
                "promoted": one["promoted"],
                "from": one["source"],
                "content": one["model_hash"][:12],
                "note": one["note"] or "",
                "reason": (one.get("retired") or one.get("forced") or {}).get("reason") or "",
            }
            for one in versions
        ],
        as_json=False,
    )
    return 0
