"""What is advised follows from what was measured."""

import copy

import pytest

from oprd.insight.advice import BRIDGE, DIRECT, OUTPUTS, advise, recipe_of, verdict

FILES = {
    "layers": [2, 2],
    "width": [8, 8],
    "vocabulary": [100_000, 100_000],
    "reading": "same",
    "layer_map": None,
    "pruned_from_teacher": False,
    "end_tokens": ["<end>", "<end>"],
    "ends_alike": True,
}
LAYER = {"cosine": 0.9, "cosine_shuffled": 0.1, "cosine_trimmed": 0.9, "distance": 1.0, "explained": 0.8, "cka": 0.9}
SCORE = {"value": 30.0, "low": 25.0, "high": 35.0}
FOUND = {
    "layers": [{"layer": 1, "teacher_layer": 1, **LAYER}, {"layer": 2, "teacher_layer": 2, **LAYER}],
    "positions": [{"k": 1, "kl_first": 0.1, "kl_last": 0.4}, {"k": 2, "kl_first": 0.4, "kl_last": 0.4}],
    "activations": {"student": [{"massive": False}] * 2, "teacher": [{"massive": False}] * 2},
    "choices": {
        "kl": 0.4,
        "agreement": 0.9,
        "teacher_under_student_head/agreement": 0.95,
        "student_under_teacher_head/agreement": 0.9,
    },
    "bridge": {"explained": 0.9, "explained_by_chance": 0.0, "rank": 8, "rows": 5000, "enough_rows": True},
    "heads": {
        "student_tied": False,
        "teacher_tied": False,
        "drift": 0.2,
        "why_not_adopted": None,
        "why_not_solved": None,
    },
    "paired_share": 1.0,
}


def found(**changes):
    """The pattern with changes; ``states=`` sets every layer's."""
    value = copy.deepcopy(FOUND)
    for layer in value["layers"]:
        layer |= changes.get("states", {})
    return value | {name: part for name, part in changes.items() if name != "states"}


def told(files, **students):
    return {one["topic"]: one["say"] for one in advise(files, students)}


UNRELATED = {"explained": -0.5, "cosine": 0.0}
NO_MAP = FOUND["bridge"] | {"explained": 0.01}


@pytest.mark.parametrize(
    ("files", "changes", "expected"),
    [
        ({}, {}, DIRECT),
        ({}, {"states": UNRELATED}, BRIDGE),
        ({}, {"states": UNRELATED, "bridge": NO_MAP}, OUTPUTS),
        ({}, {"states": UNRELATED, "bridge": None}, OUTPUTS),
        ({"reading": "other tokens"}, {}, OUTPUTS),
        ({"reading": "other prompt"}, {}, DIRECT),
    ],
    ids=["same origin", "a linear map", "nothing linear", "no map", "other tokens", "other prompt"],
)
def test_verdict(files, changes, expected):
    assert verdict(FILES | files, found(**changes)) == expected


def test_same_origin_is_distilled_by_states_under_the_teachers_head():
    recipe = recipe_of(FILES, found())
    assert recipe == {"representation_weight": 1.0, "layers": "all", "positions": "all", "lm_head": "auto"}
    said = told(FILES, student=found())
    assert "OPRD" in said["method"] and "adopts" in said["LM head"] and "caution" not in said


def test_a_tied_student_is_told_of_the_head_metric():
    heads = FOUND["heads"] | {"student_tied": True, "why_not_adopted": "the student ties its head"}
    said = told(FILES, student=found(heads=heads))
    assert "logit_weight: 1" in said["LM head"]


def test_one_layer_that_drowns_the_others_asks_for_directions():
    one = found()
    one["layers"][1]["distance"] = 100.0
    assert recipe_of(FILES, one)["representation_loss"] == "normalized_mse"
    assert "normalized_mse" in told(FILES, student=one)["layers"]


def test_another_depth_of_one_origin_gets_a_layer_map():
    files = FILES | {"layers": [2, 4], "layer_map": [1, 4]}
    assert recipe_of(files, found())["layer_map"] == [1, 4]
    assert "layer_map" not in recipe_of(files | {"pruned_from_teacher": True}, found())  # it is in the student's config


def test_another_origin_gets_a_bridge_only_where_a_head_can_be_solved():
    recipe = recipe_of(FILES, found(states=UNRELATED))
    assert recipe["bridge"] == "auto" and recipe["lm_head"] == "solved" and recipe["then"]["output_loss"] == "full"
    heads = FOUND["heads"] | {"why_not_solved": "the student ties its head"}
    tied = found(states=UNRELATED, heads=heads)
    assert recipe_of(FILES, tied) == {"representation_weight": 0, "output_loss": "full"}
    assert "rank" not in told(FILES, student=tied) and "rank" in told(FILES, student=found(states=UNRELATED))


