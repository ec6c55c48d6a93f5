"""``oprd diagnose``: look into two models before a run, or into a run after it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oprd.commands.shared import parse_json, show_events, show_rows
from oprd.lineage.manifest import read_manifest

OF_THE_PROMPTS = ("data", "prompts", "seed", "split", "prompt_column", "answer_column", "as_chat")
OF_THE_RUN = ("max_new_tokens", "batch_size", "dtype", "device")
OF_TWO_MODELS = ("student_revision", "teacher_revision", "teacher_prompt_template", "chat_template_kwargs")


def add_diagnose(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "diagnose",
        help="compare two models, or a run's student before and after, and advise",
        description="Let the student answer prompts, let both models read the answers, and say whether the teacher's states can "
        "teach it: directly, through a bridge, or not at all. Layer by layer: cosine, variance explained, CKA, massive "
        "activations; by position: cosine and KL over the first and the last k; of the LM heads: how far they have "
        "drifted, and what each makes of the other's states. Ends with a recommendation, and with a recipe. Of a run: its "
        "student before and after, on the same answers.",
    )
    add = parser.add_argument
    add("run", nargs="?", help="a finished run of oprd train, in place of --student and --teacher")
    add("--student", help="a Hub id, a folder, or miniature:NAME")
    add("--teacher", help="the same; with a run, in place of its own teacher, or which of several")
    add("--data", help="prompts: a Hub id, or a parquet, json or jsonl file (default: those of the run)")
    add("--prompts", type=int, help="how many are drawn (default: 128)")
    add(
        "--max_new_tokens",
        type=int,
        help="most tokens of an answer (default: the run's max_completion_length, else what the context leaves, at most 512)",
    )
    add("--batch_size", type=int, help="answers drawn at once (default: 32)")
    add("--seed", type=int, help="of the prompts and of the answers (default: 0)")
    add(
        "--out",
        "--output_dir",
        help="where diagnosis.json, recipe.yaml and plots go (default: RUN/diagnosis, or diagnoses/STUDENT--TEACHER)",
    )
    add("--skip_accuracy", action="store_true", help="do not solve problems with both models and swapped heads, though the data "
        "has answers")  # fmt: skip
    add(
        "--teacher_prompt_template",
        help="what the teacher reads in place of the prompt, such as '{prompt}\\n\\nHint: {hint}'",
    )
    add("--chat_template_kwargs", metavar="JSON", help='arguments of the template, such as {"enable_thinking": false}')
    add("--split", help="split of a Hub dataset (default: train)")
    add("--prompt_column", help="column with the prompt (default: prompt, problem or question)")
    add("--answer_column", help="column with the answer (default: reward_model.ground_truth or answer)")
    add("--as_chat", action="store_true", default=None, help="text prompts as one user message each")
    add("--student_revision", help="revision of a Hub model")
    add("--teacher_revision", help="revision of a Hub model")
    add("--dtype", help="of both models (default: the student's checkpoint's own)")
    add("--device", help="such as cuda:1 (default: the first accelerator, else cpu)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the models")
    add("--json", action="store_true", help="print the whole diagnosis as JSON instead of tables")
    parser.set_defaults(run_command=run_diagnose)


def run_diagnose(options: argparse.Namespace) -> int:
    """Compare, print tables and advice."""
    _check(options)
    show_events()
    from oprd.insight.cases import Prompts, case_of_models, case_of_run
    from oprd.insight.diagnosis import Settings, diagnose
    from oprd.insight.diagnosis_view import plot_diagnosis, write_recipe

    prompts = {name: getattr(options, name) for name in OF_THE_PROMPTS if getattr(options, name) is not None}
    settings = {name: getattr(options, name) for name in OF_THE_RUN if getattr(options, name) is not None}
    if options.run is not None:
        case = case_of_run(options.run, prompts, teacher=options.teacher, trust_remote_code=options.trust_remote_code)
        settings = {"max_new_tokens": case.max_new_tokens, **settings} if case.max_new_tokens else settings
        out = Path(options.out or Path(options.run) / "diagnosis")
    else:
        case = case_of_models(
            options.student,
            options.teacher,
            Prompts(**prompts),
            revisions=(options.student_revision, options.teacher_revision),
            template=options.teacher_prompt_template,
            chat=parse_json("--chat_template_kwargs", options.chat_template_kwargs),
            trust_remote_code=options.trust_remote_code,
        )
        names = (_short(options.student), _short(options.teacher))
        out = Path(options.out or Path("diagnoses") / "--".join(names))
    record = diagnose(case, out, Settings(accuracy=not options.skip_accuracy, **settings), progress=True)
    plot_diagnosis(record, out / "plots")
    recipe = write_recipe(record, out) if "recipe" in record else None
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        _show(record)
    print(f"Everything in {out}; plots in {out / 'plots'}", file=sys.stderr)
    if recipe is not None:
        print(f"Next: oprd plan --config {recipe}; oprd train --config {recipe}", file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> None:
    """One of the two forms, whole.

    Raises:
        ValueError: neither, both, or options that would be ignored.
    """
    if options.run is None:
        missing = [f"--{name}" for name in ("student", "teacher", "data") if getattr(options, name) is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} missing. Name --student, --teacher and --data, or a finished run: oprd diagnose RUN."
            )
        return
    ignored = [f"--{name}" for name in ("student", *OF_TWO_MODELS) if getattr(options, name) is not None]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} would be ignored: {options.run} is a run, which has its own.")
    read_manifest(Path(options.run))  # said at once if it is no run


def _short(name: str) -> str:
    """A name for a folder; a run's own stands before its ``final``."""
    from oprd.lineage.inputs import run_of_model

    path = Path(name)
    if path.is_dir():
        return "--".join(path.resolve().parts[-2 if run_of_model(name) else -1 :])
    return name.removeprefix("miniature:").replace("/", "--")


def _show(record: dict) -> None:
    from oprd.insight.diagnosis_view import layer_rows, position_rows, summary_rows

    written = record["answers"]
    print(
        f"{written['prompts']} answers of {written['written_by']}, {written['tokens']:,} tokens, "
        f"{written['cut_off']:.0%} cut off at {written['max_new_tokens']}"
    )
    for rows in (summary_rows(record), layer_rows(record), position_rows(record)):
        if rows:
            print()
            show_rows(rows, as_json=False)
    print()
    for one in record["advice"]:
        print(f"{one['topic']}: {one['say']}.\n    {one['why'][0].upper()}{one['why'][1:]}.")
