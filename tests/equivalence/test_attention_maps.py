"""Observed attention against transformers' own maps: values, gradients through checkpointed blocks, padded and packed.

And what is refused, and what stays as it was.
"""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from oprd.models import backbone_of
from oprd.objectives import attention_map_loss, position_weights, teacher_maps
from oprd.states import (
    AttentionObserver,
    attention,
    attention_maps,
    check_observed_attention,
    make_rollout,
    pack,
    tile_mlps,
    use_observed_attention,
    use_packed_attention,
    visit_states,
)
from tiny import tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")  # adapters of experts that there are not

ARCHITECTURES = ["qwen2", "qwen3", "llama", "phi3", "grouped", "windows", "windows in turn", "latent"]
LENGTHS = ((3, 9), (6, 2), (2, 7), (4, 4))  # longer than the windows
LAYERS = (1, 3)


def rollout_of(lengths=LENGTHS):
    batch = tiny_batch(lengths=lengths)
    mask = batch["completion_mask"].bool()
    mask[0, 2] = False
    weights = position_weights(mask)
    return make_rollout(*batch.values(), state_weights_BC=weights, output_weights_BC=0 * weights)


def observed(architecture="qwen3", seed=0, dtype=torch.float64, **shape):
    model = tiny_model(architecture, seed=seed, dtype=dtype, **shape)
    use_packed_attention(model)
    use_observed_attention(model)
    return model


def places_of(reading, pairs):
    place_N = pairs.student_places(reading.ids_BS.shape[1])
    return place_N, reading.position_of(place_N)


def maps_of(teacher, rollout, keys, layers=LAYERS, dtype=torch.float64):
    place_N, position_N = places_of(rollout.teacher, rollout.state_pairs)

    def visit(layer, query, key, scaling, window):
        return teacher_maps(query, key, place_N, position_N, keys, scaling, window, dtype)

    observer = AttentionObserver(layers, visit)
    with torch.no_grad():
        visit_states(teacher, rollout.teacher, (), lambda *_: None, attend=observer)
    return observer.results


def outcome(student, rollout, maps, calls=None):
    """Loss and gradients of maps and a state term, built as a trainer would."""
    place_N, position_N = places_of(rollout.student, rollout.state_pairs)

    def attend(layer, query, key, scaling, window):
        if calls is not None:
            calls.append(layer)
        given = (maps[layer], place_N, position_N, rollout.state_weights_N)
        return attention_map_loss(query, key, *given, scaling=scaling, window=window)

    def visit(layer, states_BSd):
        return (rollout.state_pairs.of_student(states_BSd).pow(2).mean(1) * rollout.state_weights_N).sum()

    observer = AttentionObserver(maps, attend)
    _, results = visit_states(student, rollout.student, [2], visit, attend=observer)
    assert list(observer.results) == sorted(maps)
    loss = sum(observer.results.values()) + results[2]
    student.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def eager_maps(model, row_ids):
    config = backbone_of(model).config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        return model(input_ids=row_ids.unsqueeze(0), output_attentions=True, output_hidden_states=True, use_cache=False)
    finally:
        config._attn_implementation = before


