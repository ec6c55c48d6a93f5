"""How noisy is the gradient of each objective? (Theorems 1, 4-6; docs/theory.md)

    python examples/theory/gradient_noise.py            # under three minutes of one CPU thread

Signal to noise, in power, of the gradient of all weights: given the text, where only the sampled token is left to chance, and
over texts, where every objective has noise. The student walks to the teacher in a straight line, and in two distillation runs.

What came out: given the text the sampled token's gradient has 0.86 at the start (full KL, top-16, OPRD: no noise). It does not
fall linearly with the divergence: its power is 0.3 on the line, 0.6 in a run of OPRD, 2.1 in a run of full KL; the *value's* is 0.9
to 1.1. Over texts 6.5 for OPRD, 1.7 for full KL and 0.3 for the sampled token at the start; at its own optimum OPRD's is 0.3 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from rollouts import arguments, keep, load, logits, new_figure, show, states, tokenizer, training_prompts, write
from torch import Tensor
from transformers import PreTrainedModel

from oprd.models import adopt_head
from oprd.objectives import full_vocab_kl, representation_distance, sampled_token, top_k_kl
from oprd.states import Rollout

METHODS = ("sampled token", "top-16", "full KL", "OPRD")
RATES = {"full KL": 1e-3, "OPRD": 2e-3}  # of the runs; the best ones of docs/results.md, give or take a factor of 2


# ------------------------------------------------------------------------------------------------------ measurements


class Comparison:
    """Student and teacher on one text: a forward of each, and every objective as a scalar on the student's graph."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, rollout: Rollout) -> None:
        self.parameters = list(student.parameters())
        with torch.no_grad():
            self.goal_LNd = states(teacher, rollout)
            self.goal_NV = logits(teacher, self.goal_LNd[-1])
        self.own_LNd = states(student, rollout)
        self.own_NV = logits(student, self.own_LNd[-1])
        self.tokens_N, self.weights_N = rollout.output_tokens_N, rollout.output_weights_N.to(self.own_NV.dtype)

    def loss(self, method: str, tokens_N: Tensor | None = None) -> Tensor:
        """Eq. 3 to 6 over all positions and layers; ``tokens_N`` in place of the text's own for the sampled token."""
        if method == "sampled token":
            values_N = sampled_token(self.own_NV, self.goal_NV, self.tokens_N if tokens_N is None else tokens_N)
        elif method == "top-16":
            values_N = top_k_kl(self.own_NV, self.goal_NV, 16)
        elif method == "full KL":
            values_N = full_vocab_kl(self.own_NV, self.goal_NV)
        else:
            pairs = zip(self.own_LNd, self.goal_LNd, strict=True)
            values_N = torch.stack([representation_distance(own, goal) for own, goal in pairs]).mean(0)
        return (self.weights_N * values_N).sum()

    def gradient(self, method: str, tokens_N: Tensor | None = None) -> Tensor:
        """Of all weights, as one vector."""
        return self._pull_back(self.loss(method, tokens_N))

    def _pull_back(self, output: Tensor, cotangent: Tensor | None = None) -> Tensor:
        found = torch.autograd.grad(output, self.parameters, cotangent, retain_graph=True, allow_unused=True)
        pairs = zip(self.parameters, found, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])

    def of_the_gradient(self, draws: int, generator: torch.Generator) -> dict[str, float]:
        """What is left to chance for the sampled token once the text before it is fixed: signal ``|E g|^2`` and noise
        ``tr Cov(g)``, over the token y_n ~ p_n that is drawn anew at every position.

        With ``c = log p - log q`` and J_n the Jacobian of the logits, a position's gradient is ``w_n c(y) J_n'(e_y - p)``.
        Its mean is full KL's, so the signal is known. Positions are independent, so the noise is a sum over them:

            sum_n w_n^2 ( E_y |c(y) J_n'(e_y - p)|^2 - |J_n' m_n|^2 ),     m_n = p (c - KL_n)

        Either sum is one backward with a random sign at each position, which makes cross terms vanish in the mean; tokens are
        drawn where ``p c^2 |e_y - p|^2`` lies and weighted back. Drawing from p would miss the rare tokens that carry the noise.
        """
        p_NV, ratio_NV, mean_N = self._ratio()
        size_NV = (1 - 2 * p_NV + p_NV.square().sum(-1, keepdim=True)).clamp(min=1e-6)  # |e_y - p|^2, above rounding
        chance_NV = p_NV * ratio_NV.square() * size_NV
        noise = []
        for _ in range(draws):
            sign_N = torch.randint(0, 2, mean_N.shape, generator=generator) * 2 - 1
            y_N = chance_NV.clamp(min=1e-30).multinomial(1, generator=generator)
            back_N = (chance_NV.sum(-1, keepdim=True) / size_NV.gather(-1, y_N)).sqrt().squeeze(-1)
            one_NV = torch.zeros_like(p_NV).scatter_(-1, y_N, 1.0)
            second_NV = (sign_N * self.weights_N * back_N).unsqueeze(-1) * (one_NV - p_NV)
            mean_NV = (sign_N * self.weights_N).unsqueeze(-1) * p_NV * (ratio_NV - mean_N.unsqueeze(-1))
            squares = [self._pull_back(self.own_NV, part).square().sum() for part in (second_NV, mean_NV)]
            noise.append(squares[0] - squares[1])
        return {
            "signal": self.gradient("full KL").square().sum().item(),
            "noise": torch.stack(noise).mean().item(),
        }

    def of_the_value(self) -> dict[str, float]:
        """The same for the *value* ``log p(y) - log q(y)``, whose mean is the divergence. Tokens are enumerated."""
        p_NV, ratio_NV, mean_N = self._ratio()
        variance_N = (p_NV * ratio_NV.square()).sum(-1) - mean_N.square()
        return {
            "signal": (self.weights_N * mean_N).sum().square().item(),
            "noise": (self.weights_N.square() * variance_N).sum().item(),
        }

    def _ratio(self) -> tuple[Tensor, Tensor, Tensor]:
        log_p, log_q = self.own_NV.detach().log_softmax(-1), self.goal_NV.log_softmax(-1)
        return log_p.exp(), log_p - log_q, full_vocab_kl(self.own_NV.detach(), self.goal_NV).to(log_p.dtype)


