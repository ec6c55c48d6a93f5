"""Numbers that go wrong are found and named; memory that runs out costs time, never the gradient."""

import json

import pytest
import torch
from safetensors.torch import load_file

from oprd.training import guard as guards
from oprd.training.microbatches import MicroBatch, halved, lengths_of, rows_of
from oprd.training.nonfinite import NonFinite
from tiny import PROMPTS, canned_completion, canned_trainer, logged, tiny_batch, tiny_model, tiny_tokenizer

TOKEN = tiny_tokenizer()(PROMPTS[3])["input_ids"][0]
WITH_TOKEN = [p for p in PROMPTS[:8] if TOKEN in tiny_tokenizer()(p)["input_ids"]]


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def bad_model(seed, *, layer=0):
    """A model in which ``layer`` (0: the embedding) makes infinities of one token."""
    model, seen = tiny_model(seed=seed), {}

    def embedded(module, args, output):
        seen["bad"] = (args[0] == TOKEN).unsqueeze(-1)
        return output if layer else output.masked_fill(seen["bad"], float("nan"))

    model.get_input_embeddings().register_forward_hook(embedded)
    if layer:
        model.model.layers[layer - 1].register_forward_hook(
            lambda module, args, output: output.masked_fill(seen["bad"], float("inf"))
        )
    return model


@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_microbatch": 40}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize(
    "role, layer, said",
    [
        ("student", 0, "the student's hidden states, layer 1"),
        ("teacher", 0, "the teacher's hidden states, layer 1"),
        ("student", 2, "the student's hidden states, layer 2"),
        ("teacher", 2, "the teacher's hidden states, layer 2"),
    ],
)
def test_the_first_bad_layer_and_its_rows_are_named(tmp_path, role, layer, said, settings):
    trainer = canned_trainer(
        tmp_path,
        **{"model" if role == "student" else "teacher": bad_model(0 if role == "student" else 1, layer=layer)},
        **settings,
    )
    before = weights_of(trainer)
    with pytest.raises(NonFinite, match=said) as caught:
        trainer.train()
    assert "Step 1:" in str(caught.value)
    about = json.loads(next((tmp_path / "faults").glob("*.json")).read_text())
    named = {about["prompts"][place["micro_batch"]][row] for place in about["found"] for row in place["rows"]}
    read = {prompt for prompts in about["prompts"] for prompt in prompts}
    expected = {p for p in read if TOKEN in tiny_tokenizer()(p)["input_ids"]}
    assert expected and expected <= named
    assert named != read  # and not simply everything
    tensors = load_file(next((tmp_path / "faults").glob("*.safetensors")))
    assert {"0.prompt_ids", "0.completion_ids", "0.state_weights"} <= tensors.keys()
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[name]) or weight.isnan().any(), name


class Explodes(torch.autograd.Function):
    """Nothing forward; backward, an infinity for some rows."""

    @staticmethod
    def forward(ctx, states, bad):
        ctx.save_for_backward(bad)
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        (bad,) = ctx.saved_tensors
        return gradient.masked_fill(bad, float("inf")), None


def test_a_bad_gradient_is_traced_to_its_rows(tmp_path):
    model, seen = tiny_model(seed=0), {}
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.update(bad=(args[0] == TOKEN).unsqueeze(-1))
    )
    model.model.layers[1].register_forward_hook(lambda module, args, output: Explodes.apply(output, seen["bad"]))
    trainer = canned_trainer(tmp_path, model=model)
    with pytest.raises(NonFinite, match=r"the gradient of model\.layers\.1"):
        trainer.train()
    about = json.loads(next((tmp_path / "faults").glob("*.json")).read_text())
    (place,) = about["found"]
    named = {about["prompts"][0][row] for row in place["rows"]}
    assert named >= set(WITH_TOKEN) and len(named) < 8


def test_skipping_leaves_the_weights_and_goes_on(tmp_path):
    """Steps 1 and 3 read the bad token, 2 and 4 do not: they train as they would alone."""
    read = {p: tiny_tokenizer()(p)["input_ids"] for p in PROMPTS}
    clean = [p for p, ids in read.items() if TOKEN not in ids + canned_completion(ids)]
    prompts = [PROMPTS[3]] * 8 + (clean * 8)[:8]
    trainer = canned_trainer(
        tmp_path, teacher=bad_model(1), prompts=prompts, max_steps=4, on_nonfinite="skip", optim="adamw_torch"
    )
    trainer.train()
    assert logged(trainer, "skipped_updates") == [1, 1, 2, 2]
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())
    alone = canned_trainer(tmp_path / "clean", prompts=prompts[8:], max_steps=2, optim="adamw_torch")
    alone.train()
    for name, weight in weights_of(alone).items():
        torch.testing.assert_close(weights_of(trainer)[name], weight, msg=name)


