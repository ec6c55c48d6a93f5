"""Plans: what the simulation counts is what a real update allocates, and sizes add up as they should."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from oprd.insight import plan
from oprd.insight.live_bytes import LiveBytes
from oprd.insight.planner import GB
from oprd.insight.simulate import Shapes, _model, _prepared, layout, simulate
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states

CONFIG = Qwen2Config(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
ROWS = ((20, 300), (33, 170), (5, 90))
LAST = {"positions": "last_k", "position_k": 64}


def objective(**settings):
    return Objective((1, 2, 3), 3, 2048, **settings)


def counted(shapes, chosen):
    """Peak bytes above what was there, of a second real update, and of the teacher's part of it."""
    torch.manual_seed(0)
    student, teacher = (_model(config, shapes) for config in (shapes.student, shapes.teacher))
    teacher.requires_grad_(False).eval()
    student = _prepared(student, shapes, chosen)
    rollout = layout(shapes, chosen)
    for _ in range(2):  # gradients are there in the second
        with LiveBytes() as before:
            targets = teacher_states(chosen, teacher, rollout)
        with LiveBytes() as memory:
            loss = student_loss(chosen, student, teacher, rollout, targets)[0]
            loss.backward()
    return before.live, before.peak, memory.peak


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({}, {}),
        ({}, {"is_packed": True}),
        ({}, {"is_packed": True, **LAST}),
        ({}, {"is_packed": True, "gradient_scope": "suffix", **LAST}),
        ({}, {"is_packed": True, "gradient_checkpointing": False}),
        ({"logit_weight": 1.0}, {"is_packed": True}),
        ({"representation_weight": 0.0, "output_loss": "full"}, {"is_packed": True}),
        ({"representation_weight": 0.0, "output_loss": "top_k"}, {"is_packed": True}),
        ({"representation_weight": 0.0, "output_loss": "sampled"}, {"is_packed": True}),
        ({"output_loss": "full"}, {"is_packed": True, "gradient_scope": "suffix"}),
        ({}, {"is_packed": True, "dtype": torch.bfloat16}),
    ],
)
def test_simulated_bytes_are_those_of_a_real_update(settings, about):
    shapes, chosen = Shapes(CONFIG, CONFIG, ROWS, **about), objective(**settings)
    found = simulate(shapes, chosen)
    held, teacher_rise, student_rise = counted(shapes, chosen)
    assert found.targets == pytest.approx(held, rel=0.05)
    assert found.teacher_rise == pytest.approx(teacher_rise, rel=0.05)
    assert found.student_rise == pytest.approx(student_rise, rel=0.05)


def test_weights_gradients_and_tokens_are_exact():
    found = simulate(Shapes(CONFIG, CONFIG, ROWS, is_packed=True), objective())
    body = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 + 2 * 32 + 3 * 64 * 256 + 2 * 64) + 64
    head = 2048 * 64
    assert found.student == found.teacher == pytest.approx(4 * (body + 2 * head), rel=1e-3)  # and the rotary buffers
    assert found.gradients == 4 * (body + head)  # no loss reaches the head
    assert found.trainable == body + head
    assert found.tokens_supervised == 560
    assert found.tokens_student == sum(p + r - 1 for p, r in ROWS)  # the last token predicts nothing
    suffix = simulate(Shapes(CONFIG, CONFIG, ROWS, is_packed=True, gradient_scope="suffix", **LAST), objective())
    assert suffix.tokens_student == suffix.tokens_supervised == 3 * 64
    assert suffix.tokens_student + suffix.tokens_prefix == found.tokens_student


def test_flops_are_those_of_the_products():
    rows = ((1, 64),)
    shapes = Shapes(CONFIG, CONFIG, rows, is_packed=True, gradient_checkpointing=False)
    linear = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256)
    attention = 3 * 4 * 64 * 64 * 64  # two products of T x T x d
    found = simulate(shapes, objective()).flops
    # teacher once; student forward and twice backward (no gradient for the embedding's input); attention 2.5 times back
    assert found == pytest.approx(2 * 64 * linear * (1 + 3) + attention * (1 + 3.5), rel=0.01)
    again = simulate(dataclasses.replace(shapes, gradient_checkpointing=True), objective()).flops
    assert again == pytest.approx(found + 2 * 64 * linear + attention, rel=0.05)


def test_memory_is_flat_in_the_vocabulary_for_states_and_grows_with_tokens():
    def rise(vocabulary, tokens):
        config = Qwen2Config(**{**CONFIG.to_dict(), "vocab_size": vocabulary})
        found = simulate(Shapes(config, config, ((8, tokens),), is_packed=True), Objective((1, 2, 3), 3, vocabulary))
        return found.student_rise

    assert rise(2048, 1000) == rise(4096, 1000)  # below the size at which the embedding's own gradient is the peak
    assert rise(2048, 4000) == pytest.approx(2 * rise(2048, 2000), rel=0.02)


