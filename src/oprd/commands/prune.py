"""``oprd prune``: a student with fewer layers, made from its teacher."""

from __future__ import annotations

import argparse
import json
import sys

from oprd.commands.shared import show_events, show_rows

OF_THE_PROMPTS = ("prompts", "answers", "batch_size", "seed", "split", "prompt_column", "as_chat")


def add_prune(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "prune",
        help="make a student by taking layers out of a model",
        description="Copy a causal LM without some of its layers. Those of lowest influence go: a layer's influence is 1 - the "
        "mean cosine of the hidden states before and after it (ShortGPT), over the prompts and the model's own answers to them. "
        "The first and the last layer stay. The copy remembers which layers it has, and oprd train compares them with the "
        "original's: name the original as the teacher.",
    )
    add = parser.add_argument
    add("model", help="a Hub id, a folder, or miniature:NAME")
    add("--out", "--output_dir", required=True, help="folder of the student; must not be there yet")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--keep", type=int, help="how many layers stay")
    which.add_argument("--drop", type=int, help="how many layers go")
    which.add_argument("--layers", help="the layers that stay, by hand, such as 1,2,4,6; layers count from 1")
    add(
        "--data",
        "--dataset_name",
        help="prompts: a Hub id, or a parquet, json or jsonl file; needed with --keep and --drop",
    )
    add("--prompts", type=int, help="prompts drawn from them (default: 256)")
    add("--answers", type=int, help="most tokens of the model's answer to each, 0 for prompts alone (default: 64)")
    add("--batch_size", type=int, help="prompts at once (default: 16)")
    add("--seed", type=int, help="of the prompts drawn and of the answers (default: 0)")
    add("--split", help="split of a Hub dataset (default: train)")
    add("--prompt_column", help="column with the prompt (default: prompt, problem or question)")
    add("--as_chat", action="store_true", default=None, help="text prompts as one user message each")
    add("--revision", help="revision of a Hub model")
    add("--device", help="such as cuda:1 (default: the first accelerator, else cpu)")
    add("--json", action="store_true", help="print the record as JSON instead of a table")
    parser.set_defaults(run_command=run_prune)


def run_prune(options: argparse.Namespace) -> int:
    """Prune, print a table."""
    given = {name: getattr(options, name) for name in OF_THE_PROMPTS if getattr(options, name) is not None}
    if options.data is None and given:
        raise ValueError(f"--{', --'.join(given)} would be ignored: there is no --data.")
    choice = {"keep": options.keep, "drop": options.drop, "layers": _numbers(options.layers)}
    show_events()
    from oprd.compression import prune
    from oprd.compression.prune import Choice, Probing, layer_rows

    record = prune(
        options.model,
        options.out,
        Choice(**choice),
        None if options.data is None else Probing(options.data, **given),
        revision=options.revision,
        device=options.device,
        progress=True,
    )
    if options.json:
        print(json.dumps(record, indent=2))
        return 0
    show_rows(layer_rows(record), as_json=False)
    before, after = record["parameters"]["before"], record["parameters"]["after"]
    print(f"{before:,} parameters before, {after:,} after. Student: {options.out}", file=sys.stderr)
    return 0


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError as error:
        raise ValueError(f"--layers must be numbers such as 1,2,4,6, got {text!r}.") from error
