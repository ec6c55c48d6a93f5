import copy
import random

import pytest
import torch
import transformers

from oprd.bridge import BridgeFitter
from oprd.bridge.collect import RANDOM_STUDENT, RANDOM_TEACHER, SHUFFLED, Collection, before_of, control_layers
from oprd.bridge.predict import predict, reverse_map
from oprd.bridge.report import SAMPLE_ROWS
from oprd.miniature.task import training_problem
from oprd.models import resolve_path
from oprd.objectives import map_layers, position_weights, select_positions
from oprd.states import make_rollout
from tiny import VOCAB, reference_states, tiny_batch, tiny_model

STUDENT, TEACHER = 16, 24
MAP = map_layers(3, 5)
KEY = {"seed": 1, "fitted": [1, 2], "nested": {"a": None}}


@pytest.fixture(scope="module")
def models():
    """A student, a deeper and wider teacher of another family, and freshly initialised ones of either shape."""
    student = tiny_model("qwen3", seed=0, layers=3, width=STUDENT)
    teacher = tiny_model("llama", seed=1, layers=5, width=TEACHER)
    fresh = {
        RANDOM_TEACHER: tiny_model("llama", seed=2, layers=5, width=TEACHER),
        RANDOM_STUDENT: tiny_model("qwen3", seed=3, layers=3, width=STUDENT),
    }
    return student, teacher, fresh


def rollout_of(batch, *, last_k=None, **settings):
    generated = batch["completion_mask"].bool()
    state_mask = generated if last_k is None else select_positions(generated, "last_k", last_k)
    weights = position_weights(state_mask), position_weights(generated)
    return make_rollout(*batch.values(), state_weights_BC=weights[0], output_weights_BC=weights[1], **settings)


def marks(*rows):
    return torch.tensor(rows, dtype=torch.bool)


NONE_OF_4, LAST_OF_4 = marks(0, 0, 0, 0), marks(0, 0, 0, 1)
LAST_TWO_OF_8 = marks(0, 0, 0, 0, 0, 0, 1, 1)


def collection(*, controls=True):
    return Collection(MAP, STUDENT, TEACHER, controls=controls)


@torch.no_grad()
def plain_states(model, batch, layers, *, shift=1, last_k=None, rows=None):
    """Row by row, unpadded, through transformers' own ``hidden_states``: ``[len(layers), n, d]``."""
    found = []
    for row in range(len(batch["prompt_ids"])) if rows is None else rows:
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        states = reference_states(model, torch.cat([prompt, completion]))[list(layers)]
        places = torch.arange(len(prompt), len(prompt) + len(completion)) - shift
        found.append(states[:, places if last_k is None else places[-last_k:]])
    return torch.cat(found, 1)


def assert_same_moments(one, other, rtol):
    assert one.count == other.count
    for name, sums in one.tensors().items():
        expected = other.tensors()[name]
        assert (sums - expected).norm() <= rtol * expected.norm(), name


def assert_same_sums(one, other, rtol=0.0):
    assert one.count == other.count
    assert (one.held_out is None) == (other.held_out is None)
    for mine, theirs in zip([*one.train, *(one.held_out or [])], [*other.train, *(other.held_out or [])], strict=True):
        assert_same_moments(mine, theirs, rtol)


# ------------------------------------------------------------------------------------------------ what goes in


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "case", [{}, {"state_at": "token"}, {"last_k": 2}], ids=["predictive", "token", "last positions"]
)
def test_rows_equal_plain_forwards(models, case, padding):
    student, teacher, fresh = models
    batch = tiny_batch(padding=padding)
    found = collection()
    found.add(student, teacher, rollout_of(batch, **case), NONE_OF_4, fresh)
    gather = {"shift": 0 if case.get("state_at") == "token" else 1, "last_k": case.get("last_k")}
    own, other = plain_states(student, batch, [1, 2, 3], **gather), plain_states(teacher, batch, MAP, **gather)
    expected = BridgeFitter(MAP, STUDENT, TEACHER)
    expected.update(own, other)
    assert found.fitter.count == (8 if case.get("last_k") else 18)
    assert found.fitter.held_out is None
    assert_same_sums(found.fitter, expected, rtol=1e-5)
    for name in (RANDOM_TEACHER, RANDOM_STUDENT):
        control = BridgeFitter(MAP, STUDENT, TEACHER)
        model = fresh[name]
        control.update(
            plain_states(model, batch, [1, 2, 3], **gather) if name == RANDOM_STUDENT else own,
            plain_states(model, batch, MAP, **gather) if name == RANDOM_TEACHER else other,
        )
        assert_same_sums(found.controls[name], control, rtol=1e-5)


