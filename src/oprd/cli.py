"""The door: parse, then import, then call. ``--help`` never waits for torch."""

from __future__ import annotations

import argparse
import os
import sys

from oprd.commands.bridge import run_bridge
from oprd.commands.compare import add_compare
from oprd.commands.demo import add_demo
from oprd.commands.diagnose import add_diagnose
from oprd.commands.eval import add_eval
from oprd.commands.gate import add_gate
from oprd.commands.plan import run_plan
from oprd.commands.prune import add_prune
from oprd.commands.registry import add_registry
from oprd.commands.report import add_report
from oprd.commands.serve import add_serve
from oprd.commands.train import run_train

OWN_KEYS = {"train": run_train, "bridge": run_bridge, "plan": run_plan}  # commands whose keys another parser reads


def build_parser() -> argparse.ArgumentParser:
    """The command line; ``train`` and ``bridge`` leave their keys to the recipe parser."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(prog="oprd", description="On-policy distillation in hidden-state space.")
    parser.add_argument("--version", action="version", version=f"oprd {version('oprd')}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="distil a teacher into a student from a recipe", add_help=False)
    commands.add_parser("bridge", help="fit a bridge between two models, or look into one", add_help=False)
    commands.add_parser("plan", help="what a recipe needs of a GPU, and what would help", add_help=False)
    for add in (
        add_diagnose,
        add_prune,
        add_eval,
        add_compare,
        add_report,
        add_gate,
        add_registry,
        add_serve,
        add_demo,
    ):
        add(commands)
    return parser


def _underscored(argument: str) -> str:
    """``--max-steps`` as ``--max_steps``; both spellings are common."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 1 when something is wrong with the input (one line on stderr), 2 on bad usage, 3 when
    a gate is shut."""
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    options, rest = build_parser().parse_known_args(arguments)
    if rest and options.command not in OWN_KEYS:
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return OWN_KEYS[options.command](rest) if options.command in OWN_KEYS else options.run_command(options)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        told = " ".join(str(error).split()) or type(error).__name__  # libraries write whole paragraphs
        print(f"oprd: error: {told} [oprd --traceback {options.command} ... shows where]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("oprd: interrupted", file=sys.stderr)
        return 130
