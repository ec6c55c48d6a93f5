"""The update step of peers and of ours, on the same weights and the same stored rollouts.

    python -m benchmarks.update_step                                     # CPU, reduced shape
    python -m benchmarks.update_step --count                             # bytes of a 1.5B model at 16,384 tokens, on any machine
    python -m benchmarks.update_step --shape qwen2.5-1.5b --device cuda  # the full shape
    python -m benchmarks.update_step --phase loss                        # the loss alone, from given states
    python -m benchmarks.update_step --print results.jsonl

An update is the teacher's forward, the student's forward, the loss and backward, over a whole batch in micro-batches; no
generation, no optimiser. Each row runs in a process of its own. Rows are appended to ``--out`` as they come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="benchmarks.update_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", nargs="*", metavar="ROW", help="rows to run (default: all)")
    options.add_argument("--shape", default=None, help="default: small; with --count, qwen2.5-1.5b")
    options.add_argument("--phase", default="update", choices=("update", "loss", "end to end"))
    options.add_argument("--microbatch", type=int, nargs="*", default=[1], help="sequences, one or several sizes")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", help="default: the shape's")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--time-only", action="store_true", help="on a CPU, do not count memory")
    options.add_argument("--num-rollouts", type=int, help="default: the shape's")
    options.add_argument("--seed", type=int, default=0, help="of the rollouts")
    options.add_argument("--rollouts", type=Path, help="a file to read; default: made and kept beside --out")
    options.add_argument("--count", action="store_true", help="count bytes on fake tensors instead of running")
    options.add_argument("--columns", type=int, default=16_384, help="with --count: length of the sequence")
    options.add_argument("--supervised", type=int, default=2_000, help="with --count: response tokens at its end")
    options.add_argument("--out", type=Path, default=Path("runs/update_step/results.jsonl"))
    options.add_argument("--print", type=Path, metavar="JSONL", help="print the tables of a file and stop")
    options.add_argument("--row", help=argparse.SUPPRESS)  # one setting as JSON, measured in this process
    return options


def main() -> None:
    options = parser().parse_args()
    if options.row:
        one_row(json.loads(options.row))
        return
    from benchmarks.update_step.tables import tables

    if options.print:
        print(tables(read(options.print)))
        return
    rows = run_all(options)
    print(tables(rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_row(request: dict) -> None:
    """The child's work: one JSON line on its standard output, the last one."""
    from benchmarks.update_step.counting import count
    from benchmarks.update_step.measure import Setting, run

    counted = request.pop("count", None)
    setting = Setting(**request)
    print(json.dumps(run(setting) if counted is None else count(setting, **counted)))


def run_all(options: argparse.Namespace) -> list[dict]:
    from benchmarks.update_step.workload import SHAPES, make_rollouts, write_rollouts

    name = options.shape or ("qwen2.5-1.5b" if options.count else "small")
    if name not in SHAPES:
        raise SystemExit(f"--shape must be one of {', '.join(SHAPES)}, got {name}.")
    shape = SHAPES[name]
    unknown = set(options.only or ()) - set(method_names(name))
    if unknown:
        raise SystemExit(f"--only: no rows {', '.join(sorted(unknown))}; there are {', '.join(method_names(name))}.")
    if options.count:
        options.microbatch = [1]
    elif options.rollouts is None:
        number = options.num_rollouts or shape.rollouts
        options.rollouts = options.out.parent / f"rollouts-{name}-{number}-{options.seed}.json"
        rollouts = make_rollouts(shape, number, options.seed)
        write_rollouts(options.rollouts, rollouts, shape=name, seed=options.seed, scale=shape.scale)
    about = provenance()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for microbatch in options.microbatch:
        for method in options.only or method_names(name):
            request = {
                "method": method,
                "shape": name,
                "phase": options.phase,
                "microbatch": microbatch,
                "device": options.device,
                "dtype": options.dtype,
                "repeats": options.repeats,
                "time_only": options.time_only,
                "rollouts": None if options.count else str(options.rollouts.resolve()),
            }
            if options.count:
                request["count"] = {"columns": options.columns, "supervised": options.supervised}
            row = in_a_process(request) | about
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(summary(row), file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def method_names(shape: str) -> list[str]:
    from benchmarks.update_step.measure import methods
    from benchmarks.update_step.workload import SHAPES

    return list(methods(SHAPES[shape]))


def in_a_process(request: dict) -> dict:
    """A row from a process of its own, so that no allocator, import or compiled code of another row is there. A row that
    fails (out of memory, say) is kept with its last line of error."""
    command = [sys.executable, "-m", "benchmarks.update_step", "--row", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    row = {key: value for key, value in request.items() if key != "count"} | request.get("count", {})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return row | {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    return row | json.loads(done.stdout.splitlines()[-1])


def provenance() -> dict:
    """What a number in a document has to carry."""
    from importlib.metadata import PackageNotFoundError, version

    from oprd.lineage.machine import git_state, hardware, versions

    found = versions()
    with suppress(PackageNotFoundError):
        found["liger-kernel"] = version("liger-kernel")
    return {
        "command": " ".join(["python -m benchmarks.update_step", *sys.argv[1:]]),
        "code": git_state(ROOT),
        "hardware": hardware(),
        "versions": found,
    }


def summary(row: dict) -> str:
    for key in ("unavailable", "failed"):
        if key in row:
            return f"{row['method']}: {key}: {row[key]}"
    seconds = f"{row['seconds_median']:.2f} s, " if "seconds_median" in row else ""
    peak = "" if row["peak_bytes"] is None else f"peak {row['peak_bytes'] / 1e9:.3f} GB"
    return f"{row['method']}, micro-batch {row['microbatch']}: {seconds}{peak}"


if __name__ == "__main__":
    main()
