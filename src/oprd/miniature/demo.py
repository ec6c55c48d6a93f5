"""``oprd demo``: the miniature distilled with OPRD and with OPD top-16, on one budget, side by side."""

from __future__ import annotations

import sys
import time
from importlib.resources import files
from pathlib import Path

from oprd.miniature.task import MAX_RESPONSE_TOKENS, held_out

# Each at the best learning rate of docs/results.md.
METHODS: dict[str, dict[str, object]] = {
    "OPRD": {"learning_rate": 2e-3},
    "OPD top-16": {
        "learning_rate": 5e-4,
        "representation_weight": 0,
        "logit_weight": 0,
        "output_loss": "top_k",
        "lm_head": "keep",
    },
}
SAMPLES = 16


def rebuild_assets() -> None:
    """Train student and teacher again from the fixed seed, over the files in the package."""
    from oprd.miniature.rebuild import rebuild

    rebuild(Path(str(files("oprd"))) / "miniature" / "assets", announce=_say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _evaluate(name: str, path: str) -> dict[str, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.evaluation.evaluate import evaluate

    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    result = evaluate(
        model, tokenizer, held_out(), samples=SAMPLES, max_new_tokens=MAX_RESPONSE_TOKENS, progress=f"evaluating {name}"
    ).summary()
    return {
        "model": name,
        f"Avg@{SAMPLES}": round(result["avg_at_k"], 1),
        "95 % interval": f"{result['avg_low']:.1f} to {result['avg_high']:.1f}",
        f"Best@{SAMPLES}": round(result["best_at_k"], 1),
        "mean length": round(result["mean_length"], 1),
    }


def run_demo(out: str, *, steps: int | None = None, seed: int = 0) -> list[dict[str, object]]:
    """Evaluate teacher and student, distil with each method, evaluate again, draw the plots; one row per model."""
    from transformers.utils import logging as transformers_logging

    from oprd.insight.plots import plot_runs
    from oprd.models import resolve_path
    from oprd.training.callbacks import read_metrics
    from oprd.training.run import run

    transformers_logging.disable_progress_bar()
    root = Path(out)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    _say(
        "A student and a teacher of one origin solve chained sums (37+4-9+2=?). Each method gets the same budget; the\n"
        f"student writes the answers it learns from. {len(held_out())} held-out problems, {SAMPLES} samples each, T=0.7."
    )
    rows = [_evaluate(name, resolve_path(f"miniature:{name}")) | {"seconds": None} for name in ("teacher", "student")]
    curves = {}
    for name, settings in METHODS.items():
        directory = root / stamp / name.lower().replace(" ", "-")
        settings = {
            **settings,
            "output_dir": directory,
            "seed": seed,
            **({"max_steps": steps} if steps is not None else {}),
        }
        arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        started = time.perf_counter()
        run(["--config", "miniature", *arguments], description=name)
        seconds = time.perf_counter() - started
        rows.append(_evaluate(name, str(directory / "final")) | {"seconds": round(seconds)})
        curves[name] = read_metrics(directory / "metrics.jsonl")
    references = {f"{row['model']} (T=0.7)": row[f"Avg@{SAMPLES}"] / 100 for row in rows[:2]}
    plot_runs(curves, root / "plots", references=references)
    return rows
