"""The student as its own teacher, against a loop by hand: which weights teach, what they read, where the pairs lie."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from oprd.training import opening
from oprd.training.own_teacher import Average
from tiny import PROMPTS, canned_completion, canned_trainer, logged, reference_states, tiny_model, tiny_tokenizer

HINTS = ["s", "solution9", "q1", "hint", "a", "bb", "ccc", "d4"] * 2
TEMPLATE = "{hint}then{prompt}"
OWN = {"columns": {"hint": HINTS}, "teacher_prompt_template": TEMPLATE}
RATE = 1e-2


def oprsd_loss(student, teacher, prompts, hints):
    """Eq. 6 with a teacher that reads another prompt: row by row, layer by layer, position by position."""
    encode, rows = tiny_tokenizer(), []
    for prompt, hint in zip(prompts, hints, strict=True):
        own = encode(prompt)["input_ids"]
        response = canned_completion(own)
        other = encode(TEMPLATE.format(hint=hint, prompt=prompt))["input_ids"]
        ours = reference_states(student, torch.tensor(own + response))
        with torch.no_grad():
            theirs = reference_states(teacher, torch.tensor(other + response))
        total = 0.0
        for layer in (1, 2, 3):
            for t in range(len(response)):  # the state before token t, on either side
                difference = ours[layer, len(own) - 1 + t] - theirs[layer, len(other) - 1 + t]
                total = total + difference.pow(2).mean()
        rows.append(total / 3 / len(response))
    return sum(rows) / len(rows)


@pytest.mark.parametrize(("kind", "rate"), [("base", 0.005), ("live", 0.005), ("ema", 0.3), ("ema", 1.0)])
@pytest.mark.parametrize("packed", [False, True])
def test_two_updates_by_hand(tmp_path, kind, rate, packed):
    extra = {"teacher_update_rate": rate} if kind == "ema" else {}
    extra |= {"max_tokens_per_microbatch": 30} if packed else {}
    trainer = canned_trainer(tmp_path, teacher_model_kind=kind, logit_weight=0, **OWN, **extra)
    trainer.train()
    student, average = tiny_model(seed=0), tiny_model(seed=0)
    losses = []
    for step in range(2):
        part = slice(8 * step, 8 * step + 8)
        teacher = {"base": average, "live": student, "ema": average}[kind]
        student.zero_grad()
        loss = oprsd_loss(student, teacher, PROMPTS[part], HINTS[part])
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                if kind == "ema":
                    dict(average.named_parameters())[name].lerp_(parameter, rate)
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, dict(student.named_parameters())[name], atol=2e-6, rtol=1e-4)
    if kind == "ema":
        for name, tensor in trainer.averages["teacher"].state_dict().items():
            torch.testing.assert_close(tensor, dict(average.named_parameters())[name], atol=2e-6, rtol=1e-4)


LORA = {
    "peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
}


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_with_an_adapter_there_is_one_set_of_weights(tmp_path, kind):
    """``base`` reads with the adapter off, ``live`` with it, ``ema`` with its average; and nothing is left changed."""
    trainer = canned_trainer(
        tmp_path, teacher_model_kind=kind, logit_weight=0, trainer_kwargs=LORA, layers=[1, 2], **OWN, max_steps=1
    )
    assert trainer.teachers[0].model is None  # no second copy
    flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    assert not any(needed for name, needed in flags.items() if "layers.2" in name)  # above the highest layer: frozen
    merged = copy.deepcopy(trainer.model).merge_and_unload()
    teacher = tiny_model(seed=0) if kind == "base" else merged
    expected = oprsd_loss_of_layers(merged, teacher, (1, 2))
    trainer.train()
    assert logged(trainer) == pytest.approx([expected.item()], rel=1e-4)
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == flags
    if kind == "ema":  # one update of 5 % of the way
        own = dict(trainer.model.named_parameters())
        for name, tensor in trainer.averages["teacher"].state_dict().items():
            assert not tensor.equal(own[name])


def oprsd_loss_of_layers(student, teacher, layers):
    """The same over some layers, of the first step's rows."""
    encode, rows = tiny_tokenizer(), []
    for prompt, hint in zip(PROMPTS[:8], HINTS[:8], strict=True):
        own, other = (encode(text)["input_ids"] for text in (prompt, TEMPLATE.format(hint=hint, prompt=prompt)))
        response = canned_completion(own)
        with torch.no_grad():
            ours = reference_states(student, torch.tensor(own + response))[:, len(own) - 1 : -1]
            theirs = reference_states(teacher, torch.tensor(other + response))[:, len(other) - 1 : -1]
        rows.append(torch.stack([(ours[layer] - theirs[layer]).pow(2).mean() for layer in layers]).mean())
    return sum(rows) / len(rows)


