"""On-policy representation distillation with nothing hidden: plain PyTorch, no trainer.

    python examples/minimal_loop.py

A student writes answers, both models read them, and the student's hidden states are pulled towards the teacher's at
every layer, just before each token of the answer (Eq. 6). No logit is formed: the student starts from the teacher's LM
head, or, where it cannot (tied heads), logits are matched through d x d Gram matrices so that its own head moves along.
A test says that the loss and its gradient are the trainer's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.evaluation import grade
from oprd.models import resolve_path


def pad(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


def hidden_states(model, ids: Tensor, mask: Tensor) -> Tensor:
    """``[L, B, S, d]``: the output of every block, the last one after the final norm. The LM head does not run."""
    output = model.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    return torch.stack(output.hidden_states[1:])


def oprd_loss(
    student, teacher, prompts: list[list[int]], responses: list[list[int]], pad_id: int, logit_weight: float = 0.0
) -> Tensor:
    """Eq. 6 over all layers and positions, plus exact logit matching; both a mean over each answer, then over answers."""
    ids, mask = pad([p + r for p, r in zip(prompts, responses, strict=True)], pad_id)
    own_LBSd = hidden_states(student, ids, mask)
    with torch.no_grad():
        goal_LBSd = hidden_states(teacher, ids, mask)

    # The state that predicts answer token t sits one position before it.
    predicts = torch.zeros_like(mask)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        predicts[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    weight_BS = predicts / predicts.sum(1, keepdim=True).clamp(min=1) / len(prompts)

    representation_BS = (own_LBSd - goal_LBSd).pow(2).mean(-1).mean(0)

    # |W_S h_S - W_T h_T|^2 / V with both heads centred over the vocabulary, as three quadratic forms.
    own_head, goal_head = student.lm_head.weight, teacher.lm_head.weight.detach()
    own_head, goal_head = own_head - own_head.mean(0), goal_head - goal_head.mean(0)
    own_BSd, goal_BSd = own_LBSd[-1], goal_LBSd[-1]
    logits_BS = (
        ((own_BSd @ (own_head.T @ own_head)) * own_BSd).sum(-1)
        - 2 * ((own_BSd @ (own_head.T @ goal_head)) * goal_BSd).sum(-1)
        + ((goal_BSd @ (goal_head.T @ goal_head)) * goal_BSd).sum(-1)
    ) / len(own_head)

    return (weight_BS * (representation_BS + logit_weight * logits_BS)).sum()


@torch.no_grad()
def sample(model, tokenizer, texts: list[str], max_new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The student's own answers, at temperature 1; the end token is part of an answer."""
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    responses = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        responses.append(row[:end])
    return tokenizer(texts)["input_ids"], responses


def main(steps: int = 100, batch_size: int = 32, learning_rate: float = 2e-3) -> None:
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(resolve_path("miniature:student"), use_safetensors=True)
    teacher = AutoModelForCausalLM.from_pretrained(resolve_path("miniature:teacher"), use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("miniature:student"))
    lines = Path(resolve_path("miniature:train.jsonl")).read_text().splitlines()
    problems = [json.loads(line) for line in lines]

    # The teacher's last states are meant for the teacher's head; start from it.
    student.lm_head.weight.data.copy_(teacher.lm_head.weight)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = problems[step * batch_size % len(problems) :][:batch_size]
        prompts, responses = sample(student, tokenizer, [p["prompt"] for p in batch], max_new_tokens=44)
        loss = oprd_loss(student, teacher, prompts, responses, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 10 == 0:
            right = [grade(tokenizer.decode(r), p["answer"]) for r, p in zip(responses, batch, strict=True)]
            print(f"step {step + 1:3d}  loss {loss.item():.3f}  right {sum(right) / len(right):.0%}", flush=True)


if __name__ == "__main__":
    main()
