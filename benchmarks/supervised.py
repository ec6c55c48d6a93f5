"""Supervised training of the small models that the tables need besides the shipped ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

Draw = Callable[[random.Random], list[dict]]  # a batch of problems of one length: prompt, solution


def supervise(
    model, tokenizer, draw: Draw, folder: Path, *, steps: int, seed: int, lr: float, of: int, warmup: int = 20
):
    """Train ``steps`` of a cosine schedule over ``of`` steps, and save model and tokenizer in ``folder``, unless it is there."""
    import torch
    from tqdm.auto import tqdm
    from transformers import get_cosine_schedule_with_warmup

    if (folder / "config.json").exists():
        return
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, of)
    rng = random.Random(seed)
    model.train()
    for _ in tqdm(range(steps), desc=f"training {folder.name}", unit="step"):
        problems = draw(rng)
        prompts, answers = (tokenizer([p[key] for p in problems])["input_ids"] for key in ("prompt", "solution"))
        ids = torch.tensor([p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)])
        labels = ids.clone()
        labels[:, : len(prompts[0])] = -100
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