@pytest.mark.parametrize("kind", ["base", "live"])
@pytest.mark.parametrize("output", ["sampled", "top_k", "full"])
def test_output_losses_read_the_privileged_prompt_too(tmp_path, kind, output):
    """The logged divergence is that of the student from itself with the hint, whoever's head is asked."""
    trainer = canned_trainer(
        tmp_path, teacher_model_kind=kind, representation_weight=0, output_loss=output, max_steps=1, **OWN
    )
    start = tiny_model(seed=0)
    encode, rows = tiny_tokenizer(), []
    for prompt, hint in zip(PROMPTS[:8], HINTS[:8], strict=True):
        own, other = (encode(text)["input_ids"] for text in (prompt, TEMPLATE.format(hint=hint, prompt=prompt)))
        response = canned_completion(own)
        with torch.no_grad():
            p, q = (
                start(torch.tensor([before + response])).logits[0, len(before) - 1 : -1].log_softmax(-1)
                for before in (own, other)
            )
        if output == "full":
            values = (p.exp() * (p - q)).sum(-1)
        elif output == "top_k":
            best = p.topk(16).indices
            p, q = (x.gather(1, best).log_softmax(-1) for x in (p, q))
            values = (p.exp() * (p - q)).sum(-1)
        else:
            said = torch.tensor(response).unsqueeze(1)
            values = (p.gather(1, said) - q.gather(1, said)).squeeze(1)
        rows.append(values)
    trainer.train()
    assert logged(trainer, "output_divergence") == pytest.approx([torch.cat(rows).mean().item()], rel=1e-3)
    head = trainer.model.lm_head.weight
    assert not head.equal(
        start.lm_head.weight
    )  # it learns: the teacher's side of it gives no gradient, the student's does


def test_the_teachers_head_gives_no_gradient(tmp_path):
    """With a live teacher both sides read one LM head; only the student's reading may move it."""
    trainer = canned_trainer(tmp_path, teacher_model_kind="live", representation_weight=0, output_loss="full", **OWN)
    with trainer.teachers[0].at_hand():
        lent = trainer.teachers[0].lend()
    weight = lent.get_output_embeddings().weight
    assert not weight.requires_grad
    assert weight.data_ptr() == trainer.model.lm_head.weight.data_ptr()  # and takes no memory


def test_dropout_is_off_while_it_teaches(tmp_path):
    model = tiny_model(seed=0)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    trainer = canned_trainer(tmp_path, model=model, teacher_model_kind="live", **OWN)
    trainer.model.train()
    with trainer.teachers[0].at_hand():
        assert not any(module.training for module in trainer.model.modules())
    assert all(module.training for module in trainer.model.modules())


def test_a_run_with_an_average_goes_on_from_its_checkpoint(tmp_path):
    """Bit for bit, and not without the average."""
    settings = {
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.5,
        **OWN,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = canned_trainer(tmp_path / "whole", **settings)
    whole.train()
    again = canned_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, parameter in whole.model.named_parameters():
        assert dict(again.model.named_parameters())[name].equal(parameter)
    for name, tensor in whole.averages["teacher"].state_dict().items():
        assert again.averages["teacher"].state_dict()[name].equal(tensor)
    other = canned_trainer(
        tmp_path / "other", **{**settings, "teacher_model_kind": "live", "teacher_update_rate": 0.005}
    )
    other.train(resume_from_checkpoint=None)
    with pytest.raises(ValueError, match="holds no averaged teacher"):
        canned_trainer(tmp_path / "again", **settings).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1")
        )


def test_the_average_is_taken_every_so_many_updates(tmp_path):
    trainer = canned_trainer(
        tmp_path, teacher_model_kind="ema", teacher_update_rate=1.0, teacher_sync_steps=2, **OWN, max_steps=2
    )
    trainer.train()
    own = dict(trainer.model.named_parameters())
    for name, tensor in trainer.averages["teacher"].state_dict().items():
        assert tensor.equal(own[name])
    trainer = canned_trainer(
        tmp_path, teacher_model_kind="ema", teacher_update_rate=1.0, teacher_sync_steps=3, **OWN, max_steps=2
    )
    trainer.train()
    start = dict(tiny_model(seed=0).named_parameters())
    for name, tensor in trainer.averages["teacher"].state_dict().items():
        assert tensor.equal(start[name])


