"""``oprd demo``: the embedded miniature."""

from __future__ import annotations

import argparse
import sys

from oprd.commands.shared import show_events, show_rows


def add_demo(commands) -> None:
    """Its words."""
    demo = commands.add_parser(
        "demo",
        help="distil the embedded miniature with several methods and compare them (minutes, CPU)",
        description="Distil the embedded miniature with several methods on one budget, and compare. same: a teacher of the "
        "student's origin (OPRD, OPD top-16). bridge: a deeper and wider teacher of another origin (bridge, full KL). "
        "tokenizer: a teacher with another tokenizer (bridge, prefix marginals).",
    )
    demo.add_argument("which", nargs="?", choices=("same", "bridge", "tokenizer"), default="same", help="which pair")
    demo.add_argument(
        "--out", "--output_dir", default="runs/demo", help="where runs and plots go (default: %(default)s)"
    )
    demo.add_argument("--steps", type=int, default=None, help="updates of each method (default: the recipe's)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the rollouts (default: %(default)s)")
    demo.add_argument(
        "--rebuild", action="store_true", help="train the miniature's student and teacher again, then stop"
    )
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo.set_defaults(run_command=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    """Run, or rebuild its files."""
    from oprd.miniature import demo

    show_events()
    if options.rebuild:
        demo.rebuild_assets()
        return 0
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}.")
    rows = demo.run_demo(options.out, which=options.which, steps=options.steps, seed=options.seed)
    show_rows(rows, options.json)
    print(f"Plots: {options.out}/plots", file=sys.stderr)
    return 0
