"""Students and teachers that are no model, are half there, or bring code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from badinput.harness import EVAL, Case, Place, call, cases, check_refused
from badinput.payload import pickle_of
from tiny import tiny_model

WEIGHTS = "model.safetensors"


def tensors(change, role="student"):
    """Change the tensors of a model's file."""

    def arrange(place):
        path = place / role / WEIGHTS
        found = load_file(path)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path, metadata={"format": "pt"})

    return arrange


def config(role="student", **changes):
    """Change keys of a model's config.json; None removes one."""
    return lambda place: place.edit_json(f"{role}/config.json", **changes)


def sharded(place: Place, role="student"):
    """The weights in several files with an index."""
    tiny_model(seed=0).save_pretrained(place / role, max_shard_size="8KB")
    (place / role / WEIGHTS).unlink(missing_ok=True)


def lose_a_shard(place):
    sharded(place)
    sorted((place / "student").glob("model-*.safetensors"))[1].unlink()


def cut_a_shard(place):
    sharded(place)
    place.cut(f"student/{sorted((place / 'student').glob('model-*.safetensors'))[1].name}")


def index(content):
    def arrange(place):
        sharded(place)
        place.write("student/model.safetensors.index.json", content)

    return arrange


def remote_code(place, **more):
    """A model whose class comes with it, in a file that leaves a mark when it is imported."""
    code = place.payload() + "from transformers import Qwen3Config as OwnConfig, Qwen3ForCausalLM as OwnModel\n"
    place.write("student/modeling_own.py", code)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    place.edit_json("student/config.json", auto_map=auto, model_type="own", architectures=["OwnModel"], **more)


def encoder(place):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(place / "student")


def of_kind(kind, architecture):
    return config(model_type=kind, architectures=[architecture])


def pickle_alone(place):
    torch.save(load_file(place / "student" / WEIGHTS), place / "student" / "pytorch_model.bin")
    place.remove(f"student/{WEIGHTS}")


def hostile_pickle(place):
    place.write("student/pytorch_model.bin", pickle_of(place))
    place.remove(f"student/{WEIGHTS}")


def adapter_alone(place):
    place.remove("student/config.json", f"student/{WEIGHTS}")
    place.write("student/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "teacher"}))
    save_file(
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 16)}, place / "student/adapter_model.safetensors"
    )


def gguf_alone(place):
    place.remove("student")
    place.write("student/model-q4.gguf", b"GGUF....")


def swap(place, **model):
    """Another student."""
    tiny_model(**model).save_pretrained(place / "student")


def model(name, culprit, remedy, arrange=None, **settings):
    return Case(name, culprit, remedy, arrange, settings=settings)


def drop(name):
    return lambda found: found.pop(name)


UP = "model.layers.1.mlp.up_proj.weight"