def test_too_long_a_hint_loses_its_end_and_is_counted(tmp_path):
    """The question and the response stay whole; the teacher reads as much of the hint as there is room for."""
    long = ["abcdefghijklmnopqrstuvwxyz" * 9, *HINTS[1:]]
    trainer = canned_trainer(tmp_path, teacher_model_kind="live", max_steps=1, **{**OWN, "columns": {"hint": long}})
    rows = [{"prompt": prompt, "hint": hint} for prompt, hint in zip(PROMPTS[:8], long[:8], strict=True)]
    batch = trainer._generate_and_score_completions(rows)
    response = canned_completion(tiny_tokenizer()("ab")["input_ids"])
    read = batch["teacher_ids"][0][batch["teacher_mask"][0]].tolist()
    assert len(read) == 128  # the model's context
    text = tiny_tokenizer().decode(read[: -len(response)])
    kept = text.removesuffix("thenab")
    assert kept and kept != text
    assert long[0].startswith(kept)
    assert read[-len(response) :] == response
    trainer.train()
    assert logged(trainer, "privileged/shortened") == [1.0]
    bounded = canned_trainer(tmp_path, teacher_model_kind="live", max_teacher_prompt_length=9, **OWN)
    batch = bounded._generate_and_score_completions(rows)
    lengths = [
        int((ids[mask] > -1).sum()) for ids, mask in zip(batch["teacher_ids"], batch["teacher_mask"], strict=True)
    ]
    for length, row in zip(lengths, rows, strict=True):
        response = canned_completion(tiny_tokenizer()(row["prompt"])["input_ids"])
        # "then" and the question are 4 tokens and more: where they alone are too long, they stay
        assert length - len(response) == max(min(9, 4 + len(row["prompt"]) + len(row["hint"])), 4 + len(row["prompt"]))


def test_the_head_is_left_alone(tmp_path):
    trainer = canned_trainer(tmp_path, teacher_model_kind="live", **OWN)
    assert (trainer.lm_head, trainer.objective.logit_weight) == ("keep", 0.0)
    tied = canned_trainer(tmp_path, model=tiny_model(seed=0, tied=True), teacher_model_kind="base", **OWN)
    assert (tied.lm_head, tied.objective.logit_weight) == ("keep", 1.0)  # its head moves with the embeddings


def test_an_average_of_half_precision_weights_is_kept_in_float32():
    """A share of a small step is less than a bf16 number can take up; adding such steps up must not lose them."""
    student = {"w": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    kept = {"w": torch.ones(4, dtype=torch.bfloat16)}
    average = Average(student, kept, 0.01, 1)
    student["w"].data += 0.0625
    for step in range(1, 101):
        average.on_step_end(None, SimpleNamespace(global_step=step), None)
    expected = 1 + 0.0625 * (1 - 0.99**100)
    torch.testing.assert_close(average.state_dict()["w"], torch.full((4,), expected))
    torch.testing.assert_close(kept["w"].float(), torch.full((4,), expected), atol=0.004, rtol=0)
    again = Average(student, {"w": torch.zeros(4, dtype=torch.bfloat16)}, 0.01, 1)
    again.load_state_dict(average.state_dict())
    assert again.state_dict()["w"].equal(average.state_dict()["w"])


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"offload_teacher": True}, LORA, "offload_teacher would be ignored"),
        ({"teacher_load_in_8bit": True}, {}, "already a model|needs bitsandbytes"),
        ({}, {"teacher_processing_class": tiny_tokenizer()}, "teacher_processing_class would be ignored"),
        (
            {"max_completion_length": 116},
            {},
            "teacher_prompt_template makes a prompt of 16 tokens, without any privileged",
        ),
    ],
)
def test_what_an_own_teacher_cannot_have(tmp_path, settings, given, message):
    with pytest.raises(ValueError, match=message):
        canned_trainer(tmp_path, teacher_model_kind="base", trainer_kwargs=given, **OWN, **settings)


def test_a_pruned_student_teaches_itself(tmp_path):
    """Layer l with layer l: the recorded map is for the model that it was pruned from."""
    model = tiny_model(seed=0)
    model.config.oprd_layer_map = [1, 2, 5]
    trainer = canned_trainer(tmp_path, model=model, teacher_model_kind="live", **OWN)
    assert trainer.objective.layer_map is None


@pytest.mark.parametrize(
    ("kind", "output", "warned"),
    [("base", "none", False), ("live", "none", True), ("ema", "none", True), ("live", "full", True)],
)
def test_a_teacher_that_moves_along_is_warned_of(tmp_path, monkeypatch, kind, output, warned):
    said = []
    monkeypatch.setattr(opening.logger, "warning", lambda message, *_, **__: said.append(message))
    canned_trainer(tmp_path, teacher_model_kind=kind, output_loss=output, **OWN)
    assert any("can drift off together" in message for message in said) == warned