@pytest.mark.parametrize(("depths", "mapped"), [((5, 3), [1, 2, 2, 3, 3]), ((1, 4), [4])])
def test_a_deeper_student_reads_a_teacher_layer_twice(depths, mapped):
    student, teacher = (tiny_model(seed=seed, layers=depth) for seed, depth in enumerate(depths))
    assert map_layers(*depths) == mapped
    found = Collection(mapped, 16, 16, controls=False)
    batch = tiny_batch()
    found.add(student, teacher, rollout_of(batch), NONE_OF_4)
    expected = BridgeFitter(mapped, 16, 16)
    expected.update(plain_states(student, batch, range(1, depths[0] + 1)), plain_states(teacher, batch, mapped))
    assert_same_sums(found.fitter, expected, rtol=1e-5)


def test_a_fit_of_collected_rows_is_the_fit_of_plain_rows(models):
    student, teacher, _ = models
    batch = tiny_batch(seed=5, lengths=[(3, 40)] * 8)
    found = collection(controls=False)
    found.add(student, teacher, rollout_of(batch), LAST_TWO_OF_8)
    expected = BridgeFitter(MAP, STUDENT, TEACHER)
    states = [(student, [1, 2, 3]), (teacher, MAP)]
    for rows, held_out in ((range(6), False), (range(6, 8), True)):
        expected.update(*(plain_states(model, batch, layers, rows=rows) for model, layers in states), held_out=held_out)
    one, other = found.fitter.fit(rank=4, ridge=1e-4), expected.fit(rank=4, ridge=1e-4)
    assert one.report["fit"]["rows"] == other.report["fit"]["rows"] == 240
    assert one.report["cosine"]["after"] == pytest.approx(other.report["cosine"]["after"], abs=1e-3)
    assert one.report["explained"]["held_out"] == pytest.approx(other.report["explained"]["held_out"], abs=1e-3)


def test_held_out_rows_go_apart(models):
    student, teacher, fresh = models
    batch = tiny_batch()  # responses of 5, 2, 7 and 4 tokens
    found = collection()
    found.add(student, teacher, rollout_of(batch), marks(0, 1, 0, 1), fresh)
    for fitter in (found.fitter, *found.controls.values()):
        assert fitter.count == 5 + 7
        assert [moments.count for moments in fitter.held_out] == [2 + 4] * 3
        assert len(fitter.sample) == 2 + 4
    for part, rows in ((found.fitter.train, [0, 2]), (found.fitter.held_out, [1, 3])):
        own = plain_states(student, batch, [1, 2, 3], rows=rows)
        other = plain_states(teacher, batch, MAP, rows=rows)
        for layer, moments in enumerate(part):
            torch.testing.assert_close(moments.student_sum, own[layer].double().sum(0), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moments.teacher_sum, other[layer].double().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("held_out", [NONE_OF_4, ~NONE_OF_4])
def test_batches_with_nothing_on_one_side(models, held_out):
    student, teacher, fresh = models
    found = collection()
    found.add(student, teacher, rollout_of(tiny_batch()), held_out, fresh)
    assert found.fitter.count == (0 if held_out.all() else 18)
    assert (found.fitter.held_out is None) is not bool(held_out.all())
    assert found.batches == 1


def test_collecting_leaves_the_models_alone(models):
    student, teacher, fresh = models
    before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]

    def hooks():
        return [len(module._forward_hooks) for model in (student, teacher) for module in model.modules()]

    hooks_before = hooks()
    found = collection()
    found.add(student, teacher, rollout_of(tiny_batch()), LAST_OF_4, fresh)
    for model, state in zip((student, teacher), before, strict=True):
        assert all(model.state_dict()[name].equal(value) for name, value in state.items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks() == hooks_before
    assert not any(sums.requires_grad for sums in found.fitter.train[0].tensors().values())


# ------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (5, [1, 2, 4, 5]), (28, [1, 10, 19, 28])],
)
def test_control_layers(depth, expected):
    assert control_layers(depth) == expected


