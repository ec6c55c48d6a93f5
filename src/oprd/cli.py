"""The door: parse, then import, then call. ``--help`` never waits for torch."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from oprd.training.options import BRIDGE_HELP, CHOICES, DATA_HELP, HELP, THEN_HELP

TRAIN_NOTES = """\
The student is model_name_or_path, the teacher teacher_model_name_or_path. Every key of trl.DistillationConfig,
transformers.TrainingArguments and trl.ModelConfig works too (learning_rate, max_steps, max_completion_length, use_vllm,
use_peft, lora_r, ...). Keys on the command line win over the recipe; an unknown key is an error.

several processes:  accelerate launch -m oprd train --config recipe.yaml
"""


def _settings(title: str, table: dict[str, str]) -> str:
    lines = [f"{title}:"]
    for name, text in table.items():
        choices = f" [{'|'.join(CHOICES[name])}]" if name in CHOICES else ""
        lines.append(f"  --{name}{choices}")
        lines += textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def train_help() -> str:
    """What ``oprd train --help`` prints."""
    usage = (
        "usage: oprd train --config RECIPE [--key value ...] [--json]\n\nDistil a teacher into a student from a recipe."
    )
    recipe = "RECIPE is a YAML file, or the name of one that ships with oprd (oprd train --config miniature)."
    tables = [
        _settings("objective", HELP),
        _settings("data", DATA_HELP),
        _settings("bridge: auto", BRIDGE_HELP),
        _settings("second stage", {"then": THEN_HELP}),
    ]
    return "\n\n".join([usage, recipe, TRAIN_NOTES.strip(), *tables])


def fit_help() -> str:
    """What ``oprd bridge fit --help`` prints."""
    usage = "usage: oprd bridge fit --config RECIPE [--bridge DIR] [--key value ...] [--json]"
    about = textwrap.fill(
        "Fit a bridge for a training recipe: the student answers its prompts, both models read the answers once, and the maps "
        "are solved in closed form. It is saved to the folder that the recipe's bridge names (output_dir/bridge if that is "
        "auto or missing), with a report. A stopped fit continues where it was.",
        100,
    )
    return "\n\n".join([usage, about, _settings("fit", BRIDGE_HELP), _settings("data", DATA_HELP)])


def _bridge(arguments: list[str]) -> int:
    action, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if action == "fit":
        if not rest or {"-h", "--help"} & set(rest):
            print(fit_help())
            return 0 if rest else 2
        as_json = "--json" in rest
        _show_events()
        from oprd.training.run import fit

        directory, bridge, is_main = fit([argument for argument in rest if argument != "--json"])
        return _show_bridge(bridge, directory / "plots", as_json) if is_main else 0
    options = _bridge_parser().parse_args(arguments)
    from oprd.bridge import Bridge

    bridge = Bridge.from_pretrained(options.directory)
    return _show_bridge(bridge, options.plots or f"{options.directory}/plots", options.json)


def _bridge_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oprd bridge", description="Fit bridges between models, and look into them.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("fit", help="fit a bridge for a training recipe (oprd bridge fit --help)", add_help=False)
    inspect = actions.add_parser(
        "inspect",
        help="print and plot a bridge's report",
        description="Cosine against rank before and after the fit, R^2, held-out rows, controls, and what to expect.",
    )
    inspect.add_argument("directory", help="folder of the bridge")
    inspect.add_argument("--plots", default=None, help="where the plots go (default: plots/ in the folder)")
    inspect.add_argument("--json", action="store_true", help="print the whole report as JSON")
    return parser


def _show_bridge(bridge, plots: str, as_json: bool) -> int:
    from oprd.insight.bridges import control_rows, plot_bridge, rank_rows, verdict

    if as_json:
        print(json.dumps({"bridge": repr(bridge), "fitted_for": bridge.fitted_for, **bridge.report}, indent=2))
        return 0
    if "ranks" not in bridge.report:
        raise ValueError("This bridge carries no report: it was not made by a fit.")
    print(bridge)
    for line in verdict(bridge.report):
        print(f"  {line}")
    for rows in (rank_rows(bridge.report), control_rows(bridge.report)):
        if rows:
            print()
            _report(rows, as_json=False)
    plot_bridge(bridge.report, plots)
    print(f"Plots: {plots}", file=sys.stderr)
    return 0


def _train(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(train_help())
        return 0 if arguments else 2
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    _show_events()
    from oprd.insight.plots import plot_runs
    from oprd.insight.tables import run_summary
    from oprd.training.callbacks import read_metrics
    from oprd.training.run import run

    directory, is_main = run(arguments)
    if is_main:
        metrics = read_metrics(directory / "metrics.jsonl")
        plot_runs({directory.name: metrics}, directory / "plots")
        summary = run_summary(metrics) | {"final": str(directory / "final"), "plots": str(directory / "plots")}
        _report([summary], as_json)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from oprd.miniature import demo

    _show_events()
    if options.rebuild:
        demo.rebuild_assets()
        return 0
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}.")
    rows = demo.run_demo(options.out, which=options.which, steps=options.steps, seed=options.seed)
    _report(rows, options.json)
    print(f"Plots: {options.out}/plots", file=sys.stderr)
    return 0


def _report(rows: list[dict], as_json: bool) -> None:
    from oprd.insight.tables import format_table

    print(json.dumps(rows, indent=2) if as_json else format_table(rows))


def _show_events() -> None:
    """One line per event of this project on stderr, once for all processes of a launch."""
    import logging
    import os
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # for library authors, not for users of this command

    def plain(record: logging.LogRecord) -> bool:  # accelerate marks its lines; only the first process speaks here
        record.msg = str(record.msg).removeprefix("[RANK 0] ")
        return True

    handler = logging.StreamHandler()
    handler.addFilter(plain)
    handler.setFormatter(logging.Formatter("oprd: %(message)s"))
    events = logging.getLogger("oprd")
    events.handlers, events.propagate = [handler], False
    events.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The command line; ``train`` leaves its own keys to the recipe parser."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(prog="oprd", description="On-policy distillation in hidden-state space.")
    parser.add_argument("--version", action="version", version=f"oprd {version('oprd')}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="distil a teacher into a student from a recipe", add_help=False)
    commands.add_parser("bridge", help="fit a bridge between two models, or look into one", add_help=False)
    demo = commands.add_parser(
        "demo",
        help="distil the embedded miniature and compare methods (minutes, CPU)",
        description="Distil the embedded miniature with several methods on one budget, and compare. same: a teacher of the "
        "student's origin (OPRD, OPD top-16). bridge: a deeper and wider teacher of another origin (bridge, full KL). "
        "tokenizer: a teacher with another tokenizer (bridge, prefix marginals).",
    )
    demo.add_argument("which", nargs="?", choices=("same", "bridge", "tokenizer"), default="same", help="which pair")
    demo.add_argument("--out", default="runs/demo", help="where runs and plots go (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=None, help="updates of each method (default: the recipe's)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the rollouts (default: %(default)s)")
    demo.add_argument(
        "--rebuild", action="store_true", help="train the miniature's student and teacher again, then stop"
    )
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 1 when something is wrong with the input (one line on stderr), 2 on bad usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = build_parser().parse_known_args(arguments)
    if rest and options.command == "demo":
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return (
            {"train": _train, "bridge": _bridge}[options.command](rest) if options.command != "demo" else _demo(options)
        )
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"oprd: error: {error} [oprd --traceback {options.command} ... shows where]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("oprd: interrupted", file=sys.stderr)
        return 130
