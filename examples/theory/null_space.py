"""What can next-token objectives not see? (Theorems 2, 7; docs/theory.md)

    python examples/theory/null_space.py                # a quarter of a minute of one CPU thread

Differences of last hidden states that a head cannot see, and how unequally it sees the others: in the head's null space, along
its singular directions, and from position to position.

What came out: heads with more tokens than dimensions have no null space; ``digit-student``'s (30 x 64) has 35 directions, in
which every output-space loss is 0, OPRD is not, and no output changes. Along the teacher's head OPRD over logit mse grows
259-fold, which is (s_1 / s_d)^2; over full KL 49-fold. Equal errors cost the median position 0.2 % of the mean KL.
"""

from __future__ import annotations

import torch
from rollouts import arguments, keep, load, new_figure, show, states, tokenizer, training_prompts, write
from torch import Tensor
from transformers import PreTrainedModel

from oprd.models import backbone_of, head_of
from oprd.objectives import (
    full_vocab_kl,
    head_grams,
    logit_mse,
    representation_distance,
    sampled_token,
    top_k_kl,
)
from oprd.states import Rollout

# ------------------------------------------------------------------------------------------------------ measurements


def centred(head_Vd: Tensor) -> Tensor:
    """The head without what all tokens share, which no softmax sees."""
    return head_Vd - head_Vd.mean(0)


def null_directions(head_Vd: Tensor) -> Tensor:
    """An orthonormal basis ``[K, d]`` of {dh: W dh proportional to 1}, up to float64's rounding; K is 0 for most heads."""
    _, values, directions = torch.linalg.svd(centred(head_Vd.double()), full_matrices=True)
    tolerance = values[0] * max(head_Vd.shape) * torch.finfo(torch.float64).eps
    return directions[int((values > tolerance).sum()) :]


def with_null_space(head_Vd: Tensor, count: int) -> Tensor:
    """The same head, blind in its ``count`` weakest directions: all tokens get one and the same logit from them."""
    basis = torch.linalg.svd(centred(head_Vd), full_matrices=True)[2][-count:]
    blind = centred(head_Vd) - centred(head_Vd) @ basis.T @ basis
    return blind + head_Vd.mean(0)


def losses(student_Nd: Tensor, teacher_Nd: Tensor, head_Vd: Tensor, tokens_N: Tensor) -> dict[str, Tensor]:
    """Every objective at every position, ``[N]``, under one head.

    The sampled token's is the mean square of its reward: the reward itself averages to the divergence, and what moves the
    weights is its size.
    """
    own_NV, goal_NV = student_Nd @ head_Vd.T, teacher_Nd @ head_Vd.T
    return {
        "sampled token": sampled_token(own_NV, goal_NV, tokens_N).square(),
        "top-16": top_k_kl(own_NV, goal_NV, 16),
        "full KL": full_vocab_kl(own_NV, goal_NV),
        "logit mse": logit_mse(student_Nd, teacher_Nd, head_grams(head_Vd, head_Vd)),
        "OPRD": representation_distance(student_Nd, teacher_Nd),
    }


def along(directions_Kd: Tensor, teacher_Nd: Tensor, head_Vd: Tensor, tokens_N: Tensor, size: float) -> list[dict]:
    """Mean loss of a student that is off by ``size`` along each direction, one row each."""
    rows = []
    for direction_d in directions_Kd:
        found = losses(teacher_Nd + size * direction_d, teacher_Nd, head_Vd, tokens_N)
        rows.append({name: values_N.mean().item() for name, values_N in found.items()})
    return rows


