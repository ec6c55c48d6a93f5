"""Rows as Markdown tables: each as it is, and over TRL's trainer and naive top-16 under the same setting. Times compared are
the fastest of each; on a CPU those of the processor, which other work disturbs less than the clock's."""

from __future__ import annotations

from itertools import groupby

BASES = ("TRL", "naive top-16")
TITLES = {"loss": "The loss alone", "update": "The update step", "end to end": "End to end, generation included"}


def tables(rows: list[dict]) -> str:
    """One table a setting. A later row replaces an earlier one of its name."""
    latest = {(*setting_of(row), row["method"]): row for row in rows}
    parts = []
    for setting, group in groupby(sorted(latest.values(), key=setting_of), key=setting_of):
        members = sorted(group, key=lambda row: list(latest).index((*setting, row["method"])))
        parts.append(table(members))
    return "\n\n".join(parts)


def setting_of(row: dict) -> tuple:
    """What has to agree for rows to be compared."""
    phase = list(TITLES).index(row["phase"])
    return (
        phase,
        row["shape"],
        row["device"],
        row["microbatch"],
        row.get("columns", 0),
        row.get("supervised", 0),
        row.get("rollouts") or "",
    )


def table(rows: list[dict]) -> str:
    first = rows[0]
    counted = any("columns" in row for row in rows)
    title = f"{TITLES[first['phase']]}: {first['shape']}"
    if counted:
        measured = next(row for row in rows if "columns" in row)
        title += (
            f", bytes counted, one sequence of {measured['columns']:,} with {measured['supervised']:,} response tokens"
        )
    else:
        title += f", {first['device']}, micro-batches of {first['microbatch']}"
    by_name = {row["method"]: row for row in rows}
    times = [] if counted else ["s", "s (median)", *(f"time / {base}" for base in BASES), "tokens/s", "tokens read"]
    if first["phase"] == "end to end":
        times += ["s with generation"]
    head = ["", *times, "peak GB", *(f"peak / {base}" for base in BASES)]
    lines = [f"**{title}**", "", row_of(head), row_of(["---"] * len(head))]
    for row in rows:
        reason = row.get("unavailable") or row.get("failed")
        if reason:
            word = "not available" if "unavailable" in row else "failed"
            lines.append(row_of([row["method"], f"{word}: {reason}", *[""] * (len(head) - 2)]))
            continue
        cells = [row["method"]]
        if not counted:
            clock = "processor_seconds_min" if row["device"] == "cpu" else "seconds_min"
            cells += [f"{row[clock]:.2f}", f"{row['seconds_median']:.2f}"]
            cells += [ratio(row, by_name.get(base), clock) for base in BASES]
            cells += [f"{row['response_tokens'] / row[clock]:,.0f}", f"{row['read_tokens']:,}"]
        if first["phase"] == "end to end":
            generation = row.get("generation_seconds")
            cells += ["n/a" if generation is None else f"{generation + row['seconds_median']:.2f}"]
        cells += ["n/a" if row["peak_bytes"] is None else amount(row["peak_bytes"])]
        cells += [ratio(row, by_name.get(base), "peak_bytes") for base in BASES]
        lines.append(row_of(cells))
    return "\n".join(lines)


def row_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def amount(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e9 else f"{size / 1e9:.4f}"


def ratio(row: dict, base: dict | None, key: str) -> str:
    return f"{row[key] / base[key]:.2f}" if base is not None and base.get(key) and row[key] is not None else "n/a"
