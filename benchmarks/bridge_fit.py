"""Fitting a bridge: the closed form against the published fit on the same states, and memory at real shapes.

    python benchmarks/bridge_fit.py compare            # miniature pair: loss, held-out loss, seconds, for every rank
    python benchmarks/bridge_fit.py shapes             # 36 layers x 2560 to 28 x 2048, synthetic states, CPU

The published fit is twenty epochs of AdamW (lr 1e-3) on P_S, for one rank at a time; it runs both models over the data in
every epoch. Here it gets the states from memory, so its seconds leave those forwards out.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from oprd.bridge import BridgeFitter
from oprd.bridge.collect import Collection
from oprd.objectives import map_layers


def published_fit(student, targets, rank: int, *, epochs: int = 20, lr: float = 1e-3, batch: int = 512) -> list:
    """P_S of every layer by AdamW on ``sum ||P_S h - y||^2``."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.nn.Parameter(torch.randn(rank, rows.shape[1], generator=generator) * rows.shape[1] ** -0.5)
        for rows in student
    ]
    optimizer = torch.optim.AdamW(maps, lr=lr)
    for _ in range(epochs):
        order = torch.randperm(len(student[0]), generator=generator)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            loss = sum(
                (own[rows] @ linear.T - y[rows]).pow(2).sum(-1).mean()
                for own, linear, y in zip(student, maps, targets, strict=True)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [linear.detach() for linear in maps]


def scores(student, targets, maps) -> tuple[float, float]:
    """Mean over layers of the summed squared error and of the cosine."""
    losses, cosines = [], []
    for own, y, linear in zip(student, targets, maps, strict=True):
        projected = own @ linear.T
        losses.append((projected - y).pow(2).sum(-1).mean())
        cosines.append(torch.cosine_similarity(projected, y, dim=-1).mean())
    return torch.stack(losses).mean().item(), torch.stack(cosines).mean().item()


def miniature_states(prompts: int, held_out: bool):
    """States of the miniature's student and wide teacher at the student's own responses: lists of ``[n, d]``."""
    from oprd.bridge.collect import _states
    from oprd.training.recipe import parse
    from oprd.training.run import _bridge_trainer, load_data

    configs = parse(["--config", "miniature-bridge", "--output_dir", "runs/bridge-fit"])
    trainer = _bridge_trainer(load_data(configs), configs[1], configs[2])
    start, depth = (len(trainer.train_dataset) - prompts if held_out else 0), 4
    layer_map = map_layers(depth, 6)
    parts = []
    torch.manual_seed(1 + held_out)
    for first in range(start, start + prompts, 64):
        rows = [trainer.train_dataset[i] for i in range(first, min(first + 64, start + prompts))]
        rollout = trainer.make_rollout(trainer._generate_and_score_completions(rows))
        parts.append(
            (
                _states(trainer.model, rollout.student, range(1, depth + 1), rollout.state_pairs, "student"),
                _states(trainer.teacher_model, rollout.teacher, layer_map, rollout.state_pairs, "teacher"),
            )
        )
    return [[torch.cat(layers) for layers in zip(*side, strict=True)] for side in zip(*parts, strict=True)]


def compare(prompts: int) -> None:
    student, teacher = miniature_states(prompts, held_out=False)
    student_new, teacher_new = miniature_states(prompts // 4, held_out=True)
    print(f"{len(student[0]):,} positions, {len(student_new[0]):,} held out\n")
    started = time.perf_counter()
    fitter = BridgeFitter(map_layers(4, 6), 64, 96)
    for start in range(0, len(student[0]), 4096):
        fitter.update(*([rows[start : start + 4096] for rows in side] for side in (student, teacher)))
    full = fitter.fit("full", intercept=False)
    closed = time.perf_counter() - started
    print("| rank | closed: loss | held out | cosine | AdamW: loss | held out | cosine | seconds |\n|" + "---|" * 8)
    for rank in (1, 2, 4, 8, 16, 32, 64):
        bridge = full.truncate(rank)
        targets, targets_new = (
            [bridge.project_teacher(layer, rows[layer - 1]) for layer in range(1, 5)] for rows in (teacher, teacher_new)
        )
        started = time.perf_counter()
        adam = published_fit(student, targets, rank)
        seconds = time.perf_counter() - started
        cells = []
        for maps in (list(bridge._tensors["student_map"]), adam):
            loss, new = scores(student, targets, maps), scores(student_new, targets_new, maps)
            cells.append(f"{loss[0]:.4f} | {new[0]:.4f} | {new[1]:.4f}")
        print(f"| {rank} | {cells[0]} | {cells[1]} | {seconds:.1f} |", flush=True)
    print(f"\nclosed form, all ranks at once, every forward pass of each model made once: {closed:.2f} s")


def shapes(rows: int, layers: int) -> None:
    layer_map = map_layers(28, 36)[:layers]
    started = time.perf_counter()
    collection = Collection(layer_map, 2048, 2560)
    fitters = [collection.fitter, *collection.controls.values()]
    for start in range(0, rows, 512):
        for fitter in fitters:  # every control too, as in a real fit
            depth = len(fitter.layer_map)
            student = [torch.randn(512, 2048) for _ in range(depth)]
            teacher = [torch.nn.functional.pad(own, (0, 512)) + torch.randn(512, 2560) for own in student]
            fitter.update(student, teacher, held_out=start == 0)
    summed = time.perf_counter() - started
    bridge = collection.fitter.fit("auto")
    solved = time.perf_counter() - started - summed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{bridge}\n{rows:,} rows: {summed:.0f} s to sum, {solved:.0f} s to solve; peak memory {peak:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "shapes"))
    parser.add_argument("--prompts", type=int, default=1024, help="miniature prompts for compare")
    parser.add_argument("--rows", type=int, default=4096, help="rows for shapes")
    parser.add_argument("--layers", type=int, default=28, help="layer pairs for shapes")
    options = parser.parse_args()
    compare(options.prompts) if options.what == "compare" else shapes(options.rows, options.layers)


if __name__ == "__main__":
    main()
