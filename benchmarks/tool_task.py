"""A miniature with a tool: chained arithmetic modulo 100 in chats, in which the assistant has every step calculated.

The user writes ``37+4-9=?``. The assistant calls ``calculator`` with the first step, reads the result, calls it with the
next one, and in the end boxes the last result. Student and teacher are two snapshots of one supervised run on such chats.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

MIN_TERMS, MAX_TERMS = 2, 4
CONTEXT = 256
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, SCHEDULE_STEPS, SEED = 32, 3e-3, 30, 1000, 0
SAVED = {150: "student", 400: "teacher"}  # after which update of the one run the weights are which model
SETS = {"train": (2048, 1), "validation": (64, 998), "test": (256, 999)}  # problems, seed

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% elif message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSES = {  # how an answer is read back, as transformers' parse_response has it
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
PIECES = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", '{"name": "', '", "arguments": {"', '": "',
          '"}}', r"\boxed{"]  # fmt: skip


def calculator(expression: str) -> str:
    """
    Adds or subtracts two numbers, modulo 100.

    Args:
        expression: One step, such as 37+4.

    Returns:
        The result in two digits.
    """
    step = re.fullmatch(r"(\d\d)([+-])(\d)", expression)
    if step is None:
        raise ValueError("not a step such as 37+4")
    value, sign, term = step.groups()
    return f"{(int(value) + int(sign + term)) % 100:02d}"


def make_problem(rng: random.Random, num_terms: int | None = None) -> dict:
    """One problem: ``prompt`` (a chat), ``answer``, and the ``chat`` that solves it."""
    value, said, steps = f"{rng.randrange(100):02d}", "", []
    text = value
    for _ in range(num_terms or rng.randint(MIN_TERMS, MAX_TERMS)):
        said = rng.choice("+-") + str(rng.randint(1, 9))
        text += said
        call = {"name": "calculator", "arguments": {"expression": value + said}}
        value = calculator(value + said)
        steps.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
        steps.append({"role": "tool", "name": "calculator", "content": value})
    prompt = [{"role": "user", "content": f"{text}=?"}]
    chat = [*prompt, *steps, {"role": "assistant", "content": f"\\boxed{{{value}}}"}]
    return {"prompt": prompt, "answer": value, "chat": chat}


def problems(name: str) -> list[dict]:
    """The problems of a set of `SETS`. No training problem is in one of the others, no validation problem in the test set."""
    count, seed = SETS[name]
    others = {"train": ("validation", "test"), "validation": ("test",), "test": ()}[name]
    reserved = {problem["prompt"][0]["content"] for other in others for problem in problems(other)}
    rng, found = random.Random(seed), []
    while len(found) < count:
        problem = make_problem(rng)
        if problem["prompt"][0]["content"] not in reserved:
            found.append(problem)
    return found


def build_tokenizer():
    """Two-digit numbers, words and the pieces of a call are one token each; everything else is characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(33, 127)] + [" ", "\n"]
    words = ["system", "user", "assistant", "tool", "calculator", "expression"]
    numbers = [f"{value:02d}" for value in range(100)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *PIECES, *words, *numbers, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    pieces = "|".join(map(re.escape, [*SPECIAL, *PIECES, *words]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pieces}|\d\d|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        model_max_length=CONTEXT,
    )
    made.chat_template, made.response_template = TEMPLATE, RESPONSES
    return made


def rebuild(directory: Path) -> None:
    """Train once and write student, teacher and the problem sets under ``directory``."""
    import json

    import torch
    from transformers import get_cosine_schedule_with_warmup

    from oprd.miniature.rebuild import build_model

    for name in SETS:
        directory.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"prompt": p["prompt"], "answer": p["answer"]}) for p in problems(name)]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, SCHEDULE_STEPS)
    rng = random.Random(SEED)
    reserved = {p["prompt"][0]["content"] for name in ("validation", "test") for p in problems(name)}
    for step in range(1, max(SAVED) + 1):
        terms, chats = rng.randint(MIN_TERMS, MAX_TERMS), []  # one length a batch: no padding
        while len(chats) < BATCH_SIZE:
            problem = make_problem(rng, terms)
            if problem["prompt"][0]["content"] not in reserved:
                chats.append(problem["chat"])
        loss = model(**supervised(tokenizer, chats), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.4f}", flush=True)
        if step in SAVED:
            model.save_pretrained(directory / SAVED[step])
            tokenizer.save_pretrained(directory / SAVED[step])


def supervised(tokenizer, chats: list) -> dict:
    """Chats of one length as ids and labels; only what the assistant says is learnt."""
    import torch

    how = {"tools": [calculator], "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(chats, **how)
    ids, said = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"])
    return {"input_ids": ids, "labels": ids.masked_fill(said == 0, -100)}