def test_controls_are_optional(models):
    found = collection(controls=False)
    found.add(*models[:2], rollout_of(tiny_batch()), LAST_OF_4)
    assert found.controls == {}
    assert found.fitter.count == 14


def test_controls_of_a_deep_student_read_four_layers(models):
    _, teacher, fresh = models
    student, other_student = (tiny_model("qwen3", seed=seed, layers=7, width=STUDENT) for seed in (0, 3))
    found = Collection(map_layers(7, 5), STUDENT, TEACHER)
    assert found.layers == [1, 3, 5, 7]
    assert found.fitter.layer_map == [1, 2, 2, 3, 4, 4, 5]
    batch = tiny_batch()
    found.add(student, teacher, rollout_of(batch), NONE_OF_4, {**fresh, RANDOM_STUDENT: other_student})
    for fitter in found.controls.values():
        assert fitter.layer_map == [1, 2, 4, 5]
    own, other = plain_states(other_student, batch, found.layers), plain_states(teacher, batch, [1, 2, 4, 5])
    expected = BridgeFitter([1, 2, 4, 5], STUDENT, TEACHER)
    expected.update(own, other)
    assert_same_sums(found.controls[RANDOM_STUDENT], expected, rtol=1e-5)


def test_shuffled_pairs_are_the_same_rows_in_another_order(models):
    student, teacher, fresh = models
    found = collection()
    found.add(student, teacher, rollout_of(tiny_batch()), NONE_OF_4, fresh)
    for shuffled, plain in zip(found.controls[SHUFFLED].train, found.fitter.train, strict=True):
        for name in ("student_student", "teacher_teacher", "student_sum", "teacher_sum"):
            torch.testing.assert_close(getattr(shuffled, name), getattr(plain, name), rtol=1e-9, atol=1e-9)
        assert (shuffled.student_teacher - plain.student_teacher).norm() > 0.1 * plain.cross_covariance().norm()


def initialised(model, seed):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(model.config).eval()


def test_controls_explain_less_than_real_pairs():
    """On trained models of two shapes. Shuffled, the rows are the same and the pairs are none: the floor under it all."""
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(resolve_path(f"miniature:{name}"), dtype=torch.float32)
        for name in ("student", "wide-teacher")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_path("miniature:student"))
    again = {RANDOM_TEACHER: initialised(teacher, 1), RANDOM_STUDENT: initialised(student, 2)}
    found, problems = Collection(map_layers(4, 6), 64, 96), random.Random(0)
    for _ in range(4):
        chosen = [training_problem(problems) for _ in range(32)]
        prompt, completion = (
            tokenizer([problem[side] for problem in chosen], padding=True, padding_side=where, return_tensors="pt")
            for side, where in (("prompt", "left"), ("solution", "right"))
        )
        batch = {
            "prompt_ids": prompt.input_ids,
            "prompt_mask": prompt.attention_mask,
            "completion_ids": completion.input_ids,
            "completion_mask": completion.attention_mask,
        }
        found.add(student, teacher, rollout_of(batch), torch.arange(32) >= 26, again)
    reports = {name: fitter.fit(rank=8).report for name, fitter in every_fitter(found).items()}
    fitted, held_out = (
        {name: report["explained"][side][-1] for name, report in reports.items()} for side in ("train", "held_out")
    )
    assert found.fitter.count > 2500
    assert fitted[SHUFFLED] < 2 * 64 / found.fitter.count  # d_S / n is explained by accident
    assert -0.05 < held_out[SHUFFLED] < 0.01
    assert held_out["bridge"] > 0.7
    for name in (RANDOM_TEACHER, RANDOM_STUDENT):
        assert held_out[SHUFFLED] + 0.05 < held_out[name] < held_out["bridge"] - 0.3
    cosine = {name: report["cosine"]["after"] for name, report in reports.items()}
    assert max(map(abs, cosine[SHUFFLED])) < 0.15
    assert min(cosine["bridge"]) > 0.85


