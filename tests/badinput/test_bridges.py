"""Bridges that are damaged, or belong to others."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from badinput.harness import Case, cases, check_refused
from oprd.bridge.bridge import DESCRIPTION, WEIGHTS, _seal
from tiny import random_bridge

BRIDGE = f"bridge/{WEIGHTS}"


def description(**changes):
    """Change what bridge.json says, under a seal that holds; None removes a key."""

    def arrange(place):
        path = place / "bridge" / DESCRIPTION
        content = json.loads(path.read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None and key != "sha256"}
        path.write_text(json.dumps(content | {"sha256": _seal(content)}))

    return arrange


def maps(change):
    """Change the tensors, under hashes that hold."""

    def arrange(place):
        tensors = load_file(place / "bridge" / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "bridge" / WEIGHTS)
        digest = hashlib.sha256((place / "bridge" / WEIGHTS).read_bytes()).hexdigest()
        description(weights_sha256=digest)(place)

    return arrange


def text(content):
    return lambda place: place.write(f"bridge/{DESCRIPTION}", content)


def a_file(place):
    place.remove("bridge")
    place.write("bridge", "words")


def of_rank_nothing(tensors):
    tensors.update({name: tensors[name][:, :0] for name in ("student_map", "teacher_map")})


def spoil(name, value):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def bridge(name, culprit, remedy, arrange=None, **settings):
    return Case(name, culprit, remedy, arrange, settings={"bridge": "bridge", **settings})


AGAIN = "Fit it again|restore the files"


@cases(
    bridge("for another student", "fitted for another student: 0000, not", "Fit one for this pair with oprd bridge fit", description(fitted_for={"student": "0000"})),
    bridge("for another teacher", "fitted for another teacher: 0000, not", "Fit one for this pair", description(fitted_for={"teacher": "0000"})),
    bridge("for another tokenizer", "fitted for another student tokenizer: 0000, not", "Fit one for this pair", description(fitted_for={"student_tokenizer": "0000"})),
    bridge("for another width", "bridge is for a student of 3 layers x 24", "oprd bridge fit",
        lambda p: random_bridge(student_width=24, teacher_width=16, teacher_layers=3).save_pretrained(p / "bridge")),
    bridge("for another depth", "bridge is for a student of 2 layers x 16", "oprd bridge fit",
        lambda p: random_bridge(layers=2, teacher_width=16, teacher_layers=3).save_pretrained(p / "bridge")),
    bridge("for a deeper teacher", "with at least 5 layers", "oprd bridge fit", lambda p: random_bridge(teacher_width=16).save_pretrained(p / "bridge")),
    bridge("of another format", r"bridge\.json has format 99", "use the version of oprd that wrote it", description(format=99)),
    bridge("of no format", r"bridge\.json has format None", "use the version of oprd that wrote it", description(format=None)),
    bridge("that was edited", r"bridge\.json was changed since it was written", AGAIN, lambda p: p.edit_json(f"bridge/{DESCRIPTION}", rank=2)),
    bridge("of NaN", "bridge holds no whole bridge .*student_map holds values that are not finite", AGAIN, maps(spoil("student_map", float("nan")))),
    bridge("of infinity", "bridge holds no whole bridge .*teacher_mean holds values that are not finite", AGAIN, maps(spoil("teacher_mean", float("inf")))),
    bridge("of rank 0", r"bridge holds no whole bridge .*student_map has shape \(3, 0, 16\)", AGAIN, maps(of_rank_nothing)),
    bridge("of two ranks", r"teacher_map has shape \(3, 2, 16\), expected \(3, 3, 16\)", AGAIN, maps(lambda t: t.update(teacher_map=t["teacher_map"][:, :2]))),
    bridge("of flat maps", r"student_map has shape \(3, 48\)", AGAIN, maps(lambda t: t.update(student_map=t["student_map"].flatten(1)))),
    bridge("without a map", "bridge holds no whole bridge .*teacher_map", AGAIN, maps(lambda t: t.pop("teacher_map"))),
    bridge("cut short", r"bridge\.safetensors is truncated or was changed", AGAIN, lambda p: p.cut(BRIDGE)),
    bridge("of no weights", r"no bridge in bridge \(bridge\.safetensors missing\)", "oprd bridge fit --config", lambda p: p.remove(BRIDGE)),
    bridge("without its description", r"no bridge in bridge \(bridge\.json missing\)", "oprd bridge fit --config", lambda p: p.remove(f"bridge/{DESCRIPTION}")),
    bridge("whose description is no JSON", r"bridge\.json is not a bridge's description", AGAIN, text("{")),
    bridge("whose description is a list", r"bridge\.json is not a bridge's description", AGAIN, text("[1, 2]")),
    bridge("whose description is no text", r"bridge\.json is not a bridge's description", AGAIN, text(b"\xff\xfe")),
    bridge("whose layer map is a word", "bridge holds no whole bridge", AGAIN, description(layer_map="all")),
    bridge("whose layer map has words", "bridge holds no whole bridge", AGAIN, description(layer_map=["one", "two", "three"])),
    bridge("whose layer map counts from 0", r"layer_map \[0, 1, 2\] must count teacher layers from 1", AGAIN, description(layer_map=[0, 1, 2])),
    bridge("without a layer map", "bridge holds no whole bridge .*layer_map", AGAIN, description(layer_map=None)),
    bridge("whose report is a number", "bridge holds no whole bridge", AGAIN, description(report=3)),
    bridge("that is a file", "no bridge in bridge", "oprd bridge fit --config", a_file),
    bridge("that is not there", "no bridge in gone", "oprd bridge fit --config", bridge="./gone"),
    bridge("that nothing reads", "bridge would be ignored", "Remove it", representation_weight=0.0, output_loss="full"),
)  # fmt: skip
def test_training_through_a_bridge(case, place, capfd):
    check_refused(case, place, capfd)


INSPECT = ("bridge", "inspect", "{root}/bridge")
FIT = ("bridge", "fit", "--config", "{root}/recipe.yaml", "--bridge", "{root}/bridge")


@cases(
    Case("inspect nothing", "no bridge in gone", "oprd bridge fit", command=("bridge", "inspect", "./gone")),
    Case("inspect one cut short", "is truncated or was changed", AGAIN, lambda p: p.cut(BRIDGE), command=INSPECT),
    Case("inspect one without a report", "carries no whole report", "oprd bridge fit", command=INSPECT),
    Case("inspect one whose report is damaged", r"bridge\.json carries no whole report", AGAIN, description(report={"ranks": [1]}), command=INSPECT),
    Case("fit over another", "bridge already holds a bridge", "Choose another folder with --bridge DIR, or remove it", command=FIT),
    Case("fit to where a file is", "gates.yaml cannot be a folder", "Choose another", command=(*FIT[:-1], "{root}/gates.yaml")),
    Case("fit of too few prompts", "2 prompts leave none to hold out", "Give more prompts, or raise bridge_held_out",
        command=(*FIT[:-1], "{root}/fresh", "--bridge_prompts", "2")),
    Case("fit of a bad share", "bridge_held_out must lie between 0 and 1", "got 1.5", command=(*FIT[:-1], "{root}/fresh", "--bridge_held_out", "1.5")),
    Case("fit of an unknown key", "Unknown key --bridge_rang", "did you mean --bridge_rank", command=(*FIT, "--bridge_rang", "4")),
)  # fmt: skip
def test_the_bridge_command(case, place, capfd):
    check_refused(case, place, capfd)


def test_a_bridge_that_fits_is_taken(place, capfd):
    from badinput.harness import call

    with pytest.raises(AssertionError, match="a step was begun"):
        call(Case("", "", "", settings={"bridge": "bridge"}).prepare(place), capfd)
    assert torch.isfinite(load_file(place / "bridge" / WEIGHTS)["student_map"]).all()
