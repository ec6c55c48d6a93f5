"""What a run says about itself: its manifest at the start, and whether a repetition came out the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger

from oprd.lineage.inputs import model_record, run_of_model
from oprd.lineage.manifest import Manifest, differing_inputs, read_manifest
from oprd.training.recipe import Configs
from oprd.training.starting import Start
from oprd.training.teacher import teacher_record

logger = get_logger(__name__)

IN_CHECKPOINT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")  # and won by it


@dataclass(frozen=True)
class Call:
    """How a run was asked for: the command, the manifest of the run that it repeats, words for the progress bar."""

    command: list[str]
    before: dict[str, Any] | None = None
    description: str = "distilling"


def start_manifest(
    configs: Configs, settings: dict[str, Any], data_records: dict[str, Any], call: Call, start: Start
) -> Manifest:
    """The run's manifest: what it is, by content. Reads every file of both models once.

    Raises:
        ValueError: a model, the bridge or the data is not what it was in the run that this one repeats.
    """
    _, args, model, _, _ = configs
    before, folder = call.before, None if args.bridge in (None, "auto") else args.bridge
    parent = run_of_model(model.model_name_or_path)
    student = model_record(model.model_name_or_path, model.model_revision)
    identity: dict[str, Any] = {
        "command": call.command,
        "directory": str(Path.cwd()),
        "config": settings,
        "student": student,
        "teacher": teacher_record(args, student),
        "bridge": model_record(folder) if folder and Path(folder).is_dir() else None,
        "data": data_records,
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "parent": None,
        "repeats": None,
    }
    if parent is not None:
        identity["parent"] = {"run": str(parent), "final": (read_manifest(parent)["final"] or {}).get("hash")}
    if before is not None:
        identity["repeats"] = {name: before[name] for name in ("run", "created", "final")}
        differing = differing_inputs(before, identity)
        if differing:
            raise ValueError(f"{before['run']} cannot be repeated, its inputs have changed: {'; '.join(differing)}.")
    processes, run = PartialState().num_processes, Path(args.output_dir)
    # Without a checkpoint nothing hangs on what an earlier attempt read; with the same inputs it belongs to the run's cost.
    resumed = start.checkpoint is not None or (start.goes_on and not differing_inputs(read_manifest(run), identity))
    manifest = Manifest.start(run, identity=identity, processes=processes, resumed=resumed)
    changed = manifest.content["sessions"][-1].get("changed_settings", {})
    kept = [name for name in IN_CHECKPOINT if name in changed]
    if kept:
        raise ValueError(
            f"{', '.join(kept)} would be ignored: the checkpoint's optimiser goes on with what it had "
            f"({changed[kept[0]][0]} for {kept[0]}). Resume with that, or start a new run from its last checkpoint."
        )
    if changed:
        logger.info(f"Resumed with other settings: {', '.join(f'{k} {a} -> {b}' for k, (a, b) in changed.items())}.")
    return manifest


def say_whether_identical(content: dict[str, Any], before: dict[str, Any]) -> None:
    """Whether the repetition came out the same, bit for bit; if not, what was different about it."""
    if before["final"] is None:
        logger.warning(f"{before['run']} never finished, so there is nothing to compare the result with.")
        return
    if before["final"]["hash"] == content["final"]["hash"]:
        logger.info(f"final/ is bit-identical to that of {before['run']}.")
        return
    one, other = before["sessions"][-1], content["sessions"][-1]
    reasons = [
        f"{key}: {before['config'].get(key)} then"
        for key, value in content["config"].items()
        if key != "output_dir" and before["config"].get(key) != value
    ]
    reasons += [
        f"{k} {one['versions'].get(k)} then" for k, v in other["versions"].items() if one["versions"].get(k) != v
    ]
    reasons += [f"{k}: {one['hardware'][k]} then" for k, v in other["hardware"].items() if one["hardware"][k] != v]
    told = f" ({'; '.join(reasons)})" if reasons else ""
    logger.warning(
        f"final/ differs from that of {before['run']}{told}. Only CPU runs with the same versions repeat exactly."
    )
