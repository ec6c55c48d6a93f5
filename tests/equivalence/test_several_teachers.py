"""Several teachers into one student, against sums by hand over rows and teachers."""

import pytest
import torch

from oprd.bridge import Bridge
from tiny import (
    PROMPTS,
    WIDE,
    canned_completion,
    canned_trainer,
    logged,
    random_bridge,
    reference_states,
    tiny_model,
    tiny_tokenizer,
)

KINDS = ["even", "odd"] * 8
NAMED = {"columns": {"kind": KINDS}, "teacher_column": "kind", "logit_weight": 0, "lm_head": "keep"}
RATE = 1e-2


def models(**changed):
    return {"even": tiny_model(seed=1), "odd": tiny_model(seed=2), **changed}


def row_loss(student, teacher, prompt, layers=(1, 2, 3)):
    """Eq. 6 of one response."""
    ids = tiny_tokenizer()(prompt)["input_ids"]
    response = canned_completion(ids)
    ours = reference_states(student, torch.tensor(ids + response))[:, len(ids) - 1 : -1]
    with torch.no_grad():
        theirs = reference_states(teacher, torch.tensor(ids + response))[:, len(ids) - 1 : -1]
    return torch.stack([(ours[layer] - theirs[layer]).pow(2).mean() for layer in layers]).mean()


def by_hand(rows_loss, steps=2):
    """SGD on a loss of (student, numbers of rows); the student and the losses."""
    student, losses = tiny_model(seed=0), []
    for step in range(steps):
        student.zero_grad()
        loss = rows_loss(student, range(8 * step, 8 * step + 8))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
    return student, losses


def assert_is(trainer, twin):
    student, losses = twin
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, dict(student.named_parameters())[name], atol=2e-6, rtol=1e-4)


