"""Kill runs of the miniature at random and at chosen moments, repeat the command, and hold what comes out against a run that
was left alone: weights by hash, ``metrics.jsonl`` line by line (without times).

python benchmarks/kill_test.py                        # some 40 kills; one JSON line
python benchmarks/kill_test.py --recipes packed --random 1 --terminate 1
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SMALL = {"max_steps": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 5}
SMALL |= {"max_completion_length": 40, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": "true"}
SCORED = {"validation_benchmark": "miniature:validation.jsonl", "test_benchmarks": "miniature:test.jsonl"}
SCORED |= {"benchmark_steps": 4, "benchmark_limit": 4, "benchmark_samples": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_name": "{eval}", "per_device_eval_batch_size": 8}
BRIDGED = {"dataset_name": "{some}", "bridge_prompts": 32, "max_steps": 6, "save_steps": 3, "seed": 1}
RECIPES = {
    # Two responses a prompt, accumulation with buffered generation, evaluation, benchmarks, the best checkpoint at the end.
    "plain": ("miniature", SMALL | SCORED | EVALUATED | {"load_best_model_at_end": "true", "save_total_limit": 2}),
    # 20 prompts: four epochs, whose ends fall between checkpoints; packed micro-batches; an odd rhythm.
    "packed": ("miniature", SMALL | {"dataset_name": "{few}", "max_tokens_per_microbatch": 128, "save_steps": 5}),
    # A bridge, a solved LM head, a second stage.
    "bridge": ("miniature-bridge", SMALL | SCORED | BRIDGED),
}
# By recipe, in the order in which one run dies of them: the place in the code, which call of it since the command was last
# repeated, and whether before or after it. All but the first few go on from a checkpoint.
STEP, PUBLISH = (
    "oprd.training.checkpoints:CheckpointedTrainer._maybe_log_save_evaluate",
    "oprd.training.checkpoints:publish",
)
ROLLOUT = "oprd.training.trainer:OPRDTrainer._generate_and_score_completions"
PHASES = {
    "plain": {
        "first scores": ("oprd.training.validation:write_evaluation", 1, "before"),
        "scores: half written": ("oprd.evaluation.evaluate:write_text", 1, "after"),
        "best: before its link": ("oprd.training.validation:save_final", 1, "after"),
        "rollout": (ROLLOUT, 1, "before"),
        "update": (STEP, 2, "before"),
        "evaluation": ("oprd.training.checkpoints:CheckpointedTrainer.prediction_step", 2, "after"),
        "checkpoint: half written": ("oprd.training.checkpoints:save_tree", 2, "after"),
        "checkpoint: before its name": (PUBLISH, 1, "before"),
        "checkpoint: named": (PUBLISH, 1, "after"),
        "metrics: half a line": ("oprd.training.callbacks:json.dumps", 3, "half"),
        "scores: drawing": ("oprd.training.validation:_Watched.generate", 1, "after"),
        "rollout, resumed": (ROLLOUT, 2, "after"),
        "checkpoint, resumed: half written": ("oprd.training.checkpoints:save_tree", 3, "after"),
        "checkpoint: the last": (PUBLISH, 5, "after"),
        "final: before its name": ("oprd.training.run:save_final", 1, "inside"),
        "final: before the record": ("oprd.training.run:write_card", 1, "before"),
    },
    "packed": {
        "rollout, packed": (ROLLOUT, 3, "after"),
        "checkpoint, third epoch": (PUBLISH, 1, "after"),
        "update, fourth epoch": (STEP, 4, "before"),
        "checkpoint, packed: the last": (PUBLISH, 2, "before"),
    },
    "bridge": {
        "bridge: collecting": ("oprd.training.bridging:_add_in_pieces", 3, "before"),
        "bridge: sums saved": ("oprd.bridge.collect:save_file", 1, "after"),
        "bridge: solving": ("oprd.training.bridging:solve_collection", 1, "before"),
        "bridge: half written": ("oprd.bridge.bridge:_write", 1, "after"),
        "update, bridge": (STEP, 5, "before"),
        "solving the head": ("oprd.training.run:solve_head", 1, "after"),
        "between the stages": ("oprd.training.run:_close", 1, "after"),
        "second stage": (STEP, 4, "before"),
        "second stage: final": ("oprd.training.run:save_final", 1, "inside"),
    },
}
TIMES = re.compile(r"(eval_)?(time/.*|step_time|tokens_per_second|train_runtime|runtime|.*_per_second)")
CONTINUES = 20  # attempts after which a run that does not finish is given up


def die() -> None:
    """As the kernel would end everything of this run."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def plant(place: str, call: int, when: str) -> None:
    """Have this process die at the given call of a function."""
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    honest, calls = getattr(owner, name), [0]

    def deadly(*given, **named):
        calls[0] += 1
        if calls[0] != call:
            return honest(*given, **named)
        if when == "before":
            die()
        if when == "half":  # the caller writes what it gets, and the next thing that it does is to die
            text = honest(*given, **named)
            plant("os:fsync", 1, "before")
            return text[: len(text) // 2]
        if when == "inside":
            plant("oprd.training.saving:publish", 1, "before")
        answer = honest(*given, **named)
        die()
        return answer

    setattr(owner, name, deadly)


def child(arguments: list[str]) -> int:
    """The command itself, with a death planted in it."""
    place, call, when, *rest = arguments
    plant(place, int(call), when)
    from oprd.cli import main

    return main(rest)


class Course:
    """Runs of one recipe in a scratch folder."""

    def __init__(self, recipe: str, scratch: Path) -> None:
        base, settings = RECIPES[recipe]
        self.scratch, self._count = scratch / recipe, 0
        named = {"eval": scratch / "eval.jsonl", "few": scratch / "few.jsonl", "some": scratch / "some.jsonl"}
        self._settings = {key: str(value).format(**named) for key, value in settings.items()}
        self._base = base
        started = time.monotonic()
        self.whole = self.fresh()
        status, told = self.attempt(self.whole)
        if status != 0:
            raise RuntimeError(told)
        self.seconds = time.monotonic() - started
        self.expected = outcome(self.whole)

    def fresh(self) -> Path:
        self._count += 1
        return self.scratch / f"run-{self._count}"

    def attempt(self, run: Path, *, death: tuple | None = None, after: float | None = None, by=signal.SIGKILL):
        """Start the command; kill it in a place of the code, or after some seconds. Its exit status and what it said."""
        flags = [part for key, value in self._settings.items() for part in (f"--{key}", value)]
        command = ["train", "--config", self._base, "--output_dir", str(run), *flags]
        start = [sys.executable, "-m", "oprd"]
        if death is not None:
            start = [sys.executable, __file__, "--child", death[0], str(death[1]), death[2]]
        process = subprocess.Popen(
            [*start, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, told = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, by)
            _, told = process.communicate()
        return process.returncode, told

    def finish(self, run: Path) -> int:
        """The same command until the run is there; how often."""
        for number in range(1, CONTINUES + 1):
            status, told = self.attempt(run)
            if status == 0 or "holds a finished run" in told:
                return number
            if status >= 0:
                raise RuntimeError(f"{run.name} does not continue: {told[-2000:]}")
        raise RuntimeError(f"{run.name} does not finish.")

    def differences(self, run: Path) -> list[str]:
        """What is not as in the run that was left alone."""
        found = outcome(run)
        for name in found:
            if name.endswith("checkpoints"):  # SIGTERM leaves one more
                found[name] = [one for one in found[name] if one in self.expected.get(name, [])]
        return [name for name in {**self.expected, **found} if self.expected.get(name) != found.get(name)]


def outcome(run: Path) -> dict[str, object]:
    """What must be equal: weights, logs, the best student, and that nothing half-way is left."""
    from oprd.lineage.hashing import folder_hashes
    from oprd.training.callbacks import read_metrics

    found: dict[str, object] = {}
    for stage in (run, run / "then"):
        if not stage.is_dir():
            continue
        where = stage.name if stage != run else "run"
        found[f"{where}: final"] = folder_hashes(stage / "final")
        rows = read_metrics(stage / "metrics.jsonl")
        found[f"{where}: metrics"] = [{k: v for k, v in row.items() if not TIMES.fullmatch(k)} for row in rows]
        found[f"{where}: checkpoints"] = sorted(path.name for path in stage.glob("checkpoint-*"))
        found[f"{where}: best"] = os.readlink(stage / "best") if (stage / "best").exists() else None
        half = [
            path.name for path in stage.rglob("*") if path.name.startswith((".saving-", ".replaced-", "collected-"))
        ]
        found[f"{where}: left over"] = half
        found[f"{where}: status"] = json.loads((stage / "manifest.json").read_text())["status"]
    return found


def write_data(scratch: Path) -> None:
    from oprd.models import resolve_path

    lines = Path(resolve_path("miniature:train.jsonl")).read_text().splitlines(keepends=True)
    (scratch / "few.jsonl").write_text("".join(lines[:20]))
    (scratch / "some.jsonl").write_text("".join(lines[:64]))
    (scratch / "eval.jsonl").write_text("".join(lines[-16:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--random", type=int, default=4, help="SIGKILLs of a recipe at random moments")
    parser.add_argument("--terminate", type=int, default=2, help="SIGTERMs of a recipe at random moments")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, started = random.Random(options.seed), time.monotonic()
    kills, restarts, missed, differing = Counter(), 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_data(scratch)
        courses = {recipe: Course(recipe, scratch) for recipe in options.recipes}
        for recipe, course in courses.items():
            for signum, times in ((signal.SIGKILL, options.random), (signal.SIGTERM, options.terminate)):
                run, name = course.fresh(), f"{recipe}: {signum.name} at random"
                for number in range(times):
                    restarts += number > 0
                    status, told = course.attempt(run, after=chance.uniform(0, course.seconds), by=signum)
                    if status > 0 and "holds a finished run" not in told:
                        raise RuntimeError(told[-2000:])
                    if status < 0 or (signum == signal.SIGTERM and "stopped by SIGTERM" in told):
                        kills[name] += 1
                    print(f"{name}: {status}", file=sys.stderr)
                    if (run / "final").exists():  # it was done before the moment came
                        restarts += course.finish(run)
                        differing += [f"{name}: {what}" for what in course.differences(run)]
                        run = course.fresh()
                restarts += course.finish(run)
                differing += [f"{name}: {what}" for what in course.differences(run)]
        for recipe, course in courses.items():
            run = course.fresh()
            for phase, death in PHASES[recipe].items():
                status, told = course.attempt(run, death=death)
                print(f"{recipe}, {phase}: {status}", file=sys.stderr)
                if status == -signal.SIGKILL:
                    kills[phase] += 1
                else:
                    missed.append(f"{phase}: {status}, {told[-300:]}")
            restarts += len(PHASES[recipe]) - 1 + course.finish(run)
            differing += [f"{recipe}, phases: {what}" for what in course.differences(run)]
        seconds = {recipe: round(course.seconds, 1) for recipe, course in courses.items()}
    result = {
        "kills": sum(kills.values()),
        "by_phase": dict(kills),
        "restarts": restarts,
        "identical": not differing,
        "differing": differing,
        "missed": missed,
        "seconds_undisturbed": seconds,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))
    return 0 if not differing and not missed else 1


if __name__ == "__main__":
    sys.exit(child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
