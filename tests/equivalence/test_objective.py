"""The objective of a micro-batch against its slow, obvious twin: plain forwards, materialised logits, loops."""

import dataclasses

import pytest
import torch

from oprd.models import head_of
from oprd.objectives import position_weights, select_positions
from oprd.states import make_rollout
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states
from tiny import VOCAB, reference_states, tiny_batch, tiny_model

BASE = Objective(layers=(1, 2, 3), num_layers=3, vocab_size=VOCAB)
CASES = {
    "vanilla": BASE,
    "two layers, cosine": dataclasses.replace(BASE, layers=(1, 3), representation_loss="cosine"),
    "head metric": dataclasses.replace(BASE, representation_weight=0.0, logit_weight=1.0),
    "with the head metric": dataclasses.replace(BASE, representation_weight=2.0, logit_weight=0.5),
    "sampled": dataclasses.replace(BASE, representation_weight=0.0, output_loss="sampled"),
    "top-k": dataclasses.replace(BASE, representation_weight=0.0, output_loss="top_k", output_top_k=4),
    "full": dataclasses.replace(BASE, representation_weight=0.0, output_loss="full"),
    "composite": dataclasses.replace(
        BASE, representation_weight=10.0, logit_weight=0.3, output_loss="full", output_weight=0.7, temperature=0.8
    ),
    "smaller vocabulary": dataclasses.replace(
        BASE, representation_weight=0.0, logit_weight=1.0, output_loss="full", vocab_size=VOCAB - 5
    ),
}


def twin_loss(objective, student, teacher, batch, state_mask, output_mask):
    """One unpadded row at a time; logits formed; Eq. 3-7 as written."""
    terms = {"state": [], "output": []}
    W_s, W_t = (head_of(m, objective.vocab_size) for m in (student, teacher))
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])
        h_s = reference_states(student, ids)
        with torch.no_grad():
            h_t = reference_states(teacher, ids)
        state_row, output_row = [], []
        for t in range(len(completion)):
            at = len(prompt) + t - 1
            logits_s, logits_t = W_s.logits(h_s[-1, at]), W_t.logits(h_t[-1, at])
            if state_mask[row, t]:
                value = 0.0
                if objective.representation_weight:
                    per_layer = []
                    for layer in objective.layers:
                        a, b = h_s[layer, at], h_t[layer, at]
                        mse = (a - b).pow(2).mean()
                        cosine = 1 - torch.dot(a / a.norm(), b / b.norm())
                        per_layer.append(mse if objective.representation_loss == "mse" else cosine)
                    value = value + objective.representation_weight * sum(per_layer) / len(per_layer)
                if objective.logit_weight:
                    gap = (logits_s - logits_s.mean()) - (logits_t - logits_t.mean())
                    value = value + objective.logit_weight * gap.pow(2).mean()
                state_row.append(value)
            if output_mask[row, t] and objective.output_loss != "none":
                log_p = (logits_s / objective.temperature).log_softmax(-1)
                log_q = (logits_t / objective.temperature).log_softmax(-1)
                if objective.output_loss == "sampled":
                    reward = (log_q - log_p)[completion[t]].detach()
                    value = -reward * log_p[completion[t]]
                elif objective.output_loss == "top_k":
                    keep = log_p.argsort(descending=True)[: objective.output_top_k]
                    p, q = (x[keep].exp() / x[keep].exp().sum() for x in (log_p, log_q))
                    value = (p * (p / q).log()).sum()
                else:
                    value = (log_p.exp() * (log_p - log_q)).sum()
                output_row.append(objective.output_weight * value)
        for name, values in (("state", state_row), ("output", output_row)):
            if values:
                terms[name].append(sum(values) / len(values))
    return sum(sum(rows) / len(rows) for rows in terms.values() if rows)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_twin(case, tied, checkpointing):
    objective = CASES[case]
    student, teacher = (tiny_model(seed=seed, tied=tied, dtype=torch.float64).train() for seed in (0, 1))
    teacher.requires_grad_(False)
    batch = tiny_batch()
    generated = batch["completion_mask"].bool()
    state_mask = select_positions(generated, "last_k", 3)
    output_mask = generated & (batch["completion_ids"] < objective.vocab_size)
    rollout = make_rollout(
        *batch.values(), state_weights_BC=position_weights(state_mask), output_weights_BC=position_weights(output_mask)
    )
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    loss, terms, sums = student_loss(objective, student, teacher, rollout, teacher_states(objective, teacher, rollout))
    ours = gradients(student, loss)
    slow = twin_loss(objective, student, teacher, batch, state_mask, output_mask)
    twin = gradients(student, slow)
    if objective.output_loss != "sampled":  # there, only the gradient is defined
        torch.testing.assert_close(loss.double(), slow, atol=1e-6, rtol=1e-5)
    for name, gradient in twin.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert set(terms) == {
        name
        for name, on in (
            ("representation", objective.representation_weight),
            ("logit", objective.logit_weight),
            ("output", objective.output_loss != "none"),
        )
        if on
    }
    assert all(count > 0 for _, count in sums.values())


@pytest.mark.parametrize("case", ["with the head metric", "sampled", "top-k", "composite"])
def test_a_batch_without_supervision_is_zero_with_a_live_graph(case):
    objective = CASES[case]
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    batch = tiny_batch()
    nothing = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
    rollout = make_rollout(*batch.values(), state_weights_BC=nothing, output_weights_BC=nothing)
    loss, _, _ = student_loss(objective, student, teacher, rollout, teacher_states(objective, teacher, rollout))
    assert loss.item() == 0
    for name, gradient in gradients(student, loss).items():
        assert gradient.eq(0).all(), name
    assert all(p.grad is not None for name, p in student.named_parameters())


def test_logged_cosine_entropy_and_overlap_are_means_over_positions():
    student, teacher, batch = tiny_model(seed=0), tiny_model(seed=1), tiny_batch()
    objective = CASES["composite"]
    weights = position_weights(batch["completion_mask"])
    rollout = make_rollout(*batch.values(), state_weights_BC=weights, output_weights_BC=weights)
    _, _, sums = student_loss(objective, student, teacher, rollout, teacher_states(objective, teacher, rollout))
    cosines, entropies, overlaps = [], [], []
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])
        h_s, h_t = reference_states(student, ids), reference_states(teacher, ids)
        for at in range(len(prompt) - 1, len(ids) - 1):
            cosines.append(torch.cosine_similarity(h_s[1:, at], h_t[1:, at], dim=-1).mean())
            logits = [m.lm_head(h[-1, at]) for m, h in ((student, h_s), (teacher, h_t))]
            p = (logits[0] / objective.temperature).softmax(-1)  # the distribution that responses are sampled from
            entropies.append(-(p * p.log()).sum())
            tops = [set(x.argsort(descending=True)[:16].tolist()) for x in logits]
            overlaps.append(torch.tensor(len(tops[0] & tops[1]) / 16))
    for name, expected in (("cosine", cosines), ("entropy/student", entropies), ("overlap/top16", overlaps)):
        total, count = sums[name]
        torch.testing.assert_close(total / count, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