VARIANTS = {
    "padded": {},
    "packed": {"max_tokens_per_microbatch": 26},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "one in memory at a time": {"offload_teacher": True, "offload_targets": True},
    "suffixes": {"gradient_scope": "suffix"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_has_its_teacher(tmp_path, variant):
    """By a column, with a weight for one of them; every row counts alike in the mean."""
    weights = {"even": 1.0, "odd": 2.5}
    settings = {"teachers": {name: {"weight": weight} for name, weight in weights.items()}, **NAMED}
    trainer = canned_trainer(tmp_path, teacher=models(), **settings | VARIANTS[variant])
    # Of a suffix the whole response is supervised here, so its gradient is short of the prompt's only.
    trainer.train()
    teachers = models()

    def loss(student, rows):
        return sum(weights[KINDS[n]] * row_loss(student, teachers[KINDS[n]], PROMPTS[n]) for n in rows) / 8

    if variant == "suffixes":
        assert logged(trainer)[0] == pytest.approx(by_hand(loss, steps=1)[1][0], rel=1e-4)
        return
    assert_is(trainer, by_hand(loss))
    for name in ("even", "odd"):
        found = logged(trainer, f"loss/{name}/representation")
        assert found[0] == pytest.approx(
            sum(
                weights[name] * row_loss(tiny_model(seed=0), teachers[name], PROMPTS[n])
                for n in range(8)
                if KINDS[n] == name
            ).item()
            / 8,
            rel=1e-4,
        )
        assert 0 < abs(logged(trainer, f"{name}/cosine")[0]) < 1


@pytest.mark.parametrize("variant", ["padded", "packed", "one in memory at a time"])
@pytest.mark.parametrize("output", ["none", "full"])
def test_all_teachers_read_every_row(tmp_path, variant, output):
    """With shares for weights; one forward of the student for all."""
    settings = {"teachers": {"even": {"weight": 3}, "odd": {"weight": 1}}, "logit_weight": 0, "lm_head": "keep"}
    trainer = canned_trainer(tmp_path, teacher=models(), output_loss=output, **settings, **VARIANTS[variant])
    passes = []
    trainer.model.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    teachers = models()

    def loss(student, rows):
        total = 0.0
        for share, teacher in ((0.75, teachers["even"]), (0.25, teachers["odd"])):
            for n in rows:
                total = total + share * row_loss(student, teacher, PROMPTS[n])
                if output == "full":
                    total = total + share * kl(student, teacher, PROMPTS[n])
        return total / 8

    assert_is(trainer, by_hand(loss))
    if variant == "padded":
        assert sum(passes) == 2  # forwards with gradient: one an update


def kl(student, teacher, prompt):
    ids = tiny_tokenizer()(prompt)["input_ids"]
    response = canned_completion(ids)
    p = student(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        q = teacher(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


RULES = {"short": {"when": {"prompt": "^..?$"}}, "letters": {"when": {"prompt": "^[a-z]+$"}}, "rest": {}}


def test_the_first_rule_that_matches(tmp_path):
    teachers = {name: tiny_model(seed=1 + place) for place, name in enumerate(RULES)}
    trainer = canned_trainer(tmp_path, teacher=teachers, teachers=RULES, logit_weight=0, lm_head="keep")
    found = ["short" if len(p) < 3 else "letters" if p.isalpha() else "rest" for p in PROMPTS]
    assert [list(RULES)[trainer.routes.index({"prompt": p})] for p in PROMPTS] == found
    assert set(found) == set(RULES)
    trainer.train()
    fresh = {name: tiny_model(seed=1 + place) for place, name in enumerate(RULES)}
    assert_is(trainer, by_hand(lambda s, rows: sum(row_loss(s, fresh[found[n]], PROMPTS[n]) for n in rows) / 8))


def test_a_bridged_teacher_beside_one_of_the_family(tmp_path):
    """Each through its own: raw states of one, projections of the other."""
    bridge = random_bridge()
    teachers = {"even": tiny_model(seed=1), "odd": tiny_model(seed=2, **WIDE)}
    trainer = canned_trainer(tmp_path, teacher=teachers, trainer_kwargs={"bridge": {"odd": bridge}}, **NAMED)
    trainer.train()
    fresh = {"even": tiny_model(seed=1), "odd": tiny_model(seed=2, **WIDE)}

    def loss(student, rows):
        own = {"even": row_loss, "odd": lambda s, t, p: bridged_loss(s, t, p, bridge)}
        return sum(own[KINDS[n]](student, fresh[KINDS[n]], PROMPTS[n]) for n in rows) / 8

    assert_is(trainer, by_hand(loss))
    assert [teacher.objective.representation_loss for teacher in trainer.teachers] == ["mse", "normalized_mse"]


def bridged_loss(student, teacher, prompt, bridge: Bridge):
    ids = tiny_tokenizer()(prompt)["input_ids"]
    response = canned_completion(ids)
    ours = reference_states(student, torch.tensor(ids + response))[:, len(ids) - 1 : -1]
    with torch.no_grad():
        theirs = reference_states(teacher, torch.tensor(ids + response))[:, len(ids) - 1 : -1]
    terms = []
    for layer in (1, 2, 3):
        a = torch.nn.functional.normalize(bridge.project_student(layer, ours[layer]), dim=-1)
        b = torch.nn.functional.normalize(bridge.project_teacher(layer, theirs[bridge.layer_map[layer - 1]]), dim=-1)
        terms.append((a - b).pow(2).sum(-1).mean())
    return torch.stack(terms).mean()


def test_the_mean_of_their_heads(tmp_path):
    teachers = {
        "teachers": {"even": {"weight": 3}, "odd": {"weight": 1}},
        "columns": {"kind": KINDS},
        "teacher_column": "kind",
    }
    trainer = canned_trainer(tmp_path, teacher=models(), lm_head="teacher", **teachers)
    one, other = (model.lm_head.weight for model in models().values())
    torch.testing.assert_close(trainer.model.lm_head.weight, 0.75 * one + 0.25 * other)
    assert trainer.lm_head == "teacher"
    kept = canned_trainer(tmp_path, teacher=models(), lm_head="keep", **teachers)
    assert kept.model.lm_head.weight.equal(tiny_model(seed=0).lm_head.weight)
    tied = canned_trainer(tmp_path, model=tiny_model(seed=0, tied=True), teacher=models(), **teachers)
    assert (tied.lm_head, tied.objective.logit_weight) == ("keep", 1.0)


def test_accuracy_and_metrics_are_those_of_all_rows(tmp_path):
    trainer = canned_trainer(tmp_path, teacher=models(), answers=["7"] * 16, **NAMED)
    trainer.train()
    entry = trainer.state.log_history[0]
    both = [entry[f"loss/{name}/representation"] for name in ("even", "odd")]
    assert entry["loss/representation"] == pytest.approx(sum(both), rel=1e-5)
    assert "accuracy" in entry


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({}, {"columns": {}}, "train_dataset has no column 'kind', by which teachers are chosen"),
        (
            {},
            {"columns": {"kind": ["even"] * 15 + ["none"]}},
            "train_dataset, row 16: kind is 'none', which is none of even, odd",
        ),
        ({}, {"columns": {"kind": ["even"] * 16}}, "No row of train_dataset asks odd. Remove it"),
        ({}, {"teachers": {"even": {}, "odd": {}, "more": {}}}, "teachers: more has no model"),
        ({}, {"teachers": {"even": {}}}, r"teacher_model has 'odd', which is no name among teachers \(even\)"),
        ({}, {"teachers": {"even": {"when": {"prompt": "a"}}, "odd": {}}}, "both choose a teacher. Remove one"),
        ({"bridge": {"other": "x"}}, {}, "bridge has 'other', which is no name"),
        ({"bridge": "x"}, {}, "pass bridge as a mapping of the teachers' names"),
    ],
)
def test_what_cannot_be(tmp_path, given, settings, message):
    named = {"teachers": {"even": {}, "odd": {}}, **NAMED, **settings}
    with pytest.raises(ValueError, match=message):
        canned_trainer(tmp_path, teacher=models(), trainer_kwargs=given, **named)


def test_no_rule_for_a_row(tmp_path):
    teachers = {"even": {"when": {"prompt": "^[a-h]"}}, "odd": {"when": {"prompt": "^[i-m]"}}}
    with pytest.raises(
        ValueError, match=r"train_dataset, row 3: no teacher's when matches. Let the last teacher have none"
    ):
        canned_trainer(tmp_path, teacher=models(), teachers=teachers, logit_weight=0)
    teachers = {"even": {}, "odd": {"when": {"prompt": "x"}}}
    with pytest.raises(ValueError, match="even has no when and would take every row before"):
        canned_trainer(tmp_path, teacher=models(), teachers=teachers, logit_weight=0)


def test_a_teacher_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="teachers: odd: The student has 3 layers of width 16, the teacher 5"):
        canned_trainer(tmp_path, teacher={"even": tiny_model(seed=1), "odd": tiny_model(seed=2, **WIDE)}, **NAMED)


def test_shares_of_one_named_teacher(tmp_path):
    """Where all read every row weights are shares, of one teacher the whole."""
    one = canned_trainer(
        tmp_path / "a", teacher={"a": tiny_model(seed=1)}, teachers={"a": {"weight": 3}}, logit_weight=0
    )
    plain = canned_trainer(tmp_path / "b", teacher=tiny_model(seed=1), logit_weight=0)
    for trainer in (one, plain):
        trainer.train()
    assert logged(one) == pytest.approx(logged(plain), rel=1e-6)


def test_a_share_of_pairs_is_not_logged_where_a_teacher_reads_nothing(tmp_path):
    teachers = {name: {"when": {"prompt": p}} if p else {} for name, p in (("even", "abcdef|^ab$"), ("odd", None))}
    settings = {"teacher_prompt_template": "a{prompt}", "logit_weight": 0, "lm_head": "keep", "logging_steps": 2}
    trainer = canned_trainer(tmp_path, teacher=models(), teachers=teachers, **settings)
    trainer.train()
    assert logged(trainer, "even/paired_share") == logged(trainer, "odd/paired_share") == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation_loss": "transition", "transition_over": "layers"}, "what a bridge can have"),
        ({"layer_map": [1, 2, 3]}, "layer_map would be ignored: a bridge"),
        ({"layer_weighting": "teacher_rms"}, "teacher_rms would be ignored: through a bridge"),
    ],
)
def test_settings_that_a_bridge_leaves_nothing_of(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        canned_trainer(
            tmp_path, teacher=tiny_model(seed=2, **WIDE), trainer_kwargs={"bridge": random_bridge()}, **settings
        )


def test_the_student_itself_among_them(tmp_path):
    student = tiny_model(seed=0)
    with pytest.raises(ValueError, match="Student and teacher are one object"):
        canned_trainer(tmp_path, model=student, teacher={"even": student, "odd": tiny_model(seed=1)}, **NAMED)


def test_a_second_stage_does_not_inherit_bridges(tmp_path):
    from oprd.training.recipe import second_stage

    recipe = tmp_path / "r.yaml"
    recipe.write_text("model_name_or_path: x\nteachers: {a: {model_name_or_path: y, bridge: z}}\n")
    with pytest.raises(ValueError, match="then: the bridge of a was fitted for the student of the first stage"):
        second_stage(["--config", str(recipe)], {"output_loss": "full"}, tmp_path)


def test_a_record_tells_bridges_apart(tmp_path):
    from oprd.training.config import OPRDConfig
    from oprd.training.teacher import teacher_record

    records = []
    for seed in (0, 1):
        random_bridge(seed=seed).save_pretrained(tmp_path / f"bridge-{seed}")
        settings = {"a": {"model_name_or_path": "miniature:teacher", "bridge": str(tmp_path / f"bridge-{seed}")}}
        args = OPRDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", teachers=settings)
        records.append(teacher_record(args, {}))
    assert records[0]["hash"] != records[1]["hash"]
