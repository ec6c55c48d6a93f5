"""DDP, FSDP2, ZeRO-2 and ZeRO-3 in several processes against one, on CPUs: the table of docs/scale.md.

    python benchmarks/engines.py [--processes 2 4] [--engines ddp fsdp2 zero2 zero3]

The runs of ``tests/equivalence/test_engines.py``; prints the largest relative difference of any loss over all cases and
steps. Exit status 1 above 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

MOST = 1e-4


def differences(one: dict, many: dict) -> float:
    """The largest relative difference of a loss, training or evaluation, over all cases in whole precision."""
    pairs = (
        (a, b)
        for case, keys in one.items()
        if "half precision" not in case
        for key, values in keys.items()
        if "loss" in key
        for a, b in zip(values, many[case][key], strict=True)
    )
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)


def main() -> int:
    """Run everything that was asked for; one row as soon as it is known."""
    path = Path(__file__).parents[1] / "tests" / "equivalence" / "test_engines.py"
    spec = importlib.util.spec_from_file_location("test_engines", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options.add_argument("--engines", nargs="+", choices=tests.ENGINES, default=list(tests.ENGINES))
    asked = options.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        one = tests.launch(Path(folder), "ddp", 1)
        print(f"| engine | processes | cases | largest difference | seconds |\n{'|---' * 5}|")
        for processes in asked.processes:
            for engine in asked.engines:
                started = time.monotonic()
                found = differences(one, tests.launch(Path(folder), engine, processes))
                worst = max(worst, found)
                seconds = time.monotonic() - started
                print(f"| {engine} | {processes} | {len(one)} | {found:.1e} | {seconds:.0f} |", flush=True)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