# ------------------------------------------------------------------------------------------------ stop and go on


def collect_some(found, models, seeds):
    student, teacher, fresh = models
    for seed in seeds:
        found.add(student, teacher, rollout_of(tiny_batch(seed=seed)), LAST_OF_4, fresh)
    return found


def every_fitter(found):
    return {"bridge": found.fitter, **found.controls}


def assert_same_collections(one, other, rtol=1e-12):
    assert one.batches == other.batches
    assert list(every_fitter(one)) == list(every_fitter(other))
    for mine, theirs in zip(every_fitter(one).values(), every_fitter(other).values(), strict=True):
        assert_same_sums(mine, theirs, rtol)
        assert len(mine.sample) == len(theirs.sample)
        (a, b) = (fitter.fit(ridge=1e-4).report for fitter in (mine, theirs))
        for name in ("before", "after"):
            assert a["cosine"][name] == pytest.approx(b["cosine"][name], abs=1e-6)


@pytest.mark.parametrize("controls", [True, False])
def test_continuing_gives_what_an_uninterrupted_collection_gives(models, controls, tmp_path):
    path = tmp_path / "collected.safetensors"
    collect_some(collection(controls=controls), models, [1, 2]).save(path, KEY)
    continued = collection(controls=controls)
    assert continued.load(path, copy.deepcopy(KEY)) is True
    assert continued.batches == 2
    collect_some(continued, models, [3, 4])
    assert_same_collections(continued, collect_some(collection(controls=controls), models, [1, 2, 3, 4]))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_was_loaded_is_what_was_saved(models, tmp_path):
    path = tmp_path / "collected.safetensors"
    saved, loaded = collect_some(collection(), models, [1, 2]), collection()
    saved.save(path, KEY)
    assert loaded.load(path, KEY)
    assert_same_collections(loaded, saved, rtol=0.0)
    for mine, theirs in zip(every_fitter(loaded).values(), every_fitter(saved).values(), strict=True):
        assert mine.sample.keys.equal(theirs.sample.keys)
        for side in ("student", "teacher"):
            for a, b in zip(getattr(mine.sample, side), getattr(theirs.sample, side), strict=True):
                assert a.equal(b)


def test_saving_again_replaces(models, tmp_path):
    path, found = tmp_path / "collected.safetensors", collection()
    for seed in (1, 2):
        collect_some(found, models, [seed])
        found.save(path, KEY)
    again = collection()
    assert again.load(path, KEY)
    assert_same_collections(again, found)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, before_of(path).name}
    assert (Collection.batches_in(path, KEY), Collection.batches_in(before_of(path), KEY)) == (2, 1)
    assert Collection.batches_in(path, {**KEY, "seed": 99}) is None


def test_a_collection_without_held_out_rows_can_be_continued(models, tmp_path):
    student, teacher, fresh = models
    path, found, again = tmp_path / "collected.safetensors", collection(), collection()
    found.add(student, teacher, rollout_of(tiny_batch()), NONE_OF_4, fresh)
    found.save(path, KEY)
    assert again.load(path, KEY)
    assert again.fitter.held_out is None
    assert len(again.fitter.sample) == 0
    for one in (found, again):
        one.add(student, teacher, rollout_of(tiny_batch(seed=2)), LAST_OF_4, fresh)
    assert_same_collections(again, found)


@pytest.mark.parametrize("key", [{}, {**KEY, "seed": 2}, {**KEY, "more": 1}, {**KEY, "nested": {"a": 1}}])
def test_another_key_is_not_continued(models, key, tmp_path):
    path = tmp_path / "collected.safetensors"
    collect_some(collection(), models, [1]).save(path, KEY)
    fresh = collection()
    assert fresh.load(path, key) is False
    assert (fresh.batches, fresh.fitter.count, len(fresh.fitter.sample)) == (0, 0, 0)
    assert fresh.load(path, {**KEY, "fitted": (1, 2)}) is True  # a tuple is a list once it was JSON


