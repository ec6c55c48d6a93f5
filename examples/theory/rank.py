"""Which rank should a bridge have? (Theorems 3, 9, 10; docs/theory.md)

    python examples/theory/rank.py                      # a quarter of a minute of one CPU thread

error(r) = sum_{i>r} lambda_i rho_i^2 + sum_{i<=r} lambda_i (1 - rho_i^2), on made-up spectra and on the miniature's student and its
wider teacher; beside it the accuracy that training through a bridge of rank r ended with (benchmarks/recorded).

What came out: where rho falls with i there is one valley, where it does not there are many. In real states rho rises at four
steps in ten, the valleys are shallow, and the best rank is 21. Accuracy is highest at full rank, and below the start's at every rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rollouts import arguments, keep, load, new_figure, show, states, tokenizer, training_prompts, write
from torch import Tensor

from oprd.bridge import BridgeFitter
from oprd.bridge.moments import Moments
from oprd.models import text_config
from oprd.objectives import map_layers

RECORDED = Path(__file__).parents[2] / "benchmarks" / "recorded" / "bridge-origin.jsonl"


# ------------------------------------------------------------------------------------------------------ measurements


def error_curve(variance_R: Tensor, rho2_R: Tensor) -> Tensor:
    """Theorem 3's error(r) for r = 0..R: predictable variance that is left out and unpredictable variance that is taken in."""
    out = torch.cat([(variance_R * rho2_R).flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=variance_R.dtype)])
    taken_in = torch.cat([torch.zeros(1, dtype=variance_R.dtype), (variance_R * (1 - rho2_R)).cumsum(0)])
    return out + taken_in


def bump(curve: Tensor) -> float:
    """How far a curve is from quasi-convex: the height of its highest point above a lower one on either side; 0 if it is."""
    before = curve - curve.cummin(0).values
    after = curve - curve.flip(0).cummin(0).values.flip(0)
    return torch.minimum(before, after).max().item()


def valleys(curve: Tensor) -> list[int]:
    """Ranks (from 0) of the local minima."""
    steps = torch.cat([torch.tensor([-1.0]), curve.diff().sign(), torch.tensor([1.0])])
    return [r for r in range(len(curve)) if steps[r] < 0 <= steps[r + 1]]


def kept_by(basis_rd: Tensor, covariance_dd: Tensor) -> float:
    """Share of variance that an encoder with these orthonormal rows keeps: PCA's is the largest (Theorem 9)."""
    return (((basis_rd @ covariance_dd) * basis_rd).sum() / covariance_dd.trace()).item()


def predictable(moments: Moments, ridge: float = 1e-8) -> Tensor:
    """Variance of the teacher that a linear map of rank r from the student can predict at most, ``[R]`` for r = 1..R.

    Reduced-rank regression: eigenvalues of ``C_TS C_SS^-1 C_ST``, the covariance of the best linear prediction.
    """
    gram = moments.student_gram(centred=True)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    cross = moments.cross_covariance()
    return torch.linalg.eigvalsh(cross.T @ torch.linalg.solve(gram, cross)).flip(0).clamp(min=0).cumsum(0)


def synthetic(rho2_R: Tensor, variance_R: Tensor, rows: int, seed: int = 0) -> BridgeFitter:
    """A teacher whose i-th direction has variance lambda_i, and a student that knows rho_i^2 of each; fitted as one layer."""
    generator = torch.Generator().manual_seed(seed)
    size = len(rho2_R)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    known, unknown = torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    teacher = ((rho2_R.sqrt() * known + (1 - rho2_R).sqrt() * unknown) * variance_R.sqrt()) @ rotation
    fitter = BridgeFitter([1], size, size)
    fitter.update([known], [teacher])
    return fitter


def curves_of(fitter: BridgeFitter) -> list[dict[str, Tensor]]:
    """Of each layer, in shares of the teacher's variance: lambda_i and held-out rho_i^2 of the directions, error(r) for r from 0,
    and, for r from 1, what the first r principal directions and what any r directions can be predicted of (on the fit's rows)."""
    highest, layers = min(fitter.dims), []
    for place, solution in enumerate(fitter.solutions(ridge=1e-8, intercept=True)):
        share_R = (solution.variance / solution.variance.sum())[:highest]
        rho2_R = solution.r_squared((fitter.held_out or fitter.train)[place])[:highest].clamp(0, 1)
        own_R = solution.r_squared(fitter.train[place])[:highest]
        layers.append(
            {
                "variance": share_R,
                "rho2": rho2_R,
                "error": error_curve(share_R, rho2_R),
                "principal": (share_R * own_R).cumsum(0),
                "any": predictable(fitter.train[place])[:highest] / solution.variance.sum(),
            }
        )
    return layers