def over_texts(gradients_KP: Tensor) -> dict[str, float]:
    """Signal ``|E g|^2`` and noise ``tr Cov(g)`` from K independent gradients, both without bias."""
    mean_P = gradients_KP.mean(0)
    noise = (gradients_KP - mean_P).square().sum() / (len(gradients_KP) - 1)
    return {"signal": (mean_P.square().sum() - noise / len(gradients_KP)).item(), "noise": noise.item()}


def ratio(parts: list[dict[str, float]]) -> float:
    """Signal to noise, in power, of several measurements together."""
    return sum(part["signal"] for part in parts) / sum(part["noise"] for part in parts)


def between(start: PreTrainedModel, end: PreTrainedModel, share: float) -> PreTrainedModel:
    """The weights ``(1 - share) start + share end``."""
    mixed = deepcopy(start)
    with torch.no_grad():
        for own, a, b in zip(mixed.parameters(), start.parameters(), end.parameters(), strict=True):
            own.copy_(torch.lerp(a, b, share))
    return mixed


def slope(x: Iterable[float], y: Iterable[float]) -> float | None:
    """Of the least-squares line through log y against log x: the power of x that y follows. None if some y is not positive."""
    points = [*zip(x, y, strict=True)]
    if min(b for _, b in points) <= 0:
        return None
    logs = torch.tensor([(math.log(a), math.log(b)) for a, b in points], dtype=torch.float64)
    centred = logs - logs.mean(0)
    return (centred.prod(1).sum() / centred[:, 0].square().sum()).item()