def plain(student, teacher, rollout, keys):
    """Row by row from transformers' own maps, cut to the keys and brought back to sum 1; autograd does the rest."""
    loss, pairs = 0, rollout.state_pairs
    for row, length in enumerate(rollout.student.mask_BS.sum(1).tolist()):
        ids = rollout.student.ids_BS[row, :length]
        own = eager_maps(student, ids)
        with torch.no_grad():
            other = eager_maps(teacher, ids)
        for n in (pairs.row_N == row).nonzero().flatten().tolist():
            t, weight = int(pairs.student_N[n]), rollout.state_weights_N[n]
            kept = sorted({0, *range(max(t - keys + 1, 0), t + 1)})
            for layer in LAYERS:
                p, q = (x.attentions[layer - 1][0][:, t, kept] for x in (own, other))
                seen = q[0] > 0  # not behind the window
                p, q = (x[:, seen] / x[:, seen].sum(-1, keepdim=True) for x in (p, q))
                loss = loss + weight * (q * (q.log() - p.log())).sum(-1).mean()
            loss = loss + weight * own.hidden_states[2][0, t].pow(2).mean()
    student.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def assert_same(ours, twin, atol=1e-6, rtol=1e-5):
    torch.testing.assert_close(ours[0], twin[0], atol=atol, rtol=rtol, check_dtype=False)
    for name in ours[1].keys() | twin[1].keys():  # none at all is as good as zeros
        known = twin[1].get(name, ours[1].get(name))
        mine, other = (g[1].get(name, torch.zeros_like(known)) for g in (ours, twin))
        torch.testing.assert_close(mine, other, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")
    moved = {name for name, g in ours[1].items() if g.abs().max() > 1e-5}
    assert any("0.self_attn" in name for name in moved)


# ------------------------------------------------------------------------------------------------ equals


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_enough_keys_the_maps_are_transformers_own(architecture):
    model, rollout = observed(architecture, dtype=torch.float32).eval(), rollout_of()
    padded, packed = (
        maps_of(model, x, keys=20, layers=(1, 2, 3), dtype=torch.float32) for x in (rollout, pack(rollout))
    )
    pairs = rollout.state_pairs
    for row, length in enumerate(rollout.student.mask_BS.sum(1).tolist()):
        with torch.no_grad():
            expected = eager_maps(model, rollout.student.ids_BS[row, :length]).attentions
        for n in (pairs.row_N == row).nonzero().flatten().tolist():
            seen = int(pairs.student_N[n]) + 1
            for layer in (1, 2, 3):
                own_map = expected[layer - 1][0, :, seen - 1, :seen]
                for maps in (padded, packed):
                    ours = maps[layer][n].exp()
                    torch.testing.assert_close(ours[:, :seen].flip(1), own_map, atol=1e-5, rtol=0)
                    assert ours[:, seen:].eq(0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_the_plain_ones(architecture):
    """Padded and packed, with blocks kept and with blocks recomputed."""
    student, teacher, rollout = observed(architecture), observed(architecture, seed=1).eval(), rollout_of()
    twin = plain(student, teacher, rollout, keys=3)
    student.train()
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable()  # as it comes
        for read in (rollout, pack(rollout)):
            calls = []
            assert_same(outcome(student, read, maps_of(teacher, read, keys=3), calls), twin)
            assert calls == ([1, 3, 3, 1] if checkpointing else [1, 3])  # blocks that run again ask again


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapters"])
def test_checkpointing_changes_nothing_beside_tiles_and_adapters(adapter):
    """Bit for bit: the recomputation does the same and adds nothing."""
    rollout = pack(rollout_of())
    maps = maps_of(observed(seed=1).eval(), rollout, keys=3, dtype=torch.float16)
    outcomes = []
    for checkpointing in (False, True):
        student = observed(dtype=torch.float32).train()
        tile_mlps(student, 4, with_gradient=True)
        if adapter:
            torch.manual_seed(0)
            student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            student.enable_input_require_grads()
        if checkpointing:
            student.gradient_checkpointing_enable()
        outcomes.append(outcome(student, rollout, maps))
    (loss, gradients), (again, same) = outcomes
    assert loss.equal(again)
    assert gradients.keys() == same.keys()
    assert all(gradients[name].equal(same[name]) for name in gradients)


def test_experts_too():
    student, teacher = (observed("experts", seed=seed, dtype=torch.float32) for seed in (0, 1))
    rollout = rollout_of()
    maps = maps_of(teacher.eval(), rollout, keys=3)
    kept = outcome(student.train(), rollout, maps)
    student.gradient_checkpointing_enable()
    assert_same(outcome(student, pack(rollout), maps), kept, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_under_autocast_what_is_seen_is_what_is_attended_with(packed):
    """Half precision, so that nothing but what sdpa keeps is kept; the loss is float32 all the same."""
    student, teacher, rollout = observed(dtype=torch.float32).train(), observed(seed=1), rollout_of()
    maps = maps_of(teacher.eval(), rollout, keys=3, dtype=torch.float16)
    exact = outcome(student, rollout, maps)
    dtypes = set()
    read = pack(rollout) if packed else rollout
    with torch.autocast("cpu", torch.bfloat16):
        seen = AttentionObserver([1], lambda layer, query, key, *_: dtypes.update({query.dtype, key.dtype}))
        visit_states(student, read.student, (), lambda *_: None, attend=seen)
        half = outcome(student, read, maps)
    assert dtypes == {torch.bfloat16}
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], exact[0], atol=0, rtol=0.02)
    assert not half[0].equal(exact[0])


def test_a_model_compared_with_itself_costs_nothing():
    model, rollout = observed(dtype=torch.float32), rollout_of()
    maps = maps_of(model, rollout, keys=4, dtype=torch.float32)
    place_N, position_N = places_of(rollout.student, rollout.state_pairs)
    observer = AttentionObserver(
        LAYERS,
        lambda layer, query, key, scaling, window: attention_map_loss(
            query, key, maps[layer], place_N, position_N, rollout.state_weights_N, scaling=scaling, window=window
        ),
    )
    visit_states(model, rollout.student, (), lambda *_: None, attend=observer)
    assert all(abs(loss.item()) < 1e-6 for loss in observer.results.values())


# ------------------------------------------------------------------------------------------------ stays as it was


@pytest.mark.parametrize("architecture", ["qwen3", "grouped", "windows in turn"])
def test_generation_and_files_stay_as_they_were(tmp_path, architecture):
    model = tiny_model(architecture).eval()
    batch = tiny_batch(lengths=LENGTHS)
    prompts = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}

    def answers():
        how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**prompts, **how)

    before, logits, described = answers(), model(**prompts).logits, model.config.to_dict()
    use_observed_attention(model)
    use_observed_attention(model)  # twice is as good as once
    after = answers()
    assert after.sequences.equal(before.sequences)
    assert all(a.equal(b) for a, b in zip(after.logits, before.logits, strict=True))
    assert model(**prompts).logits.equal(logits)
    assert model.config.to_dict() == described
    model.save_pretrained(tmp_path)
    assert not any("oprd" in path.read_text() for path in tmp_path.glob("*.json"))
    assert "oprd" not in json.dumps(model.generation_config.to_dict())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_states_are_the_same_observed_or_not(packed):
    model, rollout = tiny_model(), rollout_of()
    use_packed_attention(model)
    reading = (pack(rollout) if packed else rollout).student
    before, _ = visit_states(model, reading, (), lambda *_: None)
    use_observed_attention(model)
    use_packed_attention(model)  # it does already
    assert backbone_of(model).config._attn_implementation == attention.OBSERVED
    observer = AttentionObserver(LAYERS, lambda *_: None)
    for attend in (None, observer):
        after, _ = visit_states(model, reading, (), lambda *_: None, attend=attend)
        assert after.equal(before)
    attention.check_packed_attention(model)