def spectrum(head_Vd: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values ``[d]`` of the centred head, falling, and their directions ``[d, d]`` in state space."""
    _, values, directions = torch.linalg.svd(centred(head_Vd), full_matrices=False)
    return values, directions


def energy(difference_Nd: Tensor, directions_Kd: Tensor) -> Tensor:
    """Mean square of the difference along each direction, ``[K]``."""
    return (difference_Nd @ directions_Kd.T).square().mean(0)


def by_certainty(teacher_Nd: Tensor, head_Vd: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Full KL at every position, ``[N]``, of a state that is off by ``size`` in a random direction."""
    noise_Nd = torch.randn(teacher_Nd.shape, generator=generator, dtype=teacher_Nd.dtype)
    off_Nd = teacher_Nd + size * noise_Nd / noise_Nd.norm(dim=-1, keepdim=True)
    return full_vocab_kl(off_Nd @ head_Vd.T, teacher_Nd @ head_Vd.T)


def head(model: PreTrainedModel) -> Tensor:
    """``[V, d]``, float64."""
    return head_of(model).weight_Vd.detach().double()


def heads_of(names: tuple[str, ...]) -> list[dict]:
    """Shapes, singular values and exact null directions of models' heads."""
    rows = []
    for name in names:
        weight_Vd = head(load(name))
        values_d, _ = spectrum(weight_Vd)
        shape = dict(zip(("V", "d"), weight_Vd.shape, strict=True))
        ends = {"largest": values_d[0].item(), "smallest": values_d[-1].item()}
        rows.append({"head of": name, **shape, **ends, "null directions": len(null_directions(weight_Vd))})
    return rows


def text_of(name: str, answers: int, length: int) -> tuple[Rollout, PreTrainedModel]:
    """A text that a model wrote, and the model in float64."""
    tok = tokenizer(name)
    return write(load(name), tok, training_prompts(tok)[:answers], seed=0, length=length), load(name, torch.float64)


@torch.no_grad()
def in_a_null_space(answers: int) -> dict[str, float]:
    """``digit-student`` has fewer tokens than dimensions: a difference as large as its states' own spread, in the null space."""
    rollout, model = text_of("digit-student", answers, length=56)
    states_Nd, weight_Vd = states(model, rollout)[-1], head(model)
    basis_Kd = null_directions(weight_Vd)
    around_Nd = states_Nd - states_Nd.mean(0)
    off_Nd = states_Nd + around_Nd.std() * torch.randn(len(states_Nd), len(basis_Kd), dtype=torch.float64) @ basis_Kd
    found = losses(off_Nd, states_Nd, weight_Vd, rollout.output_tokens_N)
    change = (off_Nd @ weight_Vd.T).log_softmax(-1) - (states_Nd @ weight_Vd.T).log_softmax(-1)
    return {
        **{name: values_N.mean().item() for name, values_N in found.items()},
        "largest change of a log p": change.abs().max().item(),
        "own variance there": (energy(around_Nd, basis_Kd).sum() / around_Nd.square().sum(-1).mean()).item(),
    }


@torch.no_grad()
def under_a_full_head(answers: int) -> dict:
    """The teacher's head has no null space: how unequal are its directions, and what do student and teacher differ by?"""
    rollout, student = text_of("student", answers, length=44)
    teacher = load("teacher", torch.float64)
    own_Nd, goal_Nd, weight_Vd = states(student, rollout)[-1], states(teacher, rollout)[-1], head(teacher)
    values_d, directions_dd = spectrum(weight_Vd)
    found = along(directions_dd, goal_Nd, weight_Vd, rollout.output_tokens_N, size=1e-3)
    names = [name for name in found[0] if name != "OPRD"]
    rows = [
        {
            "direction": place + 1,
            "(s_1/s_i)^2": (values_d[0] / values_d[place]).square().item(),
            **{name: row["OPRD"] / row[name] * found[0][name] / found[0]["OPRD"] for name in names},
        }
        for place, row in enumerate(found)
    ]
    seen_d = energy(own_Nd - goal_Nd, directions_dd)
    kl_N = by_certainty(goal_Nd, weight_Vd, 1e-3, torch.Generator().manual_seed(0))
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    norm = backbone_of(student).norm
    return {
        "directions": rows,
        "states": (seen_d / seen_d.sum()).tolist(),
        "logits": (seen_d * values_d.square() / (seen_d * values_d.square()).sum()).tolist(),
        "KL of equal errors, 10 / 50 / 90 % of positions over the mean": (kl_N.quantile(shares) / kl_N.mean()).tolist(),
        "OPRD of a doubled state before the final norm": representation_distance(norm(6 * own_Nd), norm(3 * own_Nd))
        .mean()
        .item(),
    }


# -------------------------------------------------------------------------------------------------------------- show


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    answers = 4 if args.quick else 128
    heads = heads_of(("student", "teacher", "wide-teacher", "digit-student"))
    exact, full = in_a_null_space(answers), under_a_full_head(answers)
    rows, half = full["directions"], len(full["directions"]) // 2
    show("LM heads, centred over the vocabulary", heads)
    show("a difference inside the null space of digit-student's head", [exact])
    few = [rows[place] for place in (0, 7, 15, 31, 47, 62, 63)]
    show("OPRD over each loss along the directions of the teacher's head, first one = 1", few)
    rest = {name: value for name, value in full.items() if not isinstance(value, list)}
    rest |= {f"weaker half of the directions: share in {name}": sum(full[name][half:]) for name in ("states", "logits")}
    name = "KL of equal errors, 10 / 50 / 90 % of positions over the mean"
    show("student and teacher", [rest | {name: " / ".join(f"{value:.2g}" for value in full[name])}])

    figure, (left, right) = new_figure(2)
    index = [row["direction"] for row in rows]
    expected = [row["(s_1/s_i)^2"] for row in rows]
    left.semilogy(index, expected, color="0.75", linewidth=5, label=r"$(\sigma_1/\sigma_i)^2$")
    for name in ("logit mse", "full KL", "sampled token"):
        left.semilogy(index, [row[name] for row in rows], label=name)
    left.set(title="OPRD loss over each loss", xlabel="singular direction of the head", ylabel="relative to the first")
    for name in ("states", "logits"):
        right.plot(index, torch.tensor(full[name]).cumsum(0), label=name)
    right.set(title="where student and teacher differ", xlabel="first directions", ylabel="share of squared difference")
    keep(args.out, "null-space", {"heads": heads, "null space": exact, **full}, figure)


if __name__ == "__main__":
    main()