class Lab:
    """Prompts, sizes and seeds: a text is ``size`` answers, and a measurement takes ``texts`` of them."""

    def __init__(self, quick: bool) -> None:
        self.size, self.texts, self.draws, self.length = (4, 2, 1, 12) if quick else (32, 6, 2, 44)
        self.tok = tokenizer()
        self.prompts = training_prompts(self.tok)

    def compare(self, student: PreTrainedModel, teacher: PreTrainedModel, number: int) -> Comparison:
        """On a fresh text of the student's; the number is prompts and seed."""
        start = number * self.size % (len(self.prompts) - self.size)
        asked = self.prompts[start : start + self.size]
        return Comparison(student, teacher, write(student, self.tok, asked, number, self.length))

    def measure(self, student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, float]:
        """Losses, and signal to noise in power: given the text (of the value, of the gradient), and over texts."""
        generator = torch.Generator().manual_seed(0)
        gradients: dict[str, list[Tensor]] = {method: [] for method in METHODS}
        compared = []
        for number in range(self.texts):
            here = self.compare(student, teacher, 10_000 + number)
            for method in METHODS:
                gradients[method].append(here.gradient(method))
            losses = {"KL": here.loss("full KL").item(), "OPRD": here.loss("OPRD").item()}
            compared.append((losses, here.of_the_value(), here.of_the_gradient(self.draws, generator)))
        losses, value, gradient = zip(*compared, strict=True)
        found = {method: over_texts(torch.stack(vectors)) for method, vectors in gradients.items()}
        found["sampled token"]["signal"] = found["full KL"][
            "signal"
        ]  # one mean, and this estimate of it is the better one
        return {
            **{name: sum(part[name] for part in losses) / self.texts for name in ("KL", "OPRD")},
            "given the text: value": ratio(value),
            "given the text: gradient": ratio(gradient),
            **{f"over texts: {method}": ratio([parts]) for method, parts in found.items()},
        }

    def distil(
        self, student: PreTrainedModel, teacher: PreTrainedModel, method: str, stops: list[int]
    ) -> Iterator[tuple[int, PreTrainedModel]]:
        """Train, and yield the student at every one of ``stops``."""
        optimizer = torch.optim.AdamW(student.parameters(), lr=RATES[method], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stops[-1])
        for step in range(stops[-1] + 1):
            if step in stops:
                yield step, student
            loss = self.compare(student, teacher, step).loss(method)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def run(quick: bool) -> dict[str, list[dict[str, float]]]:
    """Measurements along three paths: a straight line in weights to the teacher, and two distillation runs."""
    lab, teacher = Lab(quick), load("teacher")
    shares = (0.9,) if quick else (0.5, 0.9, 0.97, 0.99)
    stops = [1] if quick else [20, 40, 80]
    start = load("student")
    adopt_head(start, teacher, len(lab.tok))  # as `lm_head: auto` does: either objective can then reach the teacher
    first = {"at": 0, **lab.measure(start, teacher)}
    line = [{"at": share, **lab.measure(between(start, teacher, share), teacher)} for share in shares]
    paths = {"straight line": [first, *line]}
    for method in RATES:
        visited = lab.distil(deepcopy(start), teacher, method, stops)
        paths[f"{method} run"] = [first, *({"at": step, **lab.measure(model, teacher)} for step, model in visited)]
    return paths


# -------------------------------------------------------------------------------------------------------------- show


def draw(paths: dict[str, list[dict[str, float]]]):
    """The sampled token with the text given; all objectives over texts along the line; the same along both runs."""
    figure, (left, middle, right) = new_figure(3)

    def column(path: str, name: str) -> list[float]:
        return [row[name] for row in paths[path]]

    for index, path in enumerate(paths):
        for name, style in (("given the text: gradient", "-o"), ("given the text: value", ":s")):
            label = f"{name.split(': ')[1]}, {path}"
            left.loglog(column(path, "KL"), column(path, name), style, color=f"C{index}", markersize=3.5, label=label)
    left.set(title="sampled token, text given", xlabel="KL divergence", ylabel="signal / noise")
    for index, method in enumerate(METHODS):
        line = [column("straight line", name) for name in ("KL", f"over texts: {method}")]
        style = "--o" if method == "top-16" else "-o"
        middle.loglog(*line, style, color=f"C{index}", markersize=3.5, label=method)
    middle.set(title="over texts, straight line", xlabel="KL divergence")
    for path, style in (("full KL run", ":s"), ("OPRD run", "-o")):
        for method in ("full KL", "OPRD"):
            line = [column(path, name) for name in ("at", f"over texts: {method}")]
            color = f"C{METHODS.index(method)}"
            right.semilogy(*line, style, color=color, markersize=3.5, label=f"{method} in the {path}")
    right.set(title="over texts, two runs", xlabel="update")
    return figure


def main() -> None:
    args = arguments(__doc__)
    paths = run(args.quick)
    for name, rows in paths.items():
        show(f"{name}: signal to noise (power)", rows)
    names = [name for name in paths["straight line"][0] if ":" in name]
    slopes = {
        path: {name: slope([row["KL"] for row in rows], [row[name] for row in rows]) for name in names}
        for path, rows in paths.items()
    }
    show("power of the KL divergence that each follows", [{"path": path, **found} for path, found in slopes.items()])
    keep(args.out, "gradient-noise", {"paths": paths, "slopes": slopes}, draw(paths))


if __name__ == "__main__":
    main()
