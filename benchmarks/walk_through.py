"""What a newcomer does, from a fresh clone to a student in a registry, timed step by step.

Everything happens in a temporary folder, with the commands of docs/start.md. The table goes to stdout.

    OMP_NUM_THREADS=1 python benchmarks/walk_through.py
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIR = "--student miniature:student --teacher miniature:teacher --data miniature:train.jsonl"
BASELINE = "--representation_weight 0 --output_loss top_k --lm_head keep --learning_rate 5e-4"
GATES = "accuracy: {min: 60, max_drop: 1}\nlength: {max_increase_percent: 10}\n"
STEPS = {
    "clone": f"git clone --quiet {ROOT} oprd",
    "install": "make --silent install",
    "every command": "oprd --help",
    "recipes that ship": "oprd recipes",
    "start a recipe": "oprd show miniature > my.yaml",
    "look at the pair": f"oprd diagnose {PAIR}",
    "does it fit": "oprd plan --config my.yaml --gpu_memory 24",
    "train": "oprd train --config my.yaml --output_dir runs/first",
    "train a baseline": f"oprd train --config my.yaml --output_dir runs/baseline {BASELINE}",
    "evaluate": "oprd eval runs/first --of teacher student final --on miniature:test.jsonl",
    "evaluate the baseline": "oprd eval runs/baseline --on miniature:test.jsonl",
    "compare": "oprd compare runs/baseline runs/first",
    "what the run changed": "oprd diagnose runs/first",
    "gate": "oprd gate runs/first --against runs/baseline --config gates.yaml",
    "promote": "oprd registry promote registry runs/first",
    "repeat it from its record": "oprd train --from runs/first --output_dir runs/again",
    "the same, bit for bit": "cmp runs/first/final/model.safetensors runs/again/final/model.safetensors",
    "build the documentation": "make --silent docs",
}


def main() -> int:
    """Run the steps in order, stop at the first that fails, print how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder to work in, which stays (default: a temporary one)")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        return walk(options.keep.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return walk(Path(folder))


def walk(folder: Path) -> int:
    """All steps in a folder."""
    environment = os.environ | {"PATH": f"{folder / 'oprd' / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    print("| step | command | seconds |\n|---|---|---|", flush=True)
    total = 0.0
    for name, command in STEPS.items():
        where = folder if name == "clone" else folder / "oprd"
        if name == "gate":
            (where / "gates.yaml").write_text(GATES)
        words, _, saved = command.partition(" > ")
        started = time.perf_counter()
        done = subprocess.run(shlex.split(words), cwd=where, env=environment, capture_output=True, text=True)
        if saved:
            (where / saved).write_text(done.stdout)
        seconds = time.perf_counter() - started
        total += seconds
        shown = command.replace(str(ROOT), "URL").replace("|", "\\|")
        print(f"| {name} | `{shown}` | {seconds:.1f} |", flush=True)
        if done.returncode:
            print(f"{name} failed:\n{done.stdout}\n{done.stderr}", file=sys.stderr)
            return 1
    print(f"| all of it | | {total:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
