"""``oprd compare``: runs or evaluations side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oprd.commands.shared import show_events, show_rows


def add_compare(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "compare",
        help="set runs or evaluations side by side, with paired differences and cost",
        description="One table of runs (their final students) or folders of evaluations, with 95 % intervals. Every later one is "
        "compared with the first, problem by problem: difference, interval, p-value. With runs, a plot of accuracy against "
        "time and memory.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run, or a folder of evaluations; the first is the baseline"
    )
    parser.add_argument(
        "--on", nargs="+", default=None, metavar="BENCHMARK", help="benchmarks (default: all in common)"
    )
    parser.add_argument("--metric", default="avg_at_k", help="what is compared: avg_at_k (default), best_at_k, pass_at_N, "
        "mean_length, distinct_4, cut_off, no_box")  # fmt: skip
    parser.add_argument("--plot", default="comparison.png", help="where the plot goes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run_command=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Compare, print, plot."""
    show_events()
    from oprd.insight.compare import compare, open_contenders, table_rows
    from oprd.insight.plots import plot_bubbles
    from oprd.records import check_folder

    check_folder(Path(options.plot).parent, "--plot")
    rows, notes = compare(open_contenders(options.runs), benchmarks=options.on, metric=options.metric)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show_rows(table_rows(rows, options.metric), as_json=False)
    for note in notes:
        print(f"oprd: {note}", file=sys.stderr)
    if plot_bubbles(rows, options.plot):
        print(f"Plot: {options.plot}", file=sys.stderr)
    return 0
