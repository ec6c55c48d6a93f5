"""The door: parse, then import, then call. ``--help`` never waits for torch."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import NoReturn

from oprd.commands.bridge import run_bridge
from oprd.commands.compare import add_compare
from oprd.commands.completion import add_completion, all_parsers
from oprd.commands.demo import add_demo
from oprd.commands.diagnose import add_diagnose
from oprd.commands.eval import add_eval
from oprd.commands.gate import add_gate
from oprd.commands.launching import tell_error
from oprd.commands.plan import run_plan
from oprd.commands.prune import add_prune
from oprd.commands.recipes import add_recipes, add_show
from oprd.commands.registry import add_registry
from oprd.commands.report import add_report
from oprd.commands.serve import add_serve
from oprd.commands.train import run_train

OWN_KEYS = {"train": run_train, "bridge": run_bridge, "plan": run_plan}  # commands whose keys another parser reads


def _own(name: str, told: str) -> Callable:
    """A command of `OWN_KEYS`: it prints its own help too."""
    return lambda commands: commands.add_parser(name, help=told, add_help=False)


GROUPS: dict[str, tuple[Callable, ...]] = {  # in the order in which one comes to need them
    "to begin": (add_demo, add_recipes, add_show),
    "before training": (
        add_diagnose,
        _own("plan", "tell what a recipe needs of a GPU, and what would help"),
        _own("bridge", "fit a bridge between two models, or look into one"),
        add_prune,
    ),
    "training": (_own("train", "distil a teacher into a student from a recipe"),),
    "what came of it": (add_eval, add_compare, add_report),
    "putting it to use": (add_gate, add_registry),
    "around it": (add_serve, add_completion),
}
FIRST = """\
to try first:
  oprd demo                                      see the method work on an embedded miniature
  oprd show miniature > my.yaml                  start a recipe from one that ships with oprd
  oprd train --config my.yaml --max_steps 20     train from it; any setting can be given here too

oprd COMMAND --help explains a command."""


class _Grouped(argparse.ArgumentParser):
    """A parser that lists its commands by group."""

    groups: dict[str, list[str]]

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        more = _nearest(wrong[1], self.commands.choices) if wrong else " (oprd --help lists them)"
        super().error(f"{message}{more if wrong or message.endswith('COMMAND') else ''}")

    def format_help(self) -> str:
        told = {action.dest: action.help for action in self.commands._choices_actions}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        lines = []
        for title, names in self.groups.items():
            lines += ["", f"{title}:"]
            for name in names:
                lines += textwrap.wrap(told[name], 96, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
        options = ["", "options:"]
        for action in self._optionals._group_actions:
            options.append(f"  {', '.join(action.option_strings):<15}{action.help}")
        return "\n".join([formatter.format_help().rstrip(), *lines, *options, "", FIRST, ""])


def build_parser() -> argparse.ArgumentParser:
    """The command line; commands of `OWN_KEYS` leave theirs to another parser."""
    from importlib.metadata import version

    parser = _Grouped(prog="oprd", description="On-policy distillation in hidden-state space.")
    parser.add_argument("--version", action="version", version=f"oprd {version('oprd')}", help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from (before COMMAND)")
    parser.commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    parser.groups = {}
    for title, commands in GROUPS.items():
        before = len(parser.commands.choices)
        for add in commands:
            add(parser.commands)
        parser.groups[title] = list(parser.commands.choices)[before:]
    return parser


def _nearest(word: str, known: Iterable[str]) -> str:
    """What was meant, for the end of a message; nothing if no word is close."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unrecognized(parser: argparse.ArgumentParser, words: list[str]) -> NoReturn:
    """The error of the command that they were given to, not of the whole program."""
    known = {option for one in all_parsers(parser) for option in one._option_string_actions}
    parser.error(f"unrecognized arguments: {' '.join(words)}{_nearest(words[0].partition('=')[0], sorted(known))}")


def _underscored(argument: str) -> str:
    """``--max-steps`` as ``--max_steps``; both spellings are common."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 1 when something is wrong with the input (one line on stderr), 2 on bad usage, 3 when
    a gate is shut."""
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in OWN_KEYS and not hasattr(options, "keys_after"):
        _unrecognized(parser.commands.choices[options.command], rest)
    options.parser, options.keys = parser, rest
    try:
        return OWN_KEYS[options.command](rest) if options.command in OWN_KEYS else options.run_command(options)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        told = " ".join(str(error).split()) or type(error).__name__  # libraries write whole paragraphs
        tell_error(f"oprd: error: {told} [oprd --traceback {options.command} ... shows where]")
        return 1
    except KeyboardInterrupt:
        print("oprd: interrupted", file=sys.stderr)
        return 130
