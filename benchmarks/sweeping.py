"""What the comparison tables share: runs that are swept over learning rates, repeated over seeds, scored and kept.

Each row is swept with seed 0 and judged on the 64 validation problems; its grid grows while the best point lies on an edge.
The best rate then runs with two more seeds, and all three are scored on the 256 test problems (k = 16, T = 0.7); the interval
is the mean half-width of their bootstrap over problems. Every result is appended to ``<out>/results.jsonl`` as it comes, so a
stopped table continues where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SEEDS = (0, 1, 2)
Key = tuple[str, float, int]  # row, learning rate, seed


@dataclass(frozen=True)
class Row:
    """One line of a table.

    ``settings`` go over the recipe. ``rates``: learning rates to sweep from; a single one is taken as it is. ``max_new_tokens``
    bounds answers when scoring. ``seeds``: those of the best rate. ``run``: what to do instead of one training run, from (key, directory, arguments) to the
    folder of the final model. ``patch``: called first in the row's own process.
    """

    settings: dict
    rates: tuple[float, ...] = (1e-3, 2e-3)
    recipe: str = "miniature"
    max_new_tokens: int = 44
    seeds: tuple[int, ...] = SEEDS
    run: Callable[[Key, Path, dict], Path] | None = None
    patch: Callable[[], None] | None = None


@dataclass(frozen=True)
class Table:
    """A set of rows, where their results are kept, and models that are scored as they are."""

    out: Path
    rows: dict[str, Row]
    untrained: dict[str, tuple[str, int]] = field(default_factory=dict)  # name -> path, max_new_tokens
    limits: tuple[float, float] = (6e-5, 2e-2)
    steps: int = 200
    batch: int = 32
    samples: int = 16  # answers to each problem that `score` draws
    recorded: Path | None = None  # results that are kept with the code; runs add to them
    validation: Callable[[], list[dict]] | None = None  # problems that choose rates; the miniature's by default
    tests: dict[str, Callable[[], list[dict]]] | None = None  # by name; the first is what seeds and intervals are of

    def results(self) -> dict[Key, dict]:
        """What has been run; a later line adds to an earlier one."""
        merged: dict[Key, dict] = {}
        for path in (self.recorded, self.out / "results.jsonl"):
            for line in path.read_text().splitlines() if path is not None and path.exists() else []:
                entry = json.loads(line)
                merged.setdefault((entry["row"], entry["lr"], entry["seed"]), {}).update(entry)
        return merged

    def keep(self, key: Key, **found: object) -> None:
        entry = dict(zip(("row", "lr", "seed"), key, strict=True)) | found
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        scores = [f"{name} {found[name]['avg_at_k']:.1f}" for name in ("validation", "test") if name in found]
        print(f"{key[0]} | lr {key[1]:g} seed {key[2]}: {', '.join(scores)}", flush=True)

    def directory_of(self, key: Key) -> Path:
        return self.out / "runs" / f"{key[0]}-{key[1]:g}-{key[2]}".replace(" ", "_").replace("'", "")

    def train(self, key: Key) -> float:
        """Train unless that has been done; Avg@16 on the validation problems."""
        if "validation" not in self.results().get(key, {}):
            row = self.rows[key[0]]
            arguments = {
                "max_steps": self.steps,
                "per_device_train_batch_size": self.batch,
                "disable_tqdm": "true",
                "learning_rate": key[1],
                "seed": key[2],
                **row.settings,
            }
            started = time.perf_counter()
            final = (row.run or one_run)(key, self.directory_of(key), {"config": row.recipe, **arguments})
            seconds = time.perf_counter() - started
            self.keep(
                key, seconds=seconds, final=str(final), validation=self.score(final, "validation", row.max_new_tokens)
            )
        return self.results()[key]["validation"]["avg_at_k"]

    def test(self, key: Key) -> None:
        """Score a trained student on the test problems, once."""
        found = self.results()[key]
        if "test" not in found:
            final = found.get("final", self.directory_of(key) / "final")
            self._test(key, final, self.rows[key[0]].max_new_tokens)

    def score(self, path: Path | str, which: str, max_new_tokens: int) -> dict:
        """A student on the ``validation`` problems, or on those of a test."""
        from oprd.miniature.task import held_out, validation

        sets = {"validation": self.validation or validation, **(self.tests or {"test": held_out})}
        return score(path, sets[which](), max_new_tokens)

    def _test(self, key: Key, path: Path | str, max_new_tokens: int) -> None:
        first, *others = self.tests or ["test"]
        more = {name: self.score(path, name, max_new_tokens)["avg_at_k"] for name in others}
        self.keep(key, test=self.score(path, first, max_new_tokens) | ({"others": more} if more else {}))

    def score_untrained(self) -> None:
        from oprd.models import resolve_path

        for name, (path, max_new_tokens) in self.untrained.items():
            if "test" not in self.results().get((name, 0.0, 0), {}):
                self._test((name, 0.0, 0), resolve_path(path), max_new_tokens)

    def one_row(self, name: str) -> None:
        """Sweep, then the other seeds."""
        import torch

        torch.set_num_threads(1)
        row = self.rows[name]
        if row.patch:
            row.patch()
        best = row.rates[0]
        if len(row.rates) > 1:
            grid: dict[float, float] = {}
            waiting = list(row.rates)
            while waiting:
                grid |= {lr: self.train((name, lr, 0)) for lr in waiting}
                best = max(grid, key=grid.get)
                edges = [lr for edge, lr in ((min(grid), best / 2), (max(grid), best * 2)) if edge == best]
                waiting = [lr for lr in edges if self.limits[0] <= lr <= self.limits[1]]
        for seed in row.seeds:
            self.train((name, best, seed))
            self.test((name, best, seed))

    def markdown(self) -> str:
        """One line a row, at the learning rate that validation chose."""
        k, others = self.samples, list(self.tests or {})[1:]
        columns = ["objective", "lr (tried)", f"Avg@{k}", "seeds", *others, f"Best@{k}", "Dist-4g", "length"]
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        done = self.results().values()
        for name in [*self.untrained, *self.rows]:
            own = [r for r in done if r["row"] == name]
            swept = {r["lr"]: r["validation"]["avg_at_k"] for r in own if r["seed"] == 0 and "validation" in r}
            best = max(swept, key=swept.get) if swept else 0.0
            tests = [r["test"] for r in sorted(own, key=lambda r: r["seed"]) if r["lr"] == best and "test" in r]
            if not tests:
                continue
            shared = [key for key in tests[0] if key != "others" and all(key in t for t in tests)]
            mean = {key: sum(t[key] for t in tests) / len(tests) for key in shared}
            of_others = "".join(f"{sum(t['others'][o] for t in tests) / len(tests):.1f} | " for o in others)
            half = sum(t["avg_high"] - t["avg_low"] for t in tests) / 2 / len(tests)
            rate = f"{best:g} ({len(swept)})" if swept else ""
            scores = ", ".join(f"{t['avg_at_k']:.1f}" for t in tests) if swept else ""
            dist = f"{mean['distinct_4']:.1f}" if "distinct_4" in mean else ""
            lines.append(
                f"| {name} | {rate} | {mean['avg_at_k']:.1f} ± {half:.1f} | {scores} | {of_others}{mean['best_at_k']:.1f} | "
                f"{dist} | "
                f"{mean['mean_length']:.1f} |"
            )
        return "\n".join(lines)


def flags(arguments: dict) -> list[str]:
    return [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]


def one_run(key: Key, directory: Path, arguments: dict) -> Path:
    """One training run; the folder of its final model."""
    from oprd.training.run import run

    return run(flags({**arguments, "output_dir": directory}))[0] / "final"


def score(path: Path | str, problems: list[dict], max_new_tokens: int) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.evaluation import distinct_n
    from oprd.evaluation.evaluate import evaluate

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, use_safetensors=True),
        AutoTokenizer.from_pretrained(path),
    )
    found = evaluate(model, tokenizer, problems, max_new_tokens=max_new_tokens, top_p=1.0, batch_size=512)
    # The task has no spaces: whitespace tokens would be whole answers. Its signs and results are the words.
    spaced = [[" ".join(text.replace("=", " = ").replace("+", " + ").replace("-", " - ").split()) for text in row]
              for row in found.responses]  # fmt: skip
    summary = found.summary()
    values = {name: summary[name]["value"] for name in ("avg_at_k", "best_at_k", "mean_length")}
    interval = {f"avg_{end}": summary["avg_at_k"][end] for end in ("low", "high")}
    return values | interval | {"distinct_4": distinct_n(spaced)} | {n: summary[n] for n in ("samples", "problems")}


def main(
    table: Table, worker: Callable[[str], None], description: str, before: Callable[[], None] | None = None
) -> None:
    """The command line of a table. ``worker`` is a function of the script's own, so that other processes can find it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows to run (default: all)")
    parser.add_argument("--print", action="store_true", help="print the table and stop")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="draw the curves into DIR and stop")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    if options.draw:
        draw(table, options.draw)
        return
    if not options.print:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        table.out.mkdir(parents=True, exist_ok=True)
        if before:
            before()
        table.score_untrained()
        rows = options.only or list(table.rows)
        with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(worker, rows):
                pass
    print(table.markdown())


def draw(table: Table, directory: Path) -> None:
    """Curves of every row, seed 0, each at its chosen rate."""
    from oprd.insight.plots import plot_runs
    from oprd.training.callbacks import read_metrics

    curves = {}
    results = table.results()
    for name in table.rows:
        swept = {r["lr"]: r["validation"]["avg_at_k"] for r in results.values() if r["row"] == name and r["seed"] == 0}
        path = table.directory_of((name, max(swept, key=swept.get), 0)) / "metrics.jsonl" if swept else None
        if path and path.exists():
            curves[name] = read_metrics(path)
    references = {r["row"]: r["test"]["avg_at_k"] / 100 for r in results.values() if r["row"] in table.untrained}
    plot_runs(curves, directory, references=references)
