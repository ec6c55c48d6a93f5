"""``oprd gate``: may this student replace that one. Made for CI: 0 opens, 3 is shut."""

from __future__ import annotations

import argparse
import json
import sys

from oprd.commands.shared import show_events, show_rows

SHUT = 3
EXAMPLE = """\
GATES, for example:

  accuracy: {min: 40, max_drop: 2}          # Avg@k in percent; also min_gain
  length: {max_increase_percent: 20}        # tokens; also max
  repetition: {max_drop: 5}                 # of Dist-4g; also min_distinct_4
  cut_off: {max: 5}                         # percent; also max_increase
  no_box: {max: 5}                          # percent; also max_increase
  cost: {max_increase_percent: 50}          # device hours; also max_wall_hours, max_device_hours, max_peak_memory_gb
  benchmarks: [aime24]                      # default: all in common
  decide_by: interval                       # or value
  undecided: fail                           # or pass: where the interval holds the threshold
"""


def add_gate(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "gate",
        help="hold a run against thresholds and a baseline (exit code 3: not passed)",
        description="Hold a run's final student against thresholds on accuracy, length, repetition and cost. Scores are\n"
        "judged by their 95 % intervals, differences are paired by problem. Exit code 0: passed, 3: not. The\n"
        "outcome is kept in the run's gate.json, which oprd registry promote asks for.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("candidate", metavar="RUN", help="a run, or a folder of evaluations")
    parser.add_argument("--against", default=None, metavar="BASELINE", help="a run, or a folder of evaluations")
    parser.add_argument("--config", "--gates", required=True, metavar="GATES", help="YAML file with the thresholds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run_command=run_gate)


def run_gate(options: argparse.Namespace) -> int:
    """Judge, print the reasons, keep them."""
    show_events()
    from oprd.insight.gating import gate_run

    outcome = gate_run(options.candidate, options.against, options.config)
    if options.json:
        print(json.dumps(outcome, indent=2))
    else:
        show_rows([{"state": v["state"], "gate": v["gate"], "benchmark": v["benchmark"], "reason": v["reason"]}
                   for v in outcome["verdicts"]], as_json=False)  # fmt: skip
        for note in outcome["notes"]:
            print(f"oprd: {note}", file=sys.stderr)
        print("Passed." if outcome["passed"] else "Not passed.", file=sys.stderr)
    return 0 if outcome["passed"] else SHUT