@cases(
    model("no config", r"student \S+/student is no model: it has no config\.json", "save_pretrained wrote", lambda p: p.remove("student/config.json")),
    model("no config of the teacher", r"teacher \S+/teacher is no model: it has no config\.json", "save_pretrained wrote", lambda p: p.remove("teacher/config.json")),
    model("a folder that is not there", "student: there is no folder ./gone", r"a Hub id \(owner/name\)", model_name_or_path="./gone"),
    model("a teacher that is not there", "teacher: there is no folder /nowhere/at/all", "Give one that exists", teacher_model_name_or_path="/nowhere/at/all"),
    model("a Hub id without a network", "nobody/nothing is no folder here, and the Hub has not given it", "folder|Hub", teacher_model_name_or_path="nobody/nothing"),
    model("a file as model", r"student \S+model\.safetensors is a file", r"Name the folder that holds config\.json", model_name_or_path="student/model.safetensors"),
    model("a GGUF file", r"q4\.gguf is a file", "give the model that it was made from", gguf_alone, model_name_or_path="student/model-q4.gguf"),
    model("a folder of GGUF", "student .*no config", "give the model that they were made from", gguf_alone),
    model("an adapter alone", "student .*an adapter alone", r"merge_and_unload\(\)", adapter_alone),
    model("a config that is no JSON", r"student's \S+/config\.json is not valid JSON", "Restore the file", lambda p: p.write("student/config.json", "{'a': 1}")),
    model("a config cut short", r"teacher's \S+/config\.json is not valid JSON", "Restore the file", lambda p: p.cut("teacher/config.json")),
    model("a config that is a list", r"student's \S+/config\.json must be a JSON object", "Restore the file", lambda p: p.write("student/config.json", "[]")),
    model("no model_type", r"student's \S+/config\.json has no model_type", "Restore the file", config(model_type=None)),
    model("an unknown model_type", r"student's \S+/config\.json: .*knows no model_type 'qwen99'", "install a version that does", config(model_type="qwen99")),
    model("no architectures", r"config\.json names no architectures", "Restore the file", config(architectures=None)),
    model("an encoder", r"student's \S+/config\.json is of a BertForMaskedLM", "Choose a decoder", encoder),
    model("an encoder as a decoder", "is of a BertLMHeadModel", "Choose a decoder", of_kind("bert", "BertLMHeadModel")),
    model("an encoder with a decoder", "is of a T5ForConditionalGeneration", "Choose a decoder", of_kind("t5", "T5ForConditionalGeneration")),
    model("a vision model", "is of a ViTForImageClassification", "Choose a decoder", of_kind("vit", "ViTForImageClassification")),
    model("a vision teacher", "teacher's .*is of a CLIPModel", "Choose a decoder", config("teacher", model_type="clip", architectures=["CLIPModel"])),
    model("a config of wrong types", r"config\.json", "hidden_size", config(hidden_size="wide")),
    model("a shard that is missing", r"student lacks \S+/model-00002-of-\d+\.safetensors", "download the missing file", lose_a_shard),
    model("a shard cut short", r"student's \S+/model-00002-of-\d+\.safetensors is truncated or damaged", "download it again", cut_a_shard),
    model("an index that is no JSON", r"model\.safetensors\.index\.json is no index", "Restore it", index("{")),
    model("an index of nothing", r"model\.safetensors\.index\.json is no index", "Restore it", index('{"weight_map": 3}')),
    model("an index that leads elsewhere", r"index\.json names a file outside its folder \(\.\./teacher", "Restore it",
        index(json.dumps({"weight_map": {"lm_head.weight": "../teacher/model.safetensors"}}))),
    model("no weights", "student .*has no weights: neither model.safetensors nor", "Copy or download them", lambda p: p.remove(f"student/{WEIGHTS}")),
    model("no weights of the teacher", "teacher .*has no weights", "Copy or download them", lambda p: p.remove(f"teacher/{WEIGHTS}")),
    model("weights cut short", r"student's \S+/model\.safetensors is truncated or damaged", "Copy or download it again", lambda p: p.cut(f"student/{WEIGHTS}")),
    model("weights of the teacher cut short", r"teacher's \S+/model\.safetensors is truncated", "Copy or download it again", lambda p: p.cut(f"teacher/{WEIGHTS}", 0.99)),
    model("weights of no bytes", r"model\.safetensors is truncated or damaged", "Copy or download it again", lambda p: p.write(f"student/{WEIGHTS}", b"")),
    model("a damaged header", r"model\.safetensors is truncated or damaged", "Copy or download it again",
        lambda p: p.write(f"student/{WEIGHTS}", b"\x40\0\0\0\0\0\0\0" + b"{not json" * 99)),
    model("a header of all the memory", r"model\.safetensors is truncated or damaged", "Copy or download it again", lambda p: p.write(f"student/{WEIGHTS}", b"\xff" * 64)),
    model("a pointer in place of weights", r"model\.safetensors is truncated or damaged", "Copy or download it again",
        lambda p: p.write(f"student/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    model("weights of another shape", rf"student .*{UP} has shape \[5, 16\] .*\[32, 16\]", r"Restore the config\.json",
        tensors(lambda t: t.update({UP: t[UP][:5]}))),
    model("a config of another width", r"student .* has shape \[.* 16\].*24", r"Restore the config\.json", config(hidden_size=24)),
    model("a missing tensor", rf"student .*lacks {UP}, which would start at random", "Copy or download all", tensors(drop(UP))),
    model("a missing tensor of the teacher", rf"teacher .*lacks {UP}, which would start at random", "Copy or download all", tensors(drop(UP), "teacher")),
    model("a missing head", r"student .*lacks lm_head\.weight", "Copy or download all", tensors(drop("lm_head.weight"))),
    model("a missing layer", r"student .*lacks model\.layers\.2.*more tensors", "Copy or download all",
        tensors(lambda t: [t.pop(name) for name in list(t) if "layers.2." in name])),
    model("a layer too many", r"student .*holds model\.layers\.2.*layers that its config\.json does not have", r"Restore the config\.json",
        config(num_hidden_layers=2, layer_types=["full_attention"] * 2)),
    model("NaN in the student", rf"student's weight {UP} holds NaN or infinity", "Take another checkpoint", tensors(lambda t: t[UP].view(-1)[3:4].fill_(float("nan")))),
    model("infinity in the teacher", r"teacher's weight lm_head\.weight holds NaN or infinity", "Take another checkpoint",
        tensors(lambda t: t["lm_head.weight"].view(-1)[3:4].fill_(float("inf")), "teacher")),
    model("a pickle alone", r"student .*has its weights as a pickle \(pytorch_model\.bin\)", "save_pretrained", pickle_alone),
    model("a hostile pickle", r"student .*has its weights as a pickle \(pytorch_model\.bin\)", "runs code when it is loaded", hostile_pickle),
    model("code that comes with the model", r"student's \S+/config\.json wants to run Python code", "Read that code, then set trust_remote_code: true", remote_code),
    model("another width of the teacher", "3 layers of width 16, the teacher 3 of width 24", "oprd bridge fit",
        lambda p: tiny_model(seed=1, width=24).save_pretrained(p / "teacher")),
    model("another depth of the teacher", "3 layers of width 16, the teacher 4 of width 16", "oprd bridge fit",
        lambda p: tiny_model(seed=1, layers=4).save_pretrained(p / "teacher")),
    model("fewer embeddings than tokens", "student has 30 embeddings for a tokenizer whose ids go up to 36", "resize_token_embeddings", lambda p: swap(p, vocab_size=30)),
)  # fmt: skip
def test_training(case, place, capfd):
    check_refused(case, place, capfd)


def command(name, culprit, remedy, arrange, *words):
    return Case(name, culprit, remedy, arrange, command=words)


FIT = ("bridge", "fit", "--config", "{root}/recipe.yaml")
PLAN = ("plan", "--config", "{root}/recipe.yaml")


@cases(
    command("eval of no model", "student is neither a model", "no config.json", lambda p: p.remove("student/config.json"), *EVAL),
    command("eval of weights cut short", r"model\.safetensors is truncated", "download it again", lambda p: p.cut(f"student/{WEIGHTS}"), *EVAL),
    command("eval of a missing tensor", f"lacks {UP}", "Copy or download all", tensors(drop(UP)), *EVAL),
    command("eval of another shape", rf"{UP} has shape \[5, 16\]", r"Restore the config\.json", tensors(lambda t: t.update({UP: t[UP][:5]})), *EVAL),
    command("eval of NaN", f"{UP} holds NaN", "Take another checkpoint", tensors(lambda t: t[UP].fill_(float("nan"))), *EVAL),
    command("eval of a pickle", r"pickle \(pytorch_model\.bin\)", "save_pretrained", hostile_pickle, *EVAL),
    command("eval of code", "wants to run Python code", "set trust_remote_code: true", remote_code, *EVAL),
    command("eval of an encoder", "BertForMaskedLM", "Choose a decoder", encoder, *EVAL),
    command("eval of nothing", "there is no folder ./gone", "Hub id", None, "eval", "./gone", *EVAL[2:]),
    command("eval of a Hub id", "nobody/nothing is no folder here, and the Hub has not given it", "Hub", None, "eval", "nobody/nothing", *EVAL[2:]),
    command("bridge of weights cut short", r"model\.safetensors is truncated", "download it again", lambda p: p.cut(f"teacher/{WEIGHTS}"), *FIT),
    command("bridge of a missing tensor", f"teacher .*lacks {UP}", "Copy or download all", tensors(drop(UP), "teacher"), *FIT),
    command("bridge of a pickle", r"pickle \(pytorch_model\.bin\)", "save_pretrained", hostile_pickle, *FIT),
    command("bridge of code", "wants to run Python code", "set trust_remote_code: true", remote_code, *FIT),
    command("plan of no model", r"student .*no config\.json", "save_pretrained wrote", lambda p: p.remove("student/config.json"), *PLAN),
    command("plan of no JSON", r"teacher's \S+config\.json is not valid JSON", "Restore the file", lambda p: p.cut("teacher/config.json"), *PLAN),
    command("plan of code", "wants to run Python code", "set trust_remote_code: true", remote_code, *PLAN),
    command("plan of an encoder", "BertForMaskedLM", "Choose a decoder", encoder, *PLAN),
)  # fmt: skip
def test_other_commands(case, place, capfd):
    check_refused(case, place, capfd)


def test_a_tied_head_need_not_be_in_the_file(place, capfd):
    """What is tied is not missing."""
    tiny_model(seed=0, tied=True).save_pretrained(place / "student")
    assert "lm_head.weight" not in load_file(place / "student" / WEIGHTS)
    with pytest.raises(AssertionError, match="a step was begun"):
        call(Case("", "", "").prepare(place), capfd)


def test_a_tensor_that_nothing_reads_is_told(place, capfd):
    """It may be left over from another head; the model is whole without it."""
    tensors(lambda t: t.update({"value_head.weight": torch.zeros(1, 16)}))(place)
    with pytest.raises(AssertionError, match="a step was begun"):
        call(Case("", "", "").prepare(place), capfd)
    assert "holds value_head.weight, which no part of the model reads" in capfd.readouterr().err


def test_a_sharded_model_is_read(place, capfd):
    sharded(place)
    with pytest.raises(AssertionError, match="a step was begun"):
        call(Case("", "", "").prepare(place), capfd)


def test_a_model_of_the_miniature_is_whole(capfd, tmp_path):
    """The checks let good models through."""
    from oprd.model_files import check_model, check_tensors
    from oprd.models import resolve_path

    for name in ("student", "teacher", "wide-teacher", "digit-student"):
        path = resolve_path(f"miniature:{name}")
        check_model(path, "student")
        check_tensors(path, "student")