@pytest.mark.parametrize(("size", "loss"), [(100_000, "top_k"), (40, "full")], ids=["large", "small"])
def test_another_tokenizer_gets_prefix_marginals(size, loss):
    files = FILES | {"reading": "other tokens", "vocabulary": [size, 200_000]}
    assert recipe_of(files, found()) == {"representation_weight": 0, "output_loss": loss}
    assert loss in told(files, student=found(paired_share=0.7))["method"]


def test_one_head_on_both_sides_promises_nothing_over_full_kl():
    said = {one["topic"]: one for one in advise(FILES, {"student": found(heads=FOUND["heads"] | {"drift": 0.0})})}
    assert "full KL did as well" in said["method"]["why"] and said["LM head"]["say"].startswith("one on both sides")
    assert "far ahead" in {one["topic"]: one for one in advise(FILES, {"student": found()})}["method"]["why"]


def test_too_few_positions_are_not_taken_for_states_without_content():
    why = [
        {one["topic"]: one["why"] for one in advise(FILES, {"student": found(states=UNRELATED, bridge=bridge)})}[
            "method"
        ]
        for bridge in (NO_MAP | {"enough_rows": False}, NO_MAP)
    ]
    assert "too few positions" in why[0] and "a linear map finds too little" in why[1]


def test_answers_that_were_cut_off_say_nothing_of_what_a_teacher_can():
    equal = {"accuracy": {"student": SCORE, "teacher": SCORE}}
    says = [[one["say"] for one in advise(FILES, {"student": found(**equal)}, share)] for share in (0.1, 0.9)]
    assert any("nothing to teach" in say for say in says[0]) and not any("--max_new_tokens" in say for say in says[0])
    assert any("--max_new_tokens" in say for say in says[1]) and not any("nothing to teach" in say for say in says[1])


def test_a_student_that_caught_up_is_no_reason_for_caution():
    better = SCORE | {"value": 90.0, "low": 85.0, "high": 95.0}
    before = found(accuracy={"student": SCORE, "teacher": better})
    after = found(accuracy={"student": better, "teacher": better}, choices=FOUND["choices"] | {"kl": 1e-5})
    assert "caution" not in told(FILES, before=before, after=after)


def test_measures_that_disagree_are_not_called_nearer():
    after = found(states={"cka": 0.95, "cosine": 0.8})
    said = told(FILES, before=found(), after=after | {"choices": FOUND["choices"] | {"kl": 0.1}})
    assert said["states"].startswith(said["choices"].split(" nearer")[0]) and said["states"].startswith(
        "by some measures"
    )


CAUTIONS = {
    "end tokens": (FILES | {"ends_alike": False, "end_tokens": ["<a>", "<b>"]}, {}, "eos_token"),
    "no better": (FILES, {"accuracy": {"student": SCORE, "teacher": SCORE}}, "nothing to teach"),
    "alike": (FILES, {"choices": FOUND["choices"] | {"kl": 1e-5}}, "alike"),
    "few rows": (FILES, {"bridge": FOUND["bridge"] | {"enough_rows": False}}, "--prompts"),
    "massive": (
        FILES,
        {"activations": {"student": [{"massive": False}] * 2, "teacher": [{"massive": False}, {"massive": True}]}},
        "largest dimensions",
    ),
}


@pytest.mark.parametrize("name", CAUTIONS)
def test_cautions(name):
    files, changes, words = CAUTIONS[name]
    assert words in told(files, student=found(**changes))["caution"]


def test_a_run_whose_states_arrived_and_whose_accuracy_did_not_is_sent_to_its_head():
    lent = {"value": 90.0, "low": 85.0, "high": 95.0}
    accuracy = {"student": SCORE, "teacher": lent, "student_under_teacher_head": lent}
    after = found(states={"cosine": 0.999, "cka": 0.99, "explained": 0.99}, accuracy=accuracy)
    said = told(FILES, before=found(accuracy=accuracy), after=after)
    assert "holds the student back" in said["head"] and said["states"].startswith("nearer")
    assert said["choices"].startswith("no nearer")
    read = accuracy | {"student": lent}
    assert "head" not in told(FILES, before=found(accuracy=read), after=after | {"accuracy": read})