def test_peak_is_the_worst_of_three_moments():
    shaped = {"rows": ((16, 240),), "is_packed": True}
    small = plan(CONFIG, **shaped)
    always = small.student + small.optimizer
    assert small.peak == always + max(
        small.teacher + small.generation,
        small.gradients + small.teacher + small.counts.teacher_rise,
        small.gradients + small.teacher + small.targets + small.activations,
    )
    crowded = plan(CONFIG, **shaped, rows_generated=10_000)
    assert crowded.peak == always + crowded.teacher + crowded.generation
    assert (
        crowded.generation == 2 * 3 * 2 * 16 * 4 * 256 * 10_000
    )  # keys and values, layers, heads, size, bytes, tokens
    kept = plan(CONFIG, **shaped, in_vllm=0.25, gpu=8 * GB)
    assert kept.peak == pytest.approx(small.peak + 2 * GB, rel=0.01)
    asleep = plan(CONFIG, **shaped, in_vllm=0.25, gpu=8 * GB, vllm_sleeps=True)
    assert asleep.peak == always + small.teacher + 2 * GB


def test_what_saves_memory_saves_what_it_should():
    shaped = {"rows": ((16, 2000),), "is_packed": True}
    before = plan(CONFIG, **shaped)
    offloaded = plan(CONFIG, **shaped, objective={"offload_targets": True})
    assert offloaded.targets == before.targets - before.counts.targets_by_layer
    assert plan(CONFIG, **shaped, optim="adamw_torch_8bit").optimizer == before.optimizer / 4
    eight_bits = plan(CONFIG, **shaped, optim="adamw_8bit").optimizer
    assert eight_bits == before.optimizer / 4 + 6 * 2048 * 64  # bitsandbytes keeps those of embeddings in 32 bits
    assert plan(CONFIG, **shaped, optim="lion_8bit").optimizer == eight_bits / 2
    assert plan(CONFIG, **shaped, optim="sgd").optimizer == 0
    away = plan(CONFIG, **shaped, offload_teacher=True)
    assert away.teacher == 4 * 2048 * 64  # its head stays
    tied = Qwen2Config(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    assert plan(tied, **shaped, offload_teacher=True).teacher == 4 * 2048 * 64  # and so do embeddings that are the head
    assert away.peak < before.peak
    eight = plan(CONFIG, **shaped, teacher_in_8bit=True)
    assert eight.teacher == before.teacher - 3 * before.counts.teacher_linear
    half = plan(CONFIG, **shaped, teacher_dtype=torch.bfloat16)
    assert (half.teacher, half.student) == (pytest.approx(before.teacher / 2, rel=1e-3), before.student)
    assert plan(CONFIG, **shaped, processes=4).gradients == 2 * before.gradients  # DDP's buckets
    split = plan(CONFIG, **shaped, processes=4, sharding="zero2")
    assert (split.student, split.optimizer) == (before.student, before.optimizer / 4)
    head = 4 * 2048 * 64
    for sharding, teacher in (
        ("fsdp", 2 * head + (before.teacher - 2 * head) / 4),  # embeddings and head are whole
        ("zero3", before.teacher / 4 + head),  # and here a copy of the head
    ):
        split = plan(CONFIG, **shaped, processes=4, sharding=sharding)
        assert (split.student, split.gradients) == (before.student / 4, before.gradients / 4)
        assert split.optimizer == before.optimizer / 4
        assert split.teacher == teacher
        assert split.activations > before.activations  # blocks are gathered to run


def test_a_teacher_elsewhere_leaves_its_head_at_most():
    shaped = {"rows": ((16, 240),), "is_packed": True, "teacher_elsewhere": True}
    assert plan(CONFIG, **shaped).teacher == 0
    metric = plan(CONFIG, **shaped, objective={"logit_weight": 1.0})
    assert metric.teacher == 4 * 2048 * 64
    assert metric.peak < plan(CONFIG, **shaped | {"teacher_elsewhere": False}, objective={"logit_weight": 1.0}).peak


def test_fit_leaves_room():
    shaped = {"rows": ((16, 240),), "is_packed": True}
    assert plan(CONFIG, **shaped, gpu=2 * GB).fits
    tight = plan(CONFIG, **shaped, gpu=1.05 * GB)
    assert not tight.fits
    assert tight.row["fits"] == "no"


def test_bridge_teacher_of_another_shape():
    wide = LlamaConfig(
        vocab_size=4096, hidden_size=96, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="bridge_rank"):
        plan(CONFIG, wide, rows=((16, 100),))
    found = plan(CONFIG, wide, rows=((16, 100),), is_packed=True, bridge_rank=8)
    assert found.counts.bridge == 4 * 3 * 8 * (64 + 96)
    assert found.counts.targets_by_layer == 3 * 100 * 8 * 4


def test_unknown_settings_are_errors():
    with pytest.raises(ValueError, match=r"gradient_scop;.*gradient_scope"):
        plan(CONFIG, gradient_scop="suffix")
    with pytest.raises(ValueError, match="none, zero2, zero3, fsdp"):
        plan(CONFIG, sharding="zero1")