def test_skipping_forever_is_not_training(tmp_path):
    trainer = canned_trainer(tmp_path, model=bad_model(0), max_steps=20, on_nonfinite="skip")
    with pytest.raises(NonFinite, match="10th update in a row"):
        trainer.train()
    assert trainer.state.global_step == 9


def test_an_exploding_norm_is_said(tmp_path, caplog):
    trainer = canned_trainer(tmp_path, max_steps=30, learning_rate=1e-6)
    compute, trainer.loud = trainer._micro_batch_loss, False
    trainer._micro_batch_loss = lambda *a: compute(*a) * (1000 if trainer.state.global_step == 25 else 1)
    trainer.train()
    said = [record.getMessage() for record in caplog.records if "the gradient's norm is" in record.getMessage()]
    assert len(said) == 1 and "Step 26:" in said[0]


# ------------------------------------------------------------------------------------------------------ out of memory


def out_of_memory_over(trainer, rows, *, where):
    """As on a device that ``rows`` rows fit on: forwards or backwards of more fail, the latter having added some gradient."""
    compute, failures = trainer._micro_batch_loss, []

    def limited(model, part):
        loss, count = compute(model, part), len(part["prompt_mask"])
        if count <= rows:
            return loss
        failures.append(count)
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.")

        def fail(_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.")

        trainer.model.get_input_embeddings().weight.register_hook(lambda g: g)
        handle = trainer.model.model.layers[0].input_layernorm.weight.register_hook(fail)
        failing.append(handle)
        return loss

    failing = []
    run = trainer._guard._halves

    def halves(*args, **kwargs):
        for handle in failing:
            handle.remove()
        failing.clear()
        return run(*args, **kwargs)

    trainer._micro_batch_loss, trainer._guard._halves = limited, halves
    return failures


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "output_loss": "full"},
        {"max_tokens_per_microbatch": 60, "gradient_accumulation_steps": 2, "logging_steps": 2},
    ],
)
def test_a_micro_batch_that_does_not_fit_is_cut_and_nothing_changes(tmp_path, where, settings):
    settings = {"max_steps": 4, **settings}
    free = canned_trainer(tmp_path / "free", **settings)
    free.train()
    tight = canned_trainer(tmp_path / "tight", **settings)
    failures = out_of_memory_over(tight, 2, where=where)
    tight.train()
    assert failures and failures[0] > 2
    for name, weight in weights_of(free).items():
        torch.testing.assert_close(weights_of(tight)[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("loss", "cosine", "loss/representation", "grad_norm"):
        assert logged(tight, key) == pytest.approx(logged(free, key), rel=1e-4), key


def test_what_did_not_fit_is_cut_beforehand_from_then_on(tmp_path):
    trainer = canned_trainer(tmp_path, max_steps=4)
    failures = out_of_memory_over(trainer, 4, where="forward")
    trainer.train()
    assert 1 <= len(failures) <= 2


def test_a_row_that_does_not_fit_alone_says_what_helps(tmp_path):
    trainer = canned_trainer(tmp_path)
    out_of_memory_over(trainer, 0, where="forward")
    with pytest.raises(RuntimeError, match=r"1 rows and \d+ tokens.*max_completion_length"):
        trainer.train()


def test_other_errors_are_not_taken_for_it(tmp_path):
    trainer = canned_trainer(tmp_path)

    def broken(model, part):
        raise RuntimeError("shapes do not match")

    trainer._micro_batch_loss = broken
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()


def test_where_processes_meet_it_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    trainer = canned_trainer(tmp_path)
    out_of_memory_over(trainer, 2, where="forward")
    monkeypatch.setattr(guards, "is_sharded", lambda args: True)
    with pytest.raises(RuntimeError, match="max_tokens_per_microbatch below"):
        trainer.train()


def test_halves_hold_every_row_once_and_fit():
    part = MicroBatch(tiny_batch())
    for limit in (None, 100, 20, 12, 3):
        pieces = halved(part, limit)
        assert torch.equal(torch.cat([p["prompt_ids"] for p in pieces]), part["prompt_ids"])
        for piece in pieces:
            assert limit is None or len(piece["prompt_ids"]) == 1 or int(lengths_of(piece).sum()) <= limit
    assert len(halved(rows_of(part, [0]), 1)) == 1


def test_a_student_that_cannot_be_sampled_from_has_diverged(tmp_path):
    trainer = canned_trainer(tmp_path)

    def fails(*args, **kwargs):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    trainer._generate_single_turn = fails
    with pytest.raises(NonFinite, match=r"Step 1: the student cannot be sampled from.*Lower learning_rate"):
        trainer.train()
