"""Which of the teacher's layers a student's are compared with: settings, records, and what does not fit."""

import copy

import pytest
import torch
import yaml

from oprd import OPRDConfig
from oprd.compression import drop_blocks
from oprd.insight.planner import GB, plan_setup
from oprd.insight.recipe_plan import setup_of
from oprd.objectives import position_weights, select_positions
from oprd.states import make_rollout
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, question_of, teacher_states
from oprd.training.preflight import check_layer_map, check_models
from oprd.training.recipe import parse
from tiny import (
    VOCAB,
    canned_completion,
    canned_trainer,
    logged,
    reference_states,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)

KEPT, MAP = [1, 3, 4], (1, 3, 5)


def pruned_pair(**model):
    """A teacher of five layers and a student of three of them."""
    teacher = tiny_model(layers=5, **model)
    student = copy.deepcopy(teacher)
    drop_blocks(student, KEPT)
    return student, teacher


# ----------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("layers", [(1, 2, 3), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_twin(layers, checkpointing):
    """Mapped layers, one unpadded row at a time."""
    student, teacher = pruned_pair(dtype=torch.float64)
    teacher.requires_grad_(False)
    if checkpointing:
        student.train().gradient_checkpointing_enable({"use_reentrant": False})
    batch = tiny_batch()
    mask = select_positions(batch["completion_mask"].bool(), "last_k", 3)
    weights = position_weights(mask)
    rollout = make_rollout(*batch.values(), state_weights_BC=weights, output_weights_BC=weights)
    objective = Objective(layers, 3, VOCAB, layer_map=MAP)
    assert question_of(objective, rollout).layers == {layer: MAP[layer - 1] for layer in layers}

    loss, _, _ = student_loss(objective, student, teacher, rollout, teacher_states(objective, teacher, rollout))
    loss.backward()
    ours = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    values = []
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        own, other = (reference_states(model, torch.cat([prompt, completion])) for model in (student, teacher))
        at = [len(prompt) + t - 1 for t in range(len(completion)) if mask[row, t]]
        gaps = [(own[layer, at] - other[MAP[layer - 1], at]).pow(2).mean(-1) for layer in layers]
        values.append(torch.stack(gaps).mean())
    slow = torch.stack(values).mean()
    slow.backward()
    torch.testing.assert_close(loss.double(), slow, atol=1e-6, rtol=1e-5)
    assert slow > 1e-3
    for name, p in student.named_parameters():
        twin = torch.zeros_like(p) if p.grad is None else p.grad
        found = torch.zeros_like(p) if ours[name] is None else ours[name]
        torch.testing.assert_close(found, twin, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_whole_student_with_a_map_of_its_own_layers_is_one_without(tmp_path):
    plain, mapped = (
        logged(_train(canned_trainer(tmp_path / str(number), layer_map=layer_map)))
        for number, layer_map in enumerate((None, "1,2,3"))
    )
    assert plain == mapped and len(plain) == 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_tokens_per_microbatch": 64}, {"gradient_checkpointing": True}, {"per_device_train_batch_size": 4}],
    ids=["plain", "packed", "checkpointed", "smaller batches"],
)
def test_a_trainer_takes_the_recorded_map(tmp_path, settings):
    """Against the states read plainly: the loss of the first step, before anything has moved."""
    student, teacher = pruned_pair()
    size = settings.get("per_device_train_batch_size", 8)
    expected = _first_loss(student, teacher, [f"{'abcdefgh'[: n + 1]}" for n in range(size)])
    prompts = [f"{'abcdefgh'[: n + 1]}" for n in range(size)]
    trainer = canned_trainer(tmp_path, model=student, teacher=teacher, prompts=prompts, max_steps=1, **settings)
    assert trainer.objective.layer_map == MAP and trainer.lm_head == "teacher"
    assert logged(_train(trainer))[0] == pytest.approx(expected, rel=1e-4)


def _train(trainer):
    trainer.train()
    return trainer


@torch.no_grad()
def _first_loss(student, teacher, prompts):
    tokenizer, values = tiny_tokenizer(), []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        completion = canned_completion(ids)
        own, other = (reference_states(model.eval(), torch.tensor(ids + completion)) for model in (student, teacher))
        at = slice(len(ids) - 1, len(ids) + len(completion) - 1)
        gaps = [(own[layer, at] - other[MAP[layer - 1], at]).pow(2).mean() for layer in (1, 2, 3)]
        values.append(torch.stack(gaps).mean())
    return torch.stack(values).mean().item()


# ------------------------------------------------------------------------------------------------- settings and checks