def test_nothing_to_continue(tmp_path):
    fresh = collection()
    assert fresh.load(tmp_path / "nowhere.safetensors", KEY) is False
    assert fresh.batches == 0


def held_out_rows(found, numbers):
    """Held-out rows that carry their number, straight into the fitter."""
    column = torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1)
    found.fitter.update(column.expand(3, -1, STUDENT), column.expand(3, -1, TEACHER), held_out=True)


def test_continuing_keeps_the_sample_uniform(tmp_path):
    """A continued sample goes on drawing; were its draws to begin anew, the same places of each part would be kept."""
    path, whole, found = tmp_path / "collected.safetensors", collection(controls=False), collection(controls=False)
    for part in range(4):
        numbers = list(range(1000 * part, 1000 * (part + 1)))
        held_out_rows(whole, numbers)
        held_out_rows(found, numbers)
        found.save(path, KEY)
        found = collection(controls=False)
        assert found.load(path, KEY)
    assert len(found.fitter.sample) == SAMPLE_ROWS
    places = found.fitter.sample.student[0][:, 0].long() % 1000
    assert len(places.unique()) > 600  # of 1024 independent draws in 4 parts; 256 if the parts drew alike
    expected, got = (sorted(one.fitter.sample.student[0][:, 0].tolist()) for one in (whole, found))
    assert got == expected


# ------------------------------------------------------------------------------------------------ several processes


def test_two_merged_are_one_over_both(models):
    one, other = collect_some(collection(), models, [1, 2]), collect_some(collection(), models, [3])
    whole = collect_some(collection(), models, [1, 2, 3])
    one.merge(other)
    assert_same_sums(one.fitter, whole.fitter, rtol=1e-12)
    assert sorted(one.fitter.sample.student[0][:, 0].tolist()) == sorted(whole.fitter.sample.student[0][:, 0].tolist())
    for name in (RANDOM_TEACHER, RANDOM_STUDENT):
        assert_same_sums(one.controls[name], whole.controls[name], rtol=1e-12)
    assert one.controls[SHUFFLED].count == whole.controls[SHUFFLED].count == one.fitter.count
    assert len(one.controls[SHUFFLED].sample) == len(whole.controls[SHUFFLED].sample) == 12
    assert other.fitter.count == 14


