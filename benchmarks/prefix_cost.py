"""What prefix marginals cost at real vocabulary sizes: a student of 150k tokens, a teacher of 200k.

    python benchmarks/prefix_cost.py                 # CPU
    python benchmarks/prefix_cost.py --device cuda

Vocabularies are made up (random byte strings, Zipf lengths, as many special tokens as chat models have); the text is random
tokens of the student. Reported: building the index, residues, and time and memory a position of the loss with gradient,
beside top-k and full-vocabulary KL between two heads of one vocabulary.
"""

from __future__ import annotations

import argparse
import random
import time
from types import SimpleNamespace

import torch

from oprd.objectives import full_vocab_kl, top_k_kl
from oprd.objectives.prefix_marginal import prefix_kl
from oprd.objectives.projection import rows_that_fit
from oprd.states import PrefixIndex


def vocabulary(size: int, shared: set[bytes], seed: int) -> SimpleNamespace:
    """Distinct byte strings; half of them from ``shared``. It has what `PrefixIndex` reads of a `Vocabulary`."""
    rng = random.Random(seed)
    letters = [chr(97 + i) for i in range(26)]
    tokens = {bytes([byte]) for byte in range(256)} | set(rng.sample(sorted(shared), min(len(shared), size // 2)))
    while len(tokens) < size - 8:
        length = 1 + min(int(rng.expovariate(1 / 4.5)), 14)
        word = "".join(rng.choices(letters, k=length))
        tokens.add(((" " if rng.random() < 0.5 else "") + word).encode())
    listed = [b""] * 8 + sorted(tokens, key=lambda t: (len(t), t))
    return SimpleNamespace(
        tokens=listed,
        size=len(listed),
        special=frozenset(range(8)),
        ids_by_bytes={t: i for i, t in enumerate(listed) if t},
        tokenizer=SimpleNamespace(eos_token_id=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--chunk", type=int, help="positions; by default what training takes")
    parser.add_argument("--student", type=int, default=150_000)
    parser.add_argument("--teacher", type=int, default=200_000)
    options = parser.parse_args()
    device = torch.device(options.device)
    chunk = options.chunk or rows_that_fit(4 * max(options.student, options.teacher), device)
    started = time.perf_counter()
    student = vocabulary(options.student, set(), 0)
    teacher = vocabulary(options.teacher, set(student.tokens) - {b""}, 1)
    print(f"made up {student.size:,} and {teacher.size:,} tokens in {time.perf_counter() - started:.1f} s")

    crossing = SimpleNamespace(
        student=student, teacher=teacher, meanings={0: 0}, student_ends={0}, teacher_ends={0}, teacher_end=0
    )
    started = time.perf_counter()
    index = PrefixIndex(crossing)
    index.entries(0)
    print(f"index, once a run: {time.perf_counter() - started:.2f} s")
    rng = random.Random(2)
    longer = [token for token in teacher.tokens if len(token) > 2]
    residues = [
        index.residue(token[: rng.randint(1, len(token) - 1)]) if rng.random() < 0.3 else 0
        for token in rng.choices(longer, k=options.positions)
    ]
    started = time.perf_counter()
    occurring, rows = torch.tensor(residues).unique(return_inverse=True)
    table = index.table(occurring.tolist(), device)
    print(f"table of {len(occurring)} residues, {len(table.keys_M):,} entries: {time.perf_counter() - started:.2f} s")
    tokens = torch.randint(8, student.size, (options.positions,), device=device)
    rows = rows.to(device)
    chain = torch.full((options.positions,), torch.nan, device=device)

    def timed(name: str, cost) -> None:
        def once() -> float:
            total = 0.0
            for start in range(0, options.positions, chunk):
                part = slice(start, start + chunk)
                size = len(tokens[part])
                own = torch.randn(size, student.size, device=device, requires_grad=True)
                other = torch.randn(size, teacher.size, device=device)
                wait()
                began = time.perf_counter()
                cost(own, other, part).sum().backward()
                wait()
                total += time.perf_counter() - began
            return total

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()

        once()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = once()
        memory = f", peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if device.type == "cuda" else ""
        print(f"{name}: {seconds / options.positions * 1e3:.3f} ms a position{memory}")

    for k in (16, 64):
        timed(
            f"prefix marginals, top {k}",
            lambda own, other, part, k=k: prefix_kl(own, other, tokens[part], rows[part], chain[part], table, k).cost,
        )
    timed("top 16, one vocabulary", lambda own, other, part: top_k_kl(own, other[:, : student.size], 16))
    timed("full KL, one vocabulary", lambda own, other, part: full_vocab_kl(own, other[:, : student.size]))


if __name__ == "__main__":
    main()
