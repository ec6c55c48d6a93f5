import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.miniature import rebuild as module
from oprd.miniature.task import build_tokenizer
from oprd.models import is_tied, resolve_path


def test_a_batch_supervises_answers_and_end_tokens_only():
    import random

    tokenizer = build_tokenizer()
    ids, labels = module._batch(tokenizer, module.mixed(random.Random(0)))
    supervised = labels != -100
    assert ids.shape == labels.shape == (module.BATCH_SIZE, ids.shape[1])
    assert ids[supervised].equal(labels[supervised])
    assert (labels[:, -1] == tokenizer.eos_token_id).all()
    for row, on in zip(ids, supervised, strict=True):
        assert tokenizer.decode(row[~on]).endswith("=?")


def test_two_rebuilds_are_one(tmp_path, monkeypatch):
    few = (
        module.Run({2: "student", 4: "teacher"}, seed=0),
        module.Run({1: "digit-student"}, seed=2, digits=True),
        module.Run({1: "more"}, seed=3, start="student", rate=1e-3),
    )
    monkeypatch.setattr(module, "RUNS", few)
    said = []
    for name in ("a", "b"):
        module.rebuild(tmp_path / name, announce=said.append)
    assert [line.split(":")[0] for line in said] == ["student", "teacher", "digit-student", "more"] * 2
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "teacher").state_dict() for n in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in b)
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "more").state_dict()
    assert 0 < (more["lm_head.weight"] - a["lm_head.weight"]).abs().max() < 1
    early = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "student").state_dict()
    assert not torch.equal(early["lm_head.weight"], a["lm_head.weight"])
    assert (tmp_path / "a" / "train.jsonl").read_text() == (tmp_path / "b" / "train.jsonl").read_text()


@pytest.mark.parametrize("run", module.RUNS, ids=lambda run: " and ".join(run.saved.values()))
def test_the_shipped_models_are_what_the_recipe_builds(run):
    built = build_tokenizer(digits=run.digits)
    fresh = module.build_model(built, seed=run.seed, **run.shape)
    for name in run.saved.values():
        model = AutoModelForCausalLM.from_pretrained(resolve_path(f"miniature:{name}"))
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(f"miniature:{name}"))
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in fresh.state_dict().items()
        }
        assert not is_tied(model)
        assert tokenizer.get_vocab() == built.get_vocab()
