"""Pruned models against their slow twin: the whole model, whose dropped blocks pass on what they are given."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig

from oprd.bridge import model_fingerprint
from oprd.compression import drop_blocks, layer_map_of, prune
from oprd.compression.prune import RECORD, Choice, Probing, layer_rows
from oprd.models import recorded_layer_map
from tiny import ARCHITECTURES, ATTENTIONS, tiny_model, tiny_tokenizer

IDS = torch.arange(2, 26).reshape(2, 12)
KEPT = {3: [1, 3], 5: [1, 2, 5]}


def passing_on(model, kept):
    """The whole model; dropped blocks do nothing."""
    twin = copy.deepcopy(model)
    for layer, block in enumerate(twin.model.layers, 1):
        if layer not in kept:
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return twin


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def place(tmp_path):
    """A model in bf16 with a tokenizer, and prompts."""
    tiny_model(layers=5, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    texts = ["ab", "hello", "q1w2", "zz", "maths"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return tmp_path


def probing(place, **settings):
    return Probing(str(place / "prompts.jsonl"), **({"answers": 6, "batch_size": 2} | settings))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ATTENTIONS])
def test_pruned_equals_its_slow_twin_also_read_back(architecture, tmp_path):
    model = tiny_model(architecture).eval()
    twin = logits(passing_on(model, [1, 3]))
    assert not torch.allclose(logits(model), twin)
    drop_blocks(model, [1, 3])
    assert torch.equal(logits(model), twin)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(back), twin)
    assert back.config.num_hidden_layers == 2 and recorded_layer_map(back.config) == (1, 3)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ATTENTIONS])
def test_generation_with_a_cache_equals_generation_without(architecture):
    model = tiny_model(architecture).eval()
    drop_blocks(model, [2, 3])  # numbers that would leave a hole in the cache
    found = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=0)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    places = [m.layer_idx for m in model.model.layers.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert sorted(set(places)) == [0, 1]


def test_lists_of_layers_are_cut_along():
    model = tiny_model("windows in turn")
    drop_blocks(model, [2, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    model = tiny_model("latent")
    model.config.first_k_dense_replace = 2
    drop_blocks(model, [1, 3])
    assert model.config.first_k_dense_replace == 1
    model = tiny_model()
    model.config.mlp_only_layers = [0, 2]
    drop_blocks(model, [1, 3])
    assert model.config.mlp_only_layers == [0, 1]


@pytest.mark.parametrize(
    ("kept", "depth", "before", "expected"),
    [
        ([1, 2, 4, 6], 6, None, [1, 2, 4, 6]),
        ([1, 2, 4], 6, None, [1, 2, 6]),  # the head reads the last layer
        ([3], 6, None, [6]),
        ([1, 3, 4], 4, [1, 2, 5, 6], [1, 5, 6]),  # of a pruned model, to its original
        ([1, 2], 4, [1, 2, 5, 6], [1, 6]),
    ],
)
def test_layer_maps(kept, depth, before, expected):
    assert layer_map_of(kept, depth, before) == expected


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([0, 1], "lie in 1..3, got 0"),
        ([1, 4], "lie in 1..3, got 4"),
        ([], "lie in 1..3, got none"),
        ([2, 1], "must ascend, each once, got 2, 1"),
        ([1, 1], "must ascend"),
        ([1, 2, 3], "All 3 layers would be kept"),
    ],
)
def test_layers_that_cannot_be_kept(kept, said):
    with pytest.raises(ValueError, match=said):
        drop_blocks(tiny_model(), kept)


def test_a_folder_that_is_a_model(place):
    whole = AutoModelForCausalLM.from_pretrained(place / "model", dtype="auto")
    record = prune(str(place / "model"), place / "student", Choice(keep=3), probing(place))
    student = AutoModelForCausalLM.from_pretrained(place / "student", dtype="auto")
    assert student.dtype == torch.bfloat16
    assert torch.equal(logits(student), logits(passing_on(whole, record["kept"])))
    assert len(AutoTokenizer.from_pretrained(place / "student")) == len(tiny_tokenizer())
    assert student.config.oprd_layer_map == record["layer_map"] == record["kept"]
    assert student.config.oprd_pruned_from == record["fingerprint"] == model_fingerprint(whole)
    assert record["kept"][0] == 1 and record["kept"][-1] == 5
    assert sorted(record["kept"] + record["dropped"]) == [1, 2, 3, 4, 5]
    lowest = sorted((1, 2, 3), key=lambda inner: record["influence"][inner])[:2]
    assert sorted(record["dropped"]) == sorted(inner + 1 for inner in lowest)
    assert json.loads((place / "student" / RECORD).read_text()) == record
    assert record["measured_on"]["prompts"] == 5 and record["positions"] > 18  # the prompts' own
    assert [row["student layer"] for row in layer_rows(record) if row[""] == "kept"] == [1, 2, 3]
    student.save_pretrained(place / "again")
    assert recorded_layer_map(AutoModelForCausalLM.from_pretrained(place / "again").config) == tuple(record["kept"])


def test_a_seed_makes_the_same_student(place):
    names = ("one", "two")
    for name in names:
        prune(str(place / "model"), place / name, Choice(drop=1), probing(place, prompts=3, seed=4))
    one, two = ((place / name / "model.safetensors").read_bytes() for name in names)
    assert one == two and (place / "one" / RECORD).read_text() == (place / "two" / RECORD).read_text()


def test_answers_count(place):
    """Prompts alone are what the tokenizer makes of them."""
    record = prune(str(place / "model"), place / "out", Choice(layers=(1, 2, 5)), probing(place, answers=0))
    assert record["positions"] == 18 and record["chosen"] == "by hand" and record["kept"] == [1, 2, 5]


def test_pruned_twice_leads_to_the_original(place):
    first = prune(str(place / "model"), place / "one", Choice(layers=(1, 3, 4, 5)))
    second = prune(str(place / "one"), place / "two", Choice(layers=(1, 2, 4)))
    config = AutoModelForCausalLM.from_pretrained(place / "two").config
    assert config.oprd_layer_map == second["layer_map"] == [1, 3, 5]
    assert config.oprd_pruned_from == first["fingerprint"] != second["fingerprint"]


def test_kinds_of_layers_by_a_rule_are_refused_and_nothing_is_left(place):
    """Every second layer has experts: without the first, they would be the others."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, decoder_sparse_step=2, num_experts=4, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "rule")
    tiny_tokenizer().save_pretrained(place / "rule")
    with pytest.raises(ValueError, match="config of Qwen2MoeForCausalLM cannot say which layers are left"):
        prune(str(place / "rule"), place / "out", Choice(layers=(2, 3, 4)))
    assert sorted(path.name for path in place.iterdir()) == ["model", "prompts.jsonl", "rule"]
    prune(str(place / "rule"), place / "out", Choice(layers=(1, 2)))  # fits the rule
    assert (place / "out" / RECORD).exists()
