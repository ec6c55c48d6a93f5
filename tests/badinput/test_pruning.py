"""oprd prune with counts, layers, folders and data that cannot be; pruned and quantised students in recipes."""

import json

import pytest

from badinput.harness import Case, cases, check_refused
from oprd.models import LAYER_MAP

PRUNE = "prune student --out small"
ON = "--data prompts.jsonl"


def typed(name, command, culprit, remedy, arrange=None, status=1):
    return Case(name, culprit, remedy, arrange, command=tuple(command.split()), status=status)


def edit(name, **changes):
    return lambda place: place.edit_json(name, **changes)


def chat_prompts(place):
    place.rows({"prompt": [{"role": "user", "content": "a"}]})


def long_prompts(place):
    place.rows({"prompt": "a" * 120})


@cases(
    typed("keep none", f"{PRUNE} --keep 0 {ON}", "0 of 3 layers cannot be kept", "so 2 to 2 can"),
    typed("keep one", f"{PRUNE} --keep 1 {ON}", "1 of 3 layers cannot be kept", "name them with --layers"),
    typed("keep all", f"{PRUNE} --keep 3 {ON}", "3 of 3 layers cannot be kept", "so 2 to 2 can"),
    typed("drop none", f"{PRUNE} --drop 0 {ON}", "3 of 3 layers cannot be kept", "at least one goes"),
    typed("drop too many", f"{PRUNE} --drop 2 {ON}", "1 of 3 layers cannot be kept", "the first and the last stay"),
    typed("drop more than there are", f"{PRUNE} --drop 7 {ON}", "-4 of 3 layers cannot be kept", "so 2 to 2 can"),
    typed("a layer that is not there", f"{PRUNE} --layers 1,4", r"lie in 1\.\.3, got 4", r"1\.\.3"),
    typed("layers that descend", f"{PRUNE} --layers 3,1", "must ascend, each once", "got 3, 1"),
    typed("all layers", f"{PRUNE} --layers 1,2,3", "All 3 layers would be kept", "Leave one out"),
    typed("layers that are words", f"{PRUNE} --layers even", "--layers must be numbers", "such as 1,2,4,6"),
    typed("no data", f"{PRUNE} --keep 2", "influence, which is measured on prompts", "--data, or --layers"),
    typed("prompts of no data", f"{PRUNE} --layers 1,3 --prompts 4", "--prompts would be ignored", "there is no --data"),
    typed("data that is not there", f"{PRUNE} --keep 2 --data gone.jsonl", "There is no file .*gone.jsonl", "Give a parquet"),
    typed("data without prompts", f"{PRUNE} --keep 2 --data gates.yaml", "gates.yaml is not a", "Convert it"),
    typed("no prompts", f"{PRUNE} --keep 2 {ON} --prompts 0", "--prompts must be at least 1", "got 0"),
    typed("fewer answers than none", f"{PRUNE} --keep 2 {ON} --answers -1", "--answers must be at least 0", "got -1"),
    typed("chat without a template", f"{PRUNE} --keep 2 {ON}", "no chat template", "Give prompts as text", chat_prompts),
    typed("longer than the context", f"{PRUNE} --keep 2 {ON}", "prompt of 120 tokens .* context of 128", "Lower --answers", long_prompts),
    typed("a folder that is there", f"prune student --out teacher --keep 2 {ON}", "--out teacher is already there", "Choose another"),
    typed("a file in the way", f"prune student --out gates.yaml/x --keep 2 {ON}", r"gates\.yaml is a file", "Choose another --out"),
    typed("a model that is not there", f"prune ./gone --out small --keep 2 {ON}", "there is no folder ./gone", "Give one that exists"),
    typed("a model without weights", f"{PRUNE} --keep 2 {ON}", "has no weights", "Copy or download", lambda p: p.remove("student/model.safetensors")),
    typed("a model with a weight too few", f"{PRUNE} --keep 2 {ON}", r"lacks .*layers\.3", "Copy or download all", edit("student/config.json", num_hidden_layers=4, layer_types=["full_attention"] * 4)),
    typed("a quantised model", f"{PRUNE} --keep 2 {ON}", "student is quantised", "Prune the model that it was made from",
        edit("student/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})),
    typed("a device that is not there", f"{PRUNE} --keep 2 {ON} --device cuda:7", "cuda:7 is not there", "Name one of this machine"),
)  # fmt: skip
def test_prune(case, place, capfd):
    check_refused(case, place, capfd)


@pytest.mark.parametrize("words", ["", "--keep 2 --drop 1", "--keep two"], ids=["nothing", "two ways", "a word"])
def test_usage(place, capfd, words):
    from badinput.harness import call

    status, said = call(f"{PRUNE} {ON} {words}".split(), capfd)
    assert status == 2 and "usage: oprd prune" in said and not (place / "small").exists()


def pruned_from(*layer_map):
    return lambda place: place.edit_json("student/config.json", **{LAYER_MAP: list(layer_map)})


def with_an_adapter(place):
    place.write("student/adapter_config.json", json.dumps({"peft_type": "LORA"}))


@cases(
    Case("a teacher of another depth", r"pruned from a model of 6 layers .layer map 1,2,6., and this teacher has 3", "set layer_map by hand", pruned_from(1, 2, 6)),
    Case("a record of another depth", r"record 1,3 names 2 layers for a student of 3", "Set layer_map", pruned_from(1, 3)),
    Case("a map that is too short", "layer_map 1,3 names 2 layers for a student of 3", "for each of the student's", settings={"layer_map": [1, 3]}),
    Case("a map of other layers", r"layer_map 1,2,4 must not .* 1\.\.3", "Correct layer_map", settings={"layer_map": [1, 2, 4]}),
    Case("a map that is a name", "layer_map='even'", "such as 1,2,4,6", settings={"layer_map": "even"}),
    Case("a map beside a bridge", "layer_map would be ignored", "Remove it", settings={"layer_map": [1, 2, 3], "bridge": "bridge"}),
    Case("a map without states", "layer_map would be ignored", "Remove it",
        settings={"layer_map": [1, 2, 3], "representation_weight": 0, "output_loss": "full"}),
    Case("bits of a student that has none", "bnb_4bit_quant_type would be ignored", "Set load_in_4bit: true", settings={"bnb_4bit_quant_type": "fp4"}),
    Case("a student with an adapter beside it", "student is a whole model with an adapter beside it", "Name the model that it was quantised from", with_an_adapter),
)  # fmt: skip
def test_recipes(case, place, capfd):
    check_refused(case, place, capfd)


def test_a_good_prune_comes_to_the_first_answer(place, capfd):
    """What every case spoils is good otherwise."""
    from oprd.cli import main

    with pytest.raises(AssertionError, match="a step was begun"):
        main(f"{PRUNE} --keep 2 {ON}".split())
    assert main(f"{PRUNE} --keep 2 {ON} --answers 0".split()) == 0
