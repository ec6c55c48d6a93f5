"""``oprd train``: distil a teacher into a student from a recipe."""

from __future__ import annotations

from oprd.commands.launching import LAUNCH_HELP, launch
from oprd.commands.shared import check_recipe_named, describe_settings, show_events, show_rows
from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, DATA_HELP, HELP, THEN_HELP

TRAIN_NOTES = """\
The student is model_name_or_path, the teacher teacher_model_name_or_path. Every key of trl.DistillationConfig,
transformers.TrainingArguments and trl.ModelConfig works too (learning_rate, max_steps, max_completion_length, use_vllm,
use_peft, lora_r, ...). Keys on the command line win over the recipe; an unknown key is an error. Without output_dir a run goes
to runs/NAME. Where trackio is installed and report_to is not set, numbers go to its dashboard on this machine too.

several processes:  oprd train --config recipe.yaml --accelerate_config fsdp2 --num_processes 8
            or:     accelerate launch -m oprd train --config recipe.yaml
"""


def train_help() -> str:
    """What ``oprd train --help`` prints."""
    usage = (
        "usage: oprd train --config RECIPE [--key value ...] [--json]\n"
        "       oprd train --from RUN [--key value ...]\n\nDistil a teacher into a student from a recipe."
    )
    recipe = (
        "RECIPE is a YAML file, or the name of one that ships with oprd (oprd train --config miniature). --from repeats a run\n"
        "from its manifest.json, after a check that models and data are what they were; on CPU with the same versions the\n"
        "result is the same bit for bit."
    )
    defaults = "oprd show RECIPE --resolved prints every key with the value that it would have, those of TRL and transformers too."
    tables = [
        describe_settings("objective", HELP),
        describe_settings("data", DATA_HELP),
        describe_settings("bridge: auto", BRIDGE_HELP),
        describe_settings("benchmarks during training", BENCHMARK_HELP),
        describe_settings("second stage", {"then": THEN_HELP}),
        describe_settings("several processes (command line only)", LAUNCH_HELP),
    ]
    return "\n\n".join([usage, recipe, TRAIN_NOTES.strip(), defaults, *tables])


def run_train(arguments: list[str]) -> int:
    """Run; the keys are the recipe parser's."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(train_help())
        return 0 if arguments else 2
    check_recipe_named(arguments)
    status = launch(["train"], arguments)
    if status is not None:
        return status
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    show_events()
    from oprd.durability.stopping import Stopped
    from oprd.insight.plots import plot_runs
    from oprd.insight.report import write_report
    from oprd.insight.tables import run_summary
    from oprd.training.callbacks import read_metrics
    from oprd.training.run import run

    try:
        directory, is_main = run(arguments)
    except Stopped as stopped:  # it has said so
        return stopped.code
    if is_main:
        metrics = read_metrics(directory / "metrics.jsonl")
        plot_runs({directory.name: metrics}, directory / "plots")
        places = {"final": directory / "final", "plots": directory / "plots", "report": write_report(directory)}
        summary = run_summary(metrics) | {name: str(path) for name, path in places.items()}
        show_rows([summary], as_json)
    return 0
