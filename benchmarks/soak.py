"""A long run with every option on that goes with the others: do memory, file handles, threads and the disk stay flat?

    python benchmarks/soak.py [--steps 2000] [--variants alone served]

``alone``: packed, tiled and checkpointed micro-batches of hidden states, the head metric and top-16 at once, with the teacher
and the targets parked in main memory, graded responses, evaluation, benchmarks, checkpoints. ``served``: a bridge to a teacher
of another shape that ``oprd serve-teacher`` holds; the service is watched too. One JSON line each; exit status 1 if
something grew.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import psutil
import yaml

SECONDS = 2.0  # between two looks
GROWTH = 1.03  # of the median of a run's last fifth over that of its second fifth
SHARED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 40,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-4,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "disable_tqdm": "true",
    "on_nonfinite": "skip",
}
VARIANTS = {
    "alone": (
        "miniature",
        {
            "logit_weight": 0.1,
            "output_loss": "top_k",
            "output_weight": 0.1,
            "max_tokens_per_microbatch": 160,
            "gradient_checkpointing": "true",
            "tile_mlp": "true",
            "offload_targets": "true",
            "offload_teacher": "true",
            "eval_strategy": "steps",
            "eval_steps": 50,
            "eval_dataset_name": "{eval}",
            "per_device_eval_batch_size": 8,
            "validation_benchmark": "miniature:validation.jsonl",
            "test_benchmarks": "miniature:test.jsonl",
            "benchmark_steps": 100,
            "benchmark_limit": 8,
            "benchmark_samples": 2,
            "load_best_model_at_end": "true",
        },
    ),
    "served": (
        "miniature-bridge",
        {
            "bridge_prompts": 64,
            "max_tokens_per_microbatch": 160,
            "lm_head": "solved",
        },
    ),
}


def look(process: psutil.Process) -> dict[str, float]:
    """Resident bytes, handles and threads of a process and its children."""
    family = [process, *process.children(recursive=True)]
    looks = []
    for member in family:
        try:
            with member.oneshot():
                looks.append((member.memory_info().rss, member.num_fds(), member.num_threads()))
        except psutil.NoSuchProcess:
            continue
    return dict(zip(("bytes", "handles", "threads"), map(sum, zip(*looks, strict=True)), strict=True)) if looks else {}


def fifths(samples: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Medians of the second and of the last fifth: the first one is start-up."""
    values, size = [sample[name] for sample in samples], len(samples) // 5
    return statistics.median(values[size : 2 * size]), statistics.median(values[-size:])


def serve(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen, str]:
    """A service with the wide teacher, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "oprd", "serve-teacher", "--model", "miniature:wide-teacher", "--port", str(port)]
    with (folder / "service.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log), f"http://127.0.0.1:{port}"


def soak(name: str, steps: int) -> dict:
    """One run, watched."""
    recipe, settings = VARIANTS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        from oprd.models import resolve_path

        rows = Path(resolve_path("miniature:validation.jsonl")).read_text().splitlines()[:16]
        (folder / "eval.jsonl").write_text("\n".join(rows) + "\n")
        settings = SHARED | settings | {"max_steps": steps, "output_dir": str(folder / "run")}
        service, file = None, folder / "recipe.yaml"
        content = yaml.safe_load((files("oprd") / "recipes" / f"{recipe}.yaml").read_text())
        if name == "served":
            content = {
                key: value for key, value in content.items() if key not in ("teacher_model_name_or_path", "then")
            }
            environment["OPRD_TEACHER_TOKEN"] = "soak" * 16
            service, settings["teacher_url"] = serve(folder, environment)
        file.write_text(yaml.safe_dump(content))
        given = [f"--{key}={str(value).format(eval=folder / 'eval.jsonl')}" for key, value in settings.items()]
        command = [sys.executable, "-m", "oprd", "train", "--config", str(file), *given]
        started, samples, of_service = time.monotonic(), [], []
        with (folder / "log").open("w") as log:
            run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            while run.poll() is None:
                time.sleep(SECONDS)
                log_file = folder / "run" / "metrics.jsonl"
                if log_file.exists() and log_file.stat().st_size and (seen := look(psutil.Process(run.pid))):
                    samples.append(seen)
                    if service is not None:
                        of_service.append(look(psutil.Process(service.pid)))
        if service is not None:
            service.terminate()
            service.wait(60)
        if run.returncode:
            raise SystemExit((folder / "log").read_text()[-3000:])
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        disk = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    found = {"variant": name, "steps": metrics[-1]["step"], "hours": round((time.monotonic() - started) / 3600, 3)}
    grown = []
    for owner, series in (("", samples), ("service ", of_service)):
        if not series:
            continue
        for measure, unit in (("bytes", 1e6), ("handles", 1), ("threads", 1)):
            early, late = fifths(series, measure)
            found[f"{owner}{'MB' if measure == 'bytes' else measure}"] = [round(early / unit, 1), round(late / unit, 1)]
            if late > max(early * GROWTH, early + (2 if unit == 1 else 0)):
                grown.append(f"{owner}{measure}")
    losses = [row["loss"] for row in metrics if "loss" in row]
    return found | {
        "looks": len(samples),
        "disk MB": round(disk / 1e6, 1),
        "loss": [round(statistics.mean(part), 4) for part in (losses[:10], losses[-10:])],
        "grown": grown,
    }


def main() -> int:
    """Run the variants that were asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    asked = options.parse_args()
    status = 0
    for name in asked.variants:
        found = soak(name, asked.steps)
        print(json.dumps(found), flush=True)
        status |= bool(found["grown"])
    return status


if __name__ == "__main__":
    sys.exit(main())
