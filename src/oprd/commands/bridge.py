"""``oprd bridge``: fit bridges, and look into them."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from oprd.commands.launching import launch
from oprd.commands.shared import check_recipe_named, describe_settings, show_events, show_rows
from oprd.training.options import BRIDGE_HELP, DATA_HELP


def fit_help() -> str:
    """What ``oprd bridge fit --help`` prints."""
    usage = "usage: oprd bridge fit --config RECIPE [--bridge DIR] [--key value ...] [--json]"
    about = textwrap.fill(
        "Fit a bridge for a training recipe: the student answers its prompts, both models read the answers once, and the maps "
        "are solved in closed form. It is saved to the folder that the recipe's bridge names (output_dir/bridge if that is "
        "auto or missing), with a report. A stopped fit continues where it was.",
        100,
    )
    return "\n\n".join([usage, about, describe_settings("fit", BRIDGE_HELP), describe_settings("data", DATA_HELP)])


def run_bridge(arguments: list[str]) -> int:
    """``fit`` leaves its keys to the recipe parser."""
    action, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if action == "fit":
        if not rest or {"-h", "--help"} & set(rest):
            print(fit_help())
            return 0 if rest else 2
        check_recipe_named(rest)
        status = launch(["bridge", "fit"], rest)
        if status is not None:
            return status
        as_json = "--json" in rest
        show_events()
        from oprd.durability.stopping import Stopped
        from oprd.training.run import fit

        try:
            directory, bridge, is_main = fit([argument for argument in rest if argument != "--json"])
        except Stopped as stopped:  # it has said so
            return stopped.code
        return _show_bridge(bridge, directory / "plots", as_json) if is_main else 0
    options = _bridge_parser().parse_args(arguments)
    from oprd.bridge import Bridge

    bridge = Bridge.from_pretrained(options.directory)
    return _show_bridge(bridge, options.plots or f"{options.directory}/plots", options.json)


def _bridge_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oprd bridge", description="Fit bridges between models, and look into them.")
    add_actions(parser)
    return parser


def add_actions(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Its actions; the parser of ``fit``, whose keys are the recipe parser's."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fit = actions.add_parser("fit", help="fit a bridge for a training recipe (oprd bridge fit --help)", add_help=False)
    inspect = actions.add_parser(
        "inspect",
        help="print and plot a bridge's report",
        description="Cosine against rank before and after the fit, R^2, held-out rows, controls, and what to expect.",
    )
    inspect.add_argument("directory", metavar="BRIDGE", help="folder of the bridge")
    inspect.add_argument("--plots", default=None, help="where the plots go (default: plots/ in the folder)")
    inspect.add_argument("--json", action="store_true", help="print the whole report as JSON")
    return fit


def _show_bridge(bridge, plots: str, as_json: bool) -> int:
    from oprd.insight.bridges import control_rows, plot_bridge, rank_rows, verdict

    if as_json:
        print(json.dumps({"bridge": repr(bridge), "fitted_for": bridge.fitted_for, **bridge.report}, indent=2))
        return 0
    if (
        not isinstance(bridge.report.get("ranks"), list)
        or not {"rank", "fit", "layers", "explained"} <= bridge.report.keys()
    ):
        raise ValueError("bridge.json carries no whole report: a fit makes it. Fit it again with oprd bridge fit.")
    print(bridge)
    for line in verdict(bridge.report):
        print(f"  {line}")
    for rows in (rank_rows(bridge.report), control_rows(bridge.report)):
        if rows:
            print()
            show_rows(rows, as_json=False)
    plot_bridge(bridge.report, plots)
    print(f"Plots: {plots}", file=sys.stderr)
    return 0