def test_merging_what_was_saved(models, tmp_path):
    """As the main process does it: load the other's file into a fresh collection, then add it."""
    path = tmp_path / "collected.safetensors"
    collect_some(collection(), models, [3]).save(path, KEY)
    one, other = collect_some(collection(), models, [1, 2]), collection()
    assert other.load(path, KEY)
    one.merge(other)
    assert_same_sums(one.fitter, collect_some(collection(), models, [1, 2, 3]).fitter, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ prediction


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(own, other):
    return own == other


def fitter_of(student, teacher, held_out=400):
    fitter = BridgeFitter([1], student.shape[-1], teacher.shape[-1])
    fitter.update(student[None, held_out:], teacher[None, held_out:])
    fitter.update(student[None, :held_out], teacher[None, :held_out], held_out=True)
    return fitter


STATES = normal(3000, 8, seed=1) + 2  # of the student
HEAD = normal(8, VOCAB, seed=2)
WIDER = normal(8, 12, seed=3)


def test_predict_an_exact_map():
    """The teacher's states are the student's in other coordinates, and so is its head."""
    teacher = STATES @ WIDER + 5
    back = torch.linalg.pinv(WIDER)
    rates = predict(fitter_of(STATES, teacher), lambda h: h @ HEAD, lambda h: (h - 5) @ back @ HEAD, same, ridge=1e-10)
    assert rates == {"student_agreement": 1.0, "mapped_teacher_agreement": 1.0, "rows": 400}


def test_predict_what_the_student_lacks():
    """The student sees the teacher's states through noise; the map takes the noise out."""
    teacher = STATES @ WIDER
    student = STATES + normal(3000, 8, seed=4) * 0.5
    back = torch.linalg.pinv(WIDER)
    rates = predict(fitter_of(student, teacher), lambda h: h @ HEAD, lambda h: h @ back @ HEAD, same)
    assert 0.2 < rates["student_agreement"] < 0.8
    assert rates["mapped_teacher_agreement"] > 0.9
    own = ((student[:400] @ HEAD).argmax(-1) == (STATES[:400] @ HEAD).argmax(-1)).float().mean().item()
    assert rates["student_agreement"] == pytest.approx(own)


def test_predict_an_unrelated_teacher():
    teacher, head = normal(3000, 12, seed=5), normal(12, VOCAB, seed=6)
    rates = predict(fitter_of(STATES, teacher), lambda h: h @ HEAD, lambda h: h @ head, same)
    assert rates["student_agreement"] < 0.15
    assert rates["mapped_teacher_agreement"] < 0.15


def test_predict_a_map_that_loses_more_than_the_student_lacks():
    """The student has spelled out what the teacher's head makes of its states, which no linear map can."""
    teacher = normal(3000, 2, seed=7)

    def read(states):
        return torch.cat([states**2, torch.ones_like(states[:, :1])], 1)

    rates = predict(fitter_of(read(teacher), teacher), lambda h: h, read, same)
    assert rates["student_agreement"] == 1.0
    assert 0.1 < rates["mapped_teacher_agreement"] < 0.6


def test_predict_compares_tokens_by_the_given_rule():
    """Another vocabulary: the teacher's ids are the student's, turned."""
    turned = HEAD.roll(5, dims=1)
    ask = {"ids": lambda own, other: (own + 5) % VOCAB == other, "same": same}
    rates = {
        name: predict(fitter_of(STATES, STATES), lambda h: h @ HEAD, lambda h: h @ turned, rule, ridge=1e-10)
        for name, rule in ask.items()
    }
    assert rates["ids"]["student_agreement"] == rates["ids"]["mapped_teacher_agreement"] == 1.0
    assert rates["same"]["student_agreement"] == 0.0


def test_predict_reads_the_last_layer():
    fitter = BridgeFitter([1, 2], 8, 12)
    noise, teacher = normal(3000, 8, seed=9), STATES @ WIDER
    fitter.update([noise[400:], STATES[400:]], [teacher[400:], teacher[400:]])
    fitter.update([noise[:400], STATES[:400]], [teacher[:400], teacher[:400]], held_out=True)
    back = torch.linalg.pinv(WIDER)
    rates = predict(fitter, lambda h: h @ HEAD, lambda h: h @ back @ HEAD, same, ridge=1e-10)
    assert rates["student_agreement"] == rates["mapped_teacher_agreement"] == 1.0


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_reverse_map_is_lstsq_from_teacher_to_student(ridge):
    student, teacher = STATES[:500].double(), (STATES @ WIDER)[:500, :6].double() + normal(500, 6, seed=4)
    fitter = BridgeFitter([1], 8, 6)
    fitter.update(student[None], teacher[None])
    linear, teacher_mean, student_mean = reverse_map(fitter, ridge)
    torch.testing.assert_close(teacher_mean, teacher.mean(0))
    torch.testing.assert_close(student_mean, student.mean(0))
    rows, aims = teacher - teacher.mean(0), student - student.mean(0)
    scale = (500 * ridge * rows.pow(2).mean()).sqrt()
    rows, aims = torch.cat([rows, scale * torch.eye(6)]), torch.cat([aims, torch.zeros(6, 8)])
    torch.testing.assert_close(linear, torch.linalg.lstsq(rows, aims).solution.T, rtol=1e-7, atol=1e-9)


def test_a_batch_of_one_response_is_shuffled_with_the_response_before():
    """Within one response a shuffled pair still shares its topic."""
    collection = Collection([1], 2, 2)
    own, other = torch.zeros(5, 2), torch.arange(10.0).view(5, 2)
    collection._before = [torch.full((3, 2), 7.0)]
    flags = torch.tensor([True, False, False, True, False])
    a, b, held_out = collection._shuffled([own], [other], flags, one_response=True)
    assert b[0].eq(7).all() and len(a[0]) == len(b[0]) == len(held_out) == 3
    a, b, held_out = collection._shuffled([own], [other], flags, one_response=False)
    assert b[0].sort(0).values.equal(other) and not b[0].equal(other) and held_out.equal(flags)
