"""A diagnosis reads both models once, batch by batch; its numbers are those of plain forwards, one text at a time."""

import pytest
import torch
import torch.nn.functional as F

from oprd import models
from oprd.insight.cases import Fit
from oprd.insight.comparison import Comparison
from oprd.insight.diagnosis import Text, _readings
from tiny import VOCAB, tiny_model

GENERATOR = torch.Generator().manual_seed(3)
TEXTS = [
    Text({}, *(torch.randint(2, VOCAB, (n,), generator=GENERATOR).tolist() for n in lengths), place % 5 == 4)
    for place, lengths in enumerate([(3, 7), (5, 2), (2, 9), (4, 1), (6, 8), (3, 12), (2, 3), (3, 5), (7, 6), (4, 10)])
]


def fit(width=16, layers=3, layer_map=(1, 2, 3)):
    facts = {"layers": [3, layers], "width": [16, width]}
    return Fit(facts, "same", list(layer_map), (VOCAB, VOCAB), None, lambda a, b: a == b)


def compare(student, teacher, fit):
    comparison = Comparison(student, teacher, fit)
    for seen in _readings(TEXTS, fit, torch.device("cpu")):
        comparison.update(seen)
    return comparison.result()


@torch.no_grad()
def states(model, text):
    """Every layer at the positions that predict the answer, ``[L, N, d]``."""
    found = model(input_ids=torch.tensor([text.prompt + text.answer]), output_hidden_states=True)
    first = len(text.prompt) - 1
    return torch.stack([layer[0, first : first + len(text.answer)] for layer in found.hidden_states[1:]])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_states_choices_and_positions_are_those_of_plain_forwards(architecture):
    student, teacher = (tiny_model(architecture, seed=seed).eval() for seed in (0, 1))
    found = compare(student, teacher, fit())
    own, other = ([states(model, text) for text in TEXTS] for model in (student, teacher))
    cosine = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(own, other, strict=True)]
    for layer, row in enumerate(found["layers"]):
        assert row["cosine"] == pytest.approx(float(torch.cat([c[layer] for c in cosine]).mean()), abs=1e-5)
        gap = torch.cat([(a - b)[layer] for a, b in zip(own, other, strict=True)])
        assert row["distance"] == pytest.approx(float(gap.square().mean()), rel=1e-4)
    logits = [
        torch.cat([models.head_of(model).logits(s[-1]) for s in kept])
        for model, kept in ((student, own), (teacher, other))
    ]
    p, q = (x.log_softmax(-1) for x in logits)
    assert found["choices"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    assert found["choices"]["agreement"] == pytest.approx(float(same))
    first_two = torch.cat([c[:, :2] for c in cosine], 1).mean()
    last_two = torch.cat([c[:, -2:] for c in cosine], 1).mean()
    row = next(row for row in found["positions"] if row["k"] == 2)
    assert row["cosine_first"] == pytest.approx(float(first_two), abs=1e-5)
    assert row["cosine_last"] == pytest.approx(float(last_two), abs=1e-5)
    assert found["paired_share"] == 1.0


@torch.no_grad()
def test_sizes_are_taken_at_every_position_read():
    student, teacher = (tiny_model(seed=seed).eval() for seed in (0, 1))
    found = compare(student, teacher, fit())["activations"]["teacher"]
    whole = [
        teacher(input_ids=torch.tensor([t.prompt + t.answer]), output_hidden_states=True).hidden_states[1:]
        for t in TEXTS
    ]
    for layer, row in enumerate(found):
        rows = torch.cat([states[layer][0] for states in whole])
        assert row["peak"] == pytest.approx(float(rows.abs().max()), rel=1e-5)
        assert row["rms"] == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-5)


def test_a_model_beside_itself_is_no_distance_away():
    student = tiny_model().eval()
    found = compare(student, student, fit())
    assert all(row["cosine"] == pytest.approx(1) and row["cka"] == pytest.approx(1) for row in found["layers"])
    assert all(row["explained"] == pytest.approx(1) for row in found["layers"])
    assert found["choices"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["bridge"]["explained"] == pytest.approx(1, abs=1e-4)
    assert not found["bridge"]["enough_rows"]


def test_another_shape_has_kernels_and_a_linear_map_and_no_cosine():
    student, teacher = tiny_model().eval(), tiny_model(seed=1, layers=4, width=24).eval()
    found = compare(student, teacher, fit(width=24, layers=4, layer_map=(1, 2, 4)))
    assert [row["teacher_layer"] for row in found["layers"]] == [1, 2, 4]
    assert all("cosine" not in row for row in found["layers"])
    assert torch.tensor(found["cka"]).shape == (3, 4)
    assert "kl" in found["choices"] and "teacher_under_student_head/kl" not in found["choices"]
    assert all("cosine_first" not in row for row in found["positions"])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_worn_head_reads_the_states_and_is_taken_off_again(tied):
    model, other = tiny_model(tied=tied).eval(), tiny_model(seed=1, vocab_size=VOCAB + 3).eval()
    ids = torch.tensor([TEXTS[0].prompt])
    with torch.no_grad():
        before = model(input_ids=ids)
        last = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        with models.wearing_head(model, other, VOCAB):
            worn = model(input_ids=ids).logits
        after = model(input_ids=ids)
    assert torch.allclose(worn, last @ other.lm_head.weight[:VOCAB].T, atol=1e-5)
    assert torch.equal(before.logits, after.logits) and models.is_tied(model) is tied


def test_states_that_overflow_are_named_by_layer_and_dtype():
    teacher = tiny_model(seed=1).eval()
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"teacher's layer 2 .* float32.*--dtype"):
        compare(tiny_model().eval(), teacher, fit())