# ------------------------------------------------------------------------------------------------ refusals

SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
REMEDY = r"Leave attention maps out of the objective for this model\.$"
REFUSED = {
    "eager": ("LlamaConfig", {}, {"attn_implementation": "eager"}, r"sdpa, and LlamaForCausalLM has 'eager'.*"),
    "soft cap": ("Gemma2Config", {"head_dim": 8}, {}, r"sdpa, and Gemma2ForCausalLM has 'eager'"),
    "sinks": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 2}, {}, r"sdpa, and GptOssForCausalLM has 'eager'"),
    "its own attention": (
        "StableLmConfig",
        {},
        {},
        r"StableLmForCausalLM has no attention maps .*\(its own attention\)",
    ),
    "linear attention": (
        "Qwen3NextConfig",
        {"head_dim": 8, "num_experts": 2},
        {},
        r"Qwen3NextForCausalLM has no attention maps to compare \(linear_attention\)",
    ),
    "its arguments end on the way": (
        "NemotronConfig",
        {},
        {},
        r"NemotronForCausalLM did not show its attention in layers \[1, 2\]",
    ),
    "two maps in a layer": ("DiffLlamaConfig", {}, {}, r"DiffLlamaAttention attends twice in a layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot(kind):
    name, extra, how, told = REFUSED[kind]
    config = getattr(transformers, name)(**SMALL | extra)
    model = transformers.AutoModelForCausalLM.from_config(config, **how)
    with pytest.raises(ValueError, match=rf"(?s){told}.*{REMEDY}"):
        use_observed_attention(model)
        check_observed_attention(model)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_a_map_would_leave_out(name):
    parts, module = [torch.randn(1, 2, 5, 4) for _ in range(3)], torch.nn.Module()
    module.layer_idx = 0
    arguments = {name: torch.ones(2), attention_maps.OBSERVER: AttentionObserver([1], lambda *_: None)}
    with pytest.raises(ValueError, match=rf"^Module has {name} in its attention\. {REMEDY}"):
        attention_maps.observed_attention_forward(module, *parts, None, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_that_can_pass_the_check_and_keep_their_mode(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    use_observed_attention(model)
    for training in (True, False):
        model.train(training)
        check_observed_attention(model)
        assert all(module.training is training for module in model.modules())
    assert backbone_of(model).config._attn_implementation == attention.OBSERVED


def test_the_check_catches_maps_that_hold_more(monkeypatch):
    """A model whose scores are not just products: here its eager attention is sharper than what it hands over."""
    model = tiny_model("llama")
    use_observed_attention(model)
    check_observed_attention(model)
    see = AttentionObserver.see
    monkeypatch.setattr(
        AttentionObserver,
        "see",
        lambda self, m, query, key, scaling, window: see(self, m, query, key, 2 * scaling, window),
    )
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM attends by more than queries and keys .*{REMEDY}"):
        check_observed_attention(model)
    assert backbone_of(model).config._attn_implementation == attention.OBSERVED


def nothing(*_):
    return None


def test_calls_that_cannot_work():
    model, rollout = tiny_model(), rollout_of()
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM did not show .*use_observed_attention comes first"):
        visit_states(model, rollout.student, (), nothing, attend=AttentionObserver([1], nothing))
    use_packed_attention(model)
    use_observed_attention(model)
    with pytest.raises(ValueError, match=r"\[4\] are outside 1\.\.3"):
        visit_states(model, rollout.student, (), nothing, attend=AttentionObserver([4], nothing))
    with pytest.raises(ValueError, match=r"\[3\] are outside 1\.\.2"):
        visit_states(model, rollout.student, (), nothing, top_layer=2, attend=AttentionObserver([3], nothing))
    suffix = pack(rollout, suffix=True)
    observer = AttentionObserver([1], nothing)
    with pytest.raises(ValueError, match="gradient_scope: full"):
        visit_states(model, suffix.student, (), nothing, prefix=suffix.student_prefix, attend=observer)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():
    model, rollout = observed(dtype=torch.float32).train(), rollout_of()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"use_reentrant: false"):
        visit_states(model, rollout.student, (), nothing, attend=AttentionObserver([1], nothing))
    with torch.no_grad():  # a teacher has no graph to keep
        visit_states(model, rollout.student, (), nothing, attend=AttentionObserver([1], nothing))


def test_layers_above_the_top_one_need_not_show():
    model, rollout = observed(dtype=torch.float32), rollout_of()
    observer = AttentionObserver([2], lambda layer, *_: layer)
    visit_states(model, rollout.student, (), nothing, top_layer=2, attend=observer)
    assert observer.results == {2: 2}
