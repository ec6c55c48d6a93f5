"""``oprd plan``: what a recipe needs of a GPU, before a weight is loaded."""

from __future__ import annotations

import argparse
import json
import re
from typing import NoReturn

from oprd.commands.shared import check_recipe_named, show_events, show_rows

PLAN_HELP = """\
usage: oprd plan --config RECIPE [--gpu_memory GB] [--gpus N] [--sharding none|zero2|zero3|fsdp] [--prompt_tokens N]
                 [--all] [--key value ...] [--json]

Peak memory of each GPU by category, FLOPs and tokens of one micro-batch, for the recipe and for its other gradient scope;
with --all for every objective in both scopes, on the same rollouts. The training code runs on tensors without content: from the
two models' config.json, without weights and without a GPU, in half a minute for 28 layers. A GPU of M GB counts as 0.95 M - 1:
the rest is the driver's and the allocator's. If the recipe does not fit, what would help, and exit status 3.

  --gpu_memory GB     memory of one GPU; by default this machine's, or 80
  --gpus N            processes, one on each GPU (default 1)
  --sharding          zero2: gradients and optimiser states are split over the GPUs; zero3, fsdp: weights
                      too, the student's and the teacher's (default none)
  --prompt_tokens N   length of a prompt; by default max_prompt_length, or 512
  --all               every objective, with full and with suffix gradient (a minute or two)
  --key value         any setting of oprd train

Columns in GB. targets: the teacher's states. activations: what the student's forward and backward hold beside them.
generation: keys and values of the responses that are sampled at once, or vLLM's share. peak: the worst moment. TFLOP counts
matrix products and attention of the teacher's forward and the student's forward, recomputation and backward."""


class _Own(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        told = re.sub(r"^argument (--\w+): ", r"\1: ", message)
        raise ValueError(f"{told}. Correct it; oprd plan --help explains the settings.")


def add_own_keys(parser: argparse.ArgumentParser) -> None:
    """What a plan takes beside the keys of a recipe; `PLAN_HELP` explains it at length."""
    add = parser.add_argument
    add("--gpu_memory", type=float, metavar="GB", help="memory of one GPU")
    add("--gpus", type=int, default=1, metavar="N", help="processes, one on each GPU")
    add("--sharding", choices=("none", "zero2", "zero3", "fsdp"), default="none", help="what is split over the GPUs")
    add("--prompt_tokens", type=int, metavar="N", help="length of a prompt")
    add("--all", action="store_true", help="every objective, with full and with suffix gradient")
    add("--json", action="store_true", help="print JSON instead of tables")


def run_plan(arguments: list[str]) -> int:
    """Run; the other keys are the recipe parser's."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(PLAN_HELP)
        return 0 if arguments else 2
    check_recipe_named(arguments)
    own = _Own(prog="oprd plan", add_help=False, allow_abbrev=False)
    add_own_keys(own)
    options, arguments = own.parse_known_args(arguments)
    for name in ("gpus", "gpu_memory", "prompt_tokens"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be positive, got {value:g}.")
    show_events()
    from oprd.insight.recipe_plan import plan_recipe

    found = plan_recipe(
        arguments,
        gpu_memory=options.gpu_memory,
        processes=options.gpus,
        sharding=options.sharding,
        prompt_tokens=options.prompt_tokens,
        every=options.all,
    )
    status = 0 if found.plan.fits else 3
    if options.json:
        whole = {"fits": found.plan.fits, "verdict": found.verdict, "rows": found.rows}
        print(json.dumps(whole | {"remedies": found.remedies, "assumed": found.notes}, indent=2))
        return status
    show_rows(found.rows, as_json=False)
    print("\n" + found.verdict)
    for note in found.notes:
        print(f"assumed: {note}")
    if found.remedies:
        print("\nwhat would help:")
        show_rows(found.remedies, as_json=False)
    return status
