"""``oprd report``: one run as one page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from oprd.commands.shared import show_events
from oprd.lineage.manifest import read_manifest


def add_report(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "report",
        help="write a run up as one self-contained HTML page",
        description="Write a page about a run: what was distilled from what, how good it is with intervals, curves, speed and "
        "memory, answers side by side, the manifest. It opens from disk without a network.",
    )
    parser.add_argument("run", metavar="RUN", help="a run of oprd train")
    parser.add_argument(
        "--out", "--output_dir", default=None, metavar="FILE", help="where the page goes (default: RUN/report.html)"
    )
    parser.add_argument("--json", action="store_true", help="print the path as JSON")
    parser.set_defaults(run_command=run_report)


def run_report(options: argparse.Namespace) -> int:
    """Write it, say where."""
    read_manifest(Path(options.run))  # said at once if it is no run
    show_events()
    from oprd.insight.report import write_report

    path = write_report(Path(options.run), None if options.out is None else Path(options.out))
    print(json.dumps({"report": str(path)}) if options.json else f"Report: {path}")
    return 0