@pytest.mark.parametrize(
    ("given", "recorded", "depths", "expected"),
    [
        (None, None, (3, 3), None),
        (None, None, (3, 5), None),
        (None, MAP, (3, 5), MAP),
        ([1, 1, 5], None, (3, 5), (1, 1, 5)),
        ([1, 2, 4], MAP, (3, 4), (1, 2, 4)),  # the user's wins
    ],
)
def test_the_map_that_counts(given, recorded, depths, expected):
    assert check_layer_map(given, recorded, *depths) == expected


@pytest.mark.parametrize(
    ("given", "recorded", "depths", "said"),
    [
        (None, MAP, (3, 4), "pruned from a model of 5 layers .layer map 1,3,5., and this teacher has 4.*set layer_map"),
        (None, MAP, (3, 6), "pruned from a model of 5 layers .*this teacher has 6"),
        (None, MAP, (4, 5), "record 1,3,5 names 3 layers for a student of 4"),
        ([1, 2], None, (3, 5), "layer_map 1,2 names 2 layers for a student of 3"),
        ([0, 1, 2], None, (3, 5), "must not descend, nor leave the teacher's layers 1..5"),
        ([1, 2, 6], None, (3, 5), "must not descend, nor leave the teacher's layers 1..5"),
        ([1, 3, 2], None, (3, 5), "must not descend"),
    ],
)
def test_maps_that_do_not_fit(given, recorded, depths, said):
    with pytest.raises(ValueError, match=said):
        check_layer_map(given, recorded, *depths)


def test_preflight_of_a_pruned_pair():
    student, teacher = (model.config for model in pruned_pair())

    def check(**more):
        return check_models(student, more.pop("teacher", teacher), tiny_tokenizer(), layers="all", **more)

    assert check(compares_states=True).layer_map == MAP
    assert check(compares_states=False).layer_map is None
    assert check(compares_states=True, layer_map=[2, 3, 5]).layer_map == (2, 3, 5)
    wider = tiny_model(layers=5, width=24).config
    with pytest.raises(ValueError, match=r"3 layers of width 16, the teacher 5 of width 24.*oprd bridge fit"):
        check(compares_states=True, teacher=wider)
    assert check(compares_states=False, teacher=wider).layer_map is None


@pytest.mark.parametrize("value", ["1,2,4,6", [1, 2, 4, 6], "[1, 2, 4, 6]", "(1,2,4,6)"])
def test_maps_as_people_write_them(tmp_path, value):
    assert OPRDConfig(output_dir=str(tmp_path), use_cpu=True, layer_map=value).layer_map == [1, 2, 4, 6]


@pytest.mark.parametrize("value", ["all", "1,b", "", [], [1.5], {"1": 2}], ids=str)
def test_maps_that_are_none(tmp_path, value):
    with pytest.raises(ValueError, match=r"layer_map=.* must be the teacher's layer of each student layer, such as"):
        OPRDConfig(output_dir=str(tmp_path), use_cpu=True, layer_map=value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bridge": "x"}, "layer_map would be ignored .a bridge has a layer map of its own"),
        ({"representation_weight": 0, "logit_weight": 1.0}, "layer_map would be ignored .representation_weight is 0"),
    ],
)
def test_maps_that_would_be_ignored(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        OPRDConfig(output_dir=str(tmp_path), use_cpu=True, layer_map="1,2", **settings)


def test_a_recipe_says_it_as_a_list(tmp_path):
    recipe = {"layer_map": [1, 3, 5], "output_dir": str(tmp_path), "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = parse(["--config", str(tmp_path / "recipe.yaml")])
    assert told.args.layer_map == [1, 3, 5]
    told = parse(["--config", str(tmp_path / "recipe.yaml"), "--layer_map", "2,3,5"])
    assert told.args.layer_map == [2, 3, 5]


def test_a_pruned_pair_can_be_planned(tmp_path):
    for role, model in zip(("student", "teacher"), pruned_pair(), strict=True):
        model.save_pretrained(tmp_path / role)
    names = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "output_dir": "run"}
    keys = [part for key, name in names.items() for part in (f"--{key}", str(tmp_path / name))]

    def setup(*more):
        configs = parse([*keys, "--max_completion_length", "16", *more, "--use_cpu", "true"], "plan")
        return setup_of(configs, bf16=True, prompt_tokens=8, processes=1, sharding="none")[0]

    found = setup()
    assert found.objective.layer_map == MAP
    assert setup("--layer_map", "2,3,5").objective.layer_map == (2, 3, 5)
    assert plan_setup(found, 80 * GB).fits
    with pytest.raises(ValueError, match="this teacher has 3"):
        setup("--teacher_model_name_or_path", str(tmp_path / "student"))