def collected(prompts: int) -> BridgeFitter:
    """States of the miniature's student and of its deeper and wider teacher on the student's answers; one answer in ten held out."""
    tok, student, teacher = tokenizer(), load("student"), load("wide-teacher")
    depths, widths = (
        [getattr(text_config(m), name) for m in (student, teacher)] for name in ("num_hidden_layers", "hidden_size")
    )
    fitter = BridgeFitter(map_layers(*depths), *widths)
    asked = training_prompts(tok)[:prompts]
    for start in range(0, prompts, 64):
        rollout = write(student, tok, asked[start : start + 64], seed=start)
        with torch.no_grad():
            own, goal = states(student, rollout), states(teacher, rollout, fitter.layer_map)
        is_held_out = rollout.state_pairs.row_N % 10 == 9
        for rows, held_out in ((~is_held_out, False), (is_held_out, True)):
            fitter.update([layer[rows] for layer in own], [layer[rows] for layer in goal], held_out=held_out)
    return fitter


def recorded_accuracy(path: Path = RECORDED) -> dict[int, float]:
    """Avg@16 on the test problems after training through a bridge of each rank (docs/results.md; the student's own head)."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["row"].removeprefix("bridge, rank ")
        if row["row"].startswith("bridge, rank ") and name != "auto" and "test" in row:
            found[64 if name == "full" else int(name)] = row["test"]["avg_at_k"]
    return dict(sorted(found.items()))


# -------------------------------------------------------------------------------------------------------------- show


SHAPES = {  # rho_i^2 of 32 directions
    "rho falls": torch.linspace(0.98, 0.02, 32, dtype=torch.float64),
    "rho does not fall": torch.tensor([0.9, 0.2, 0.85, 0.2] * 4 + [0.9, 0.1] * 8, dtype=torch.float64),
}


def main() -> None:
    args = arguments(__doc__)
    rows = 2_000 if args.quick else 50_000
    variance_R = 0.9 ** torch.arange(32, dtype=torch.float64)
    curves = {name: curves_of(synthetic(rho2_R, variance_R, rows))[0] for name, rho2_R in SHAPES.items()}
    fitter = collected(40 if args.quick else 512)
    layers = curves_of(fitter)
    curves |= {f"layer {place}": layer for place, layer in enumerate(layers, 1)}
    mean = torch.stack([layer["error"] for layer in layers]).mean(0)
    accuracy = recorded_accuracy()

    table = []
    for name, found in [*curves.items(), ("mean of layers", {"error": mean})]:
        error = found["error"]
        table.append(
            {
                "data": name,
                "best rank": int(error.argmin()),
                "its error": error.min().item(),
                "error at full rank": error[-1].item(),
                "local minima": len(valleys(error)),
                "bump": bump(error),
                "rho rises at": int((found["rho2"].diff() > 0).sum()) if "rho2" in found else None,
                "principal / any, r = 8": (found["principal"][7] / found["any"][7]).item() if "any" in found else None,
            }
        )
    show("error(r) of Theorem 3", table)
    show(
        "mean error(r) of the layers, and accuracy after training at rank r",
        [{"rank": r, "error(r)": mean[r].item(), "Avg@16": accuracy[r]} for r in accuracy],
    )
    figure, (left, middle, right) = new_figure(3)
    for name in SHAPES:
        left.plot(curves[name]["error"] / curves[name]["error"][0], label=name)
    left.set(title="made-up spectra", xlabel="rank", ylabel="error(r), relative to rank 0")
    for place, layer in enumerate(layers, 1):
        middle.plot(range(1, len(layer["rho2"]) + 1), layer["rho2"], linewidth=0.9, label=f"layer {place}")
    middle.axhline(0.5, color="0.5", linewidth=0.8)
    middle.set(title=r"$\rho_i^2$ of real models", xlabel="direction i")
    right.plot(mean, color="C0", label="error(r), mean of layers")
    right.axvline(int(mean.argmin()), color="C0", linewidth=0.8, linestyle=":")
    right.set(title="the theorem's rank and accuracy", xlabel="rank", ylim=(0, None))
    right.plot(
        accuracy.keys(),
        [value / 100 for value in accuracy.values()],
        "-o",
        markersize=3.5,
        color="C1",
        label="accuracy",
    )
    numbers = {name: {key: values.tolist() for key, values in found.items()} for name, found in curves.items()}
    keep(
        args.out, "rank", {"table": table, "accuracy": accuracy, "mean error": mean.tolist(), "curves": numbers}, figure
    )


if __name__ == "__main__":
    main()
