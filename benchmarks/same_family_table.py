"""The same-family comparison of docs/results.md: every objective at its own best learning rate, three seeds.

    python benchmarks/same_family_table.py                 # run what is missing, then print the table
    python benchmarks/same_family_table.py --only "top-16" # some rows
    python benchmarks/same_family_table.py --print         # the table of what has been run

Each row is swept over learning rates with seed 0 and judged on the 64 validation problems; the grid grows while its best
point lies on an edge. The best rate then runs with two more seeds, and all three are scored on the 256 test problems
(Avg@16, T=0.7); the interval is the mean half-width of their bootstrap over problems. Every run has the same budget: 200 steps of 16 prompts x 2 responses, sampled by the student being
trained. Results are appended to runs/table/results.jsonl, so a stopped run continues where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

OUT = Path("runs/table")
STEPS, BATCH = 200, 32
GRID = [1e-3, 2e-3]
GRID_LIMITS = (6e-5, 2e-2)
SEEDS = (0, 1, 2)

OPD = {"representation_weight": 0, "logit_weight": 0, "lm_head": "keep"}
OPRD = {"representation_weight": 1, "logit_weight": 0, "output_loss": "none"}
ROWS: dict[str, dict] = {
    "OPRD, teacher's head": {**OPRD, "lm_head": "teacher"},
    "OPRD, own head": {**OPRD, "lm_head": "keep"},
    "OPD full KL": {**OPD, "output_loss": "full"},
    "OPD sampled token": {**OPD, "output_loss": "sampled"},
    "OPRD + head metric, own head": {"logit_weight": 1, "lm_head": "keep"},
    "OPD top-16": {**OPD, "output_loss": "top_k"},
    "OPRD + head metric, teacher's head": {"logit_weight": 1, "lm_head": "teacher"},
    "OPRD, teacher's head, last 16": {**OPRD, "lm_head": "teacher", "positions": "last_k", "position_k": 16},
    "OPRD + 0.1 x head metric, teacher's head": {"logit_weight": 0.1, "lm_head": "teacher"},
    "head metric alone, own head": {"representation_weight": 0, "logit_weight": 1, "lm_head": "keep"},
    "sampled token + 1 x OPRD, own head": {**OPRD, "output_loss": "sampled", "lm_head": "keep"},
    "sampled token + 10 x OPRD, own head": {
        **OPRD,
        "output_loss": "sampled",
        "lm_head": "keep",
        "representation_weight": 10,
    },
    "OPD top-16, teacher's head": {**OPD, "output_loss": "top_k", "lm_head": "teacher"},
    "full KL + OPRD, teacher's head": {**OPRD, "output_loss": "full", "lm_head": "teacher"},
}
RANDOM = {"teacher_model_name_or_path": str(OUT / "random-teacher")}
SELF = {"teacher_model_name_or_path": "miniature:student"}
# Controls have no best rate to look for; they run at their counterpart's usual one.
CONTROLS: dict[str, tuple[dict, float]] = {
    "control: no teacher (zero reward)": ({**OPD, "output_loss": "sampled", **SELF}, 1e-3),
    "control: random teacher, OPRD, own head": ({**OPRD, "lm_head": "keep", **RANDOM}, 2e-3),
    "control: random teacher, OPD top-16": ({**OPD, "output_loss": "top_k", **RANDOM}, 1e-3),
}


Key = tuple[str, float, int]  # row, learning rate, seed


def results() -> dict[Key, dict]:
    """What has been run; a later line adds to an earlier one."""
    path = OUT / "results.jsonl"
    merged: dict[Key, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        merged.setdefault((entry["row"], entry["lr"], entry["seed"]), {}).update(entry)
    return merged


def keep(key: Key, **found: object) -> None:
    entry = dict(zip(("row", "lr", "seed"), key, strict=True)) | found
    with (OUT / "results.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    scores = [f"{name} {found[name]['avg_at_k']:.1f}" for name in ("validation", "test") if name in found]
    print(f"{key[0]} | lr {key[1]:g} seed {key[2]}: {', '.join(scores)}", flush=True)


def directory_of(key: Key) -> Path:
    return OUT / "runs" / f"{key[0]}-{key[1]:g}-{key[2]}".replace(" ", "_").replace("'", "")


def score(path: Path | str, problems: list[dict]) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.evaluation.evaluate import evaluate
    from oprd.miniature.task import MAX_RESPONSE_TOKENS

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    return evaluate(model, tokenizer, problems, max_new_tokens=MAX_RESPONSE_TOKENS).summary()


def train(key: Key, overrides: dict) -> float:
    """Train unless that has been done; Avg@16 on the validation problems."""
    if "validation" not in results().get(key, {}):
        from oprd.miniature.task import validation
        from oprd.training.run import run

        arguments = {
            "output_dir": directory_of(key),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "disable_tqdm": "true",
            "learning_rate": key[1],
            "seed": key[2],
            **overrides,
        }
        started = time.perf_counter()
        run(
            [
                "--config",
                "miniature",
                *(str(part) for name, value in arguments.items() for part in (f"--{name}", value)),
            ]
        )
        keep(key, seconds=time.perf_counter() - started, validation=score(directory_of(key) / "final", validation()))
    return results()[key]["validation"]["avg_at_k"]


def test(key: Key) -> None:
    """Score a trained student on the test problems, once."""
    if "test" not in results()[key]:
        from oprd.miniature.task import held_out

        keep(key, test=score(directory_of(key) / "final", held_out()))


def untrained() -> None:
    """Teacher and student as they ship."""
    from oprd.miniature.task import held_out
    from oprd.models import resolve_path

    for name in ("teacher", "student"):
        if "test" not in results().get((name, 0.0, 0), {}):
            keep((name, 0.0, 0), test=score(resolve_path(f"miniature:{name}"), held_out()))


def one_row(row: str) -> None:
    """Sweep, then the other seeds."""
    import torch

    torch.set_num_threads(1)
    if row in CONTROLS:
        overrides, best = CONTROLS[row]
    else:
        overrides, grid = ROWS[row], {}
        waiting = list(GRID)
        while waiting:
            grid |= {lr: train((row, lr, 0), overrides) for lr in waiting}
            best = max(grid, key=grid.get)
            edges = [lr for edge, lr in ((min(grid), best / 2), (max(grid), best * 2)) if edge == best]
            waiting = [lr for lr in edges if GRID_LIMITS[0] <= lr <= GRID_LIMITS[1]]
    for seed in SEEDS:
        train((row, best, seed), overrides)
        test((row, best, seed))


def table() -> str:
    """Markdown, one line a row, at the learning rate that validation chose."""
    lines = [
        "| objective | lr (swept) | Avg@16 | seeds | Best@16 | length |",
        "|---|---|---|---|---|---|",
    ]
    done = results().values()
    for name in ("teacher", "student"):
        for r in (r for r in done if r["row"] == name):
            half = (r["test"]["avg_high"] - r["test"]["avg_low"]) / 2
            lines.append(
                f"| {name} | | {r['test']['avg_at_k']:.1f} ± {half:.1f} | | {r['test']['best_at_k']:.1f} | "
                f"{r['test']['mean_length']:.1f} |"
            )
    for row in [*ROWS, *CONTROLS]:
        own = [r for r in done if r["row"] == row and "validation" in r]
        swept = {r["lr"]: r["validation"]["avg_at_k"] for r in own if r["seed"] == 0}
        if not swept:
            continue
        best = max(swept, key=swept.get)
        runs = sorted((r for r in own if r["lr"] == best and "test" in r), key=lambda r: r["seed"])
        if not runs:
            continue
        mean = lambda f, runs=runs: sum(map(f, runs)) / len(runs)  # noqa: E731
        scores = ", ".join(f"{r['test']['avg_at_k']:.1f}" for r in runs)
        half = mean(lambda r: (r["test"]["avg_high"] - r["test"]["avg_low"]) / 2)
        lines.append(
            f"| {row} | {best:g} ({len(swept)}) | {mean(lambda r: r['test']['avg_at_k']):.1f} ± {half:.1f} | {scores} | "
            f"{mean(lambda r: r['test']['best_at_k']):.1f} | {mean(lambda r: r['test']['mean_length']):.1f} |"
        )
    return "\n".join(lines)


def draw(directory: Path) -> None:
    """Curves of a few rows, seed 0, each at its chosen rate."""
    from oprd.insight.plots import plot_runs
    from oprd.training.callbacks import read_metrics

    curves = {}
    for row in ("OPRD, teacher's head", "OPRD, own head", "OPD full KL", "OPD top-16", "OPD sampled token"):
        swept = {r["lr"]: r["validation"]["avg_at_k"] for r in results().values() if r["row"] == row and r["seed"] == 0}
        if swept:
            curves[row] = read_metrics(directory_of((row, max(swept, key=swept.get), 0)) / "metrics.jsonl")
    references = {
        r["row"]: r["test"]["avg_at_k"] / 100 for r in results().values() if r["row"] in ("teacher", "student")
    }
    plot_runs(curves, directory, references=references)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows to run (default: all)")
    parser.add_argument("--print", action="store_true", help="print the table and stop")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="draw the curves into DIR and stop")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    if options.draw:
        draw(options.draw)
        return
    if not options.print:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        OUT.mkdir(parents=True, exist_ok=True)
        if not (OUT / "random-teacher").exists():
            from oprd.miniature.rebuild import build_model
            from oprd.miniature.task import build_tokenizer

            tokenizer = build_tokenizer()
            build_model(tokenizer, seed=123).save_pretrained(OUT / "random-teacher")
            tokenizer.save_pretrained(OUT / "random-teacher")
        untrained()
        rows = options.only or [*ROWS, *CONTROLS]
        with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(one_row, rows):
                pass
    print(table())


if __name__ == "__main__":
    main()
