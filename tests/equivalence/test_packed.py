"""Packed rows against padded ones, suffixes against plain caches: values, every gradient, every metric.

And what packed attention refuses, what it leaves alone, and blocks that do not run.
"""

import dataclasses
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, DynamicCache

from oprd.models import backbone_of, decoder_layers, head_of
from oprd.objectives import position_weights, select_positions
from oprd.states import attention, check_packed_attention, make_rollout, only, pack, use_packed_attention, visit_states
from oprd.states.views import Reading
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states
from tiny import (
    VOCAB,
    WIDE,
    canned_trainer,
    merged_tokenizer,
    other_prompt,
    random_bridge,
    reference_states,
    tiny_batch,
    tiny_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")  # adapters of experts that there are not

BASE = Objective(layers=(1, 2, 3), num_layers=3, vocab_size=VOCAB)
OUTPUT = dataclasses.replace(BASE, representation_weight=0.0)
CASES = {
    "all layers": BASE,
    "two layers, cosine": dataclasses.replace(BASE, layers=(1, 3), representation_loss="cosine"),
    "last layer": dataclasses.replace(BASE, layers=(3,)),
    "no layer above the first": dataclasses.replace(BASE, layers=(1,)),
    "head metric": dataclasses.replace(OUTPUT, logit_weight=1.0),
    "sampled": dataclasses.replace(OUTPUT, output_loss="sampled"),
    "top-k": dataclasses.replace(OUTPUT, output_loss="top_k", output_top_k=4),
    "full": dataclasses.replace(OUTPUT, output_loss="full"),
    "composite": dataclasses.replace(BASE, layers=(2,), logit_weight=0.3, output_loss="full", output_weight=0.7),
}
ARCHITECTURES = ["qwen2", "qwen3", "llama", "grouped", "windows", "windows in turn", "experts", "latent"]
LENGTHS = ((3, 9), (6, 2), (2, 7), (4, 4))  # longer than the windows
LORA = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


def pair(architecture="qwen3", dtype=torch.float64, **shape):
    """Student and frozen teacher that read packed rows too."""
    dtype = torch.float32 if architecture == "experts" else dtype  # torch's grouped products know no float64
    student, teacher = (tiny_model(architecture, seed=s, dtype=dtype, **shape if s else {}).train() for s in (0, 1))
    teacher.requires_grad_(False).eval()
    for model in (student, teacher):
        use_packed_attention(model)
    return student, teacher


def rollout_of(positions="last_k", k=3, *, text=None, lengths=LENGTHS, outputs=True):
    """States at some positions, outputs at all but the first token of each response; one row with a hole."""
    batch = tiny_batch(lengths=lengths)
    generated = batch["completion_mask"].bool()
    output_mask = generated.clone()
    output_mask[:, 0] = False
    output_mask[0, 2] = False
    state_mask = select_positions(generated, positions, k)
    state_mask[2, 5:6] = False
    return make_rollout(
        *batch.values(),
        state_weights_BC=position_weights(state_mask),
        output_weights_BC=position_weights(output_mask) * outputs,
        teacher_text=None if text is None else text(batch),
    )


def used(objective, rollout):
    return only(rollout, states=objective.uses_states, outputs=objective.uses_output)


def tolerance(architecture):
    return {"atol": 1e-4, "rtol": 1e-3} if architecture == "experts" else {"atol": 1e-6, "rtol": 1e-5}


def outcome(objective, student, teacher, rollout):
    """Loss, gradients, terms and sums."""
    targets = teacher_states(objective, teacher, rollout)
    loss, terms, sums = student_loss(objective, student, teacher, rollout, targets)
    student.zero_grad()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, terms, sums


def assert_same(ours, twin, atol=1e-6, rtol=1e-5):
    torch.testing.assert_close(ours[0], twin[0], atol=atol, rtol=rtol)
    assert_same_gradients(ours[1], twin[1], atol, rtol)
    for mine, other in zip(ours[2:], twin[2:], strict=True):
        assert mine.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(mine[name], other[name], atol=atol, rtol=rtol, msg=f"{name} differs")


def assert_same_gradients(ours, twin, atol=1e-6, rtol=1e-5):
    assert any(g.abs().max() > 1e-4 for g in twin.values())
    for name in ours.keys() | twin.keys():  # none at all is as good as zeros
        known = twin.get(name, ours.get(name))
        mine, other = (g.get(name, torch.zeros_like(known)) for g in (ours, twin))
        torch.testing.assert_close(mine, other, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------ packed as padded


@pytest.mark.parametrize("case", CASES)
def test_packed_equals_padded(case):
    """Also with what nobody uses left out of the padded rows, and with the teacher's states in main memory."""
    objective = CASES[case]
    student, teacher = pair()
    rollout = rollout_of()
    whole = outcome(objective, student, teacher, rollout)
    less = used(objective, rollout)
    assert_same(outcome(objective, student, teacher, less), whole)
    packed = pack(less)
    assert packed.student.ids_BS.shape[0] == 1
    assert packed.student.ids_BS.numel() < rollout.student.ids_BS.numel()
    assert_same(outcome(objective, student, teacher, packed), whole)
    offloaded = dataclasses.replace(objective, offload_targets=True)
    again = outcome(offloaded, student, teacher, packed)
    assert again[0].equal(outcome(objective, student, teacher, packed)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_padded_in_every_architecture(architecture, adapter, checkpointing):
    student, teacher = pair(architecture)
    objective = CASES["composite"]
    if adapter:
        student = get_peft_model(student, LoraConfig(**LORA))
        student.enable_input_require_grads()
    rollout = rollout_of()
    whole = outcome(objective, student, teacher, rollout)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(outcome(objective, student, teacher, pack(rollout)), whole, **tolerance(architecture))


@pytest.mark.parametrize("scope", ["full", "suffix"])
def test_packed_is_close_to_padded_under_bf16_autocast(scope):
    student, teacher = pair(dtype=torch.float32)
    rollout = rollout_of("all") if scope == "full" else rollout_of("all", outputs=False)
    objective = CASES["composite"] if scope == "full" else BASE
    packed = pack(used(objective, rollout), suffix=scope == "suffix")
    exact = outcome(objective, student, teacher, packed)
    with torch.autocast("cpu", torch.bfloat16):
        targets = teacher_states(objective, teacher, packed)
        loss, _, _ = student_loss(objective, student, teacher, packed, targets)
    assert loss.dtype == torch.float32
    if scope == "full":
        assert {t.dtype for t in targets.layers.values()} == {torch.bfloat16}
    student.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss.detach(), exact[0], atol=0, rtol=0.03)
    for name, gradient in exact[1].items():
        ours = dict(student.named_parameters())[name].grad
        assert torch.cosine_similarity(ours.flatten(), gradient.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("case", ["all layers", "no layer above the first", "composite"])
def test_another_prompt(case):
    """The teacher's columns are shifted; its documents are longer than the student's."""
    objective = CASES[case]
    student, teacher = pair()
    rollout = used(objective, rollout_of(text=other_prompt))
    packed = pack(rollout)
    assert sum(packed.teacher.lengths) > sum(packed.student.lengths)
    assert_same(outcome(objective, student, teacher, packed), outcome(objective, student, teacher, rollout))


@pytest.mark.parametrize("layers", [(1, 2, 3), (1,)])
@pytest.mark.parametrize("kind", ["mse", "normalized_mse", "cosine"])
def test_through_a_bridge(kind, layers):
    student, teacher = pair(**WIDE)
    objective = Objective(
        layers=layers, num_layers=3, vocab_size=VOCAB, representation_loss=kind, bridge=random_bridge()
    )
    rollout = used(objective, rollout_of())
    whole = outcome(objective, student, teacher, rollout)
    assert_same(outcome(objective, student, teacher, pack(rollout)), whole)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
@pytest.mark.parametrize("scope", ["full", "suffix"])
def test_another_tokenizer(tmp_path, kind, scope):
    """Pairs where the bytes meet, and the teacher's chains of tokens."""
    tokenizer = merged_tokenizer()
    teacher = tiny_model(seed=1, vocab_size=len(tokenizer), **WIDE)
    teacher.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = canned_trainer(
        tmp_path,
        teacher=teacher,
        trainer_kwargs={"teacher_processing_class": tokenizer, "bridge": random_bridge()},
        output_loss=kind,
        gradient_scope="suffix",
    )
    trainer.model.double(), teacher.double()
    texts = ("ab", "hello", "q1w2e3", "longerprompt")
    batch = trainer._generate_and_score_completions([{"prompt": text} for text in texts])
    rollout = trainer.make_rollout(batch)
    whole, packed = (
        outcome(trainer.objective, trainer.model, teacher, r)
        for r in (rollout, pack(rollout, suffix=scope == "suffix"))
    )
    if scope == "full":
        assert_same(packed, whole)
    else:
        assert_same((packed[0], whole[1], *packed[2:]), whole)


def test_nothing_supervised_and_rows_without_a_pair():
    student, teacher = pair()
    batch = tiny_batch(lengths=LENGTHS)
    for rows in ([], [2]):
        weights = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
        weights[rows] = batch["completion_mask"][rows] / 3
        rollout = make_rollout(*batch.values(), state_weights_BC=weights, output_weights_BC=weights)
        for suffix in (False, True):
            packed = pack(rollout, suffix=suffix)
            assert len(packed.student.lengths) == 1
            found = outcome(CASES["composite"], student, teacher, packed)
            if rows:
                assert_same(
                    (found[0], {"x": torch.ones(1)}),
                    (outcome(CASES["composite"], student, teacher, rollout)[0], {"x": torch.ones(1)}),
                )
            else:
                assert found[0] == 0
                assert all(g.eq(0).all() for g in found[1].values())
            assert found[1].keys() == {name for name, _ in student.named_parameters()}


# ------------------------------------------------------------------------------------------- documents are apart


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_document_sees_another(architecture):
    """Another first document of the same length leaves the states of the others as they are, bit by bit."""
    model, _ = pair(architecture, torch.float32)
    model.eval()
    reading = pack(rollout_of("all")).student
    ends = torch.tensor(reading.lengths).cumsum(0).tolist()
    for number, (length, end) in enumerate(zip(reading.lengths, ends, strict=True)):
        changed = reading.ids_BS.clone()
        changed[:, end - length : end] = (changed[:, end - length : end] + 5) % VOCAB
        own, other = (
            visit_states(model, r, [1, 2, 3], lambda layer, states: states[0].detach())[1]
            for r in (reading, dataclasses.replace(reading, ids_BS=changed))
        )
        elsewhere = torch.ones(reading.ids_BS.shape[1], dtype=torch.bool)
        elsewhere[end - length : end] = False
        for layer in own:
            if architecture == "experts":  # an expert's batch depends on who else comes to it
                torch.testing.assert_close(own[layer][elsewhere], other[layer][elsewhere])
            else:
                assert own[layer][elsewhere].equal(other[layer][elsewhere]), (number, layer)
            assert not own[layer][~elsewhere].equal(other[layer][~elsewhere])


# ------------------------------------------------------------------------------------------------------- suffix


def suffix_states(model, ids_S, start):
    """One unpadded row the plain way: what lies before ``start`` into a cache, without gradient; ``[L + 1, S, d]``."""
    if start == 0:
        return reference_states(model, ids_S)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids_S[None, :start], past_key_values=cache, use_cache=True)
    output = model(input_ids=ids_S[None, start:], past_key_values=cache, use_cache=True, output_hidden_states=True)
    states = torch.stack([h[0] for h in output.hidden_states])
    return torch.cat([states.new_full((len(states), start, states.shape[2]), float("nan")), states], 1)


def suffix_twin(objective, student, teacher, rollout):
    """The loss of an unpacked rollout from `suffix_states`, one row and one position at a time."""
    sets = (rollout.state_pairs, rollout.state_weights_N), (rollout.output_pairs, rollout.output_weights_N)
    own_head, other_head = head_of(student, VOCAB), head_of(teacher, VOCAB)
    total = 0.0
    for row in range(len(rollout.student.ids_BS)):
        columns = [c for pairs, _ in sets for c in pairs.student_N[pairs.row_N == row].tolist()]
        if not columns:
            continue
        own, other = (r.ids_BS[row][r.mask_BS[row]] for r in (rollout.student, rollout.teacher))
        own = suffix_states(student, own[: max(columns) + 1], min(columns))
        with torch.no_grad():
            other = reference_states(teacher, other)
        for (pairs, weights_N), kind in zip(sets, ("state", "output"), strict=True):
            for n in (pairs.row_N == row).nonzero().flatten().tolist():
                a, b = own[:, pairs.student_N[n]], other[:, pairs.teacher_N[n]]
                logits = own_head.logits(a[-1]), other_head.logits(b[-1])
                value = 0.0
                if kind == "state":
                    if objective.representation_weight:
                        mse = torch.stack([(a[layer] - b[layer]).pow(2).mean() for layer in objective.layers])
                        value = value + objective.representation_weight * mse.mean()
                    if objective.logit_weight:
                        gap = (logits[0] - logits[0].mean()) - (logits[1] - logits[1].mean())
                        value = value + objective.logit_weight * gap.pow(2).mean()
                else:
                    log_p, log_q = (x.log_softmax(-1) for x in logits)
                    value = objective.output_weight * (log_p.exp() * (log_p - log_q)).sum()
                total = total + weights_N[n] * value
    return total


def trainable_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


SUFFIX_CASES = ["all layers", "no layer above the first", "head metric", "full", "composite"]


@pytest.mark.parametrize("positions", ["last_k", "first_k", "all"])
@pytest.mark.parametrize("case", SUFFIX_CASES)
def test_suffix_equals_a_plain_cache(case, positions):
    objective = CASES[case]
    student, teacher = pair()
    rollout = used(objective, rollout_of(positions))
    slow = suffix_twin(objective, student, teacher, rollout)
    twin = trainable_gradients(student, slow)
    packed = pack(rollout, suffix=True)
    assert packed.student_prefix is not None
    ours = outcome(objective, student, teacher, packed)
    torch.testing.assert_close(ours[0].double(), slow.detach(), atol=1e-6, rtol=1e-5)
    assert_same_gradients(ours[1], twin)
    full = outcome(objective, student, teacher, pack(rollout))
    assert_same((ours[0], full[1], *ours[2:]), full)  # equal values
    gaps = [(full[1][name] - gradient).abs().max() for name, gradient in ours[1].items()]
    assert max(gaps) > 1e-3  # of another gradient


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_suffix_in_every_architecture(architecture, adapter, checkpointing):
    """Rows with and without a prefix, so that some documents of the prefix are empty."""
    student, teacher = pair(architecture)
    objective = CASES["composite"]
    if adapter:
        student = get_peft_model(student, LoraConfig(**LORA))
        student.enable_input_require_grads()
    rollout = rollout_of(lengths=((1, 9), *LENGTHS[1:]))
    rollout = dataclasses.replace(  # the first row is supervised from its first token
        rollout,
        output_pairs=dataclasses.replace(
            rollout.output_pairs, student_N=rollout.output_pairs.student_N - (rollout.output_pairs.row_N == 0).long()
        ),
    )
    slow = suffix_twin(objective, student, teacher, rollout)
    twin = trainable_gradients(student, slow)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    packed = pack(rollout, suffix=True)
    assert packed.student_prefix.lengths[0] == 0
    ours = outcome(objective, student, teacher, packed)
    torch.testing.assert_close(ours[0].double(), slow.detach().double(), **tolerance(architecture))
    if architecture == "latent":  # its cache holds what keys are made of, so that this map still has a gradient there
        ours[1].update({name: gradient for name, gradient in twin.items() if "kv_b_proj" in name})
    assert_same_gradients(ours[1], twin, **tolerance(architecture))


def test_suffix_from_the_first_column_is_the_full_gradient():
    student, teacher = pair()
    rollout = rollout_of("all", lengths=((1, 9), (1, 4), (1, 7), (1, 2)), outputs=False)
    whole, suffix = (outcome(BASE, student, teacher, pack(used(BASE, rollout), suffix=s)) for s in (False, True))
    assert_same(suffix, whole)


# ----------------------------------------------------------------------------------------------------- top layer


def counted(model):
    """How often each block runs from now on."""
    calls = [0] * len(decoder_layers(backbone_of(model)))
    for index, block in enumerate(decoder_layers(backbone_of(model))):

        def count(*_, index=index):
            calls[index] += 1

        block.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scope", ["padded", "packed", "suffix"])
@pytest.mark.parametrize("adapter", [False, True])
def test_blocks_above_the_highest_layer_do_not_run(adapter, scope, checkpointing):
    student, teacher = pair(layers=4)
    if adapter:
        student = get_peft_model(student, LoraConfig(**LORA))
    student.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else None
    objective = dataclasses.replace(BASE, layers=(1, 2))
    rollout = used(objective, rollout_of(outputs=False))
    if scope != "padded":
        rollout = pack(rollout, suffix=scope == "suffix")
    calls = [counted(model) for model in (student, teacher)]
    loss, gradients, _, _ = outcome(objective, student, teacher, rollout)
    readings = 1 + (scope == "suffix")
    assert calls == [[readings, readings, 0], [1, 1, 0, 0]]
    assert [len(decoder_layers(backbone_of(model))) for model in (student, teacher)] == [3, 4]
    assert not any(".layers.2." in name and g.abs().max() > 0 for name, g in gradients.items())
    everything = dataclasses.replace(objective, logit_weight=1e-30)  # the head is used, so that all blocks run
    assert_same((loss, gradients), outcome(everything, student, teacher, rollout)[:2])
    assert [c[-1] for c in calls] == [readings, 1]


def test_the_model_is_whole_again_after_an_error():
    model, _ = pair()
    reading = pack(rollout_of()).student
    blocks = decoder_layers(backbone_of(model))
    with pytest.raises(ZeroDivisionError):
        visit_states(model, reading, [1], lambda layer, states: 1 / 0, top_layer=2)
    assert decoder_layers(backbone_of(model)) is blocks
    assert len(blocks) == 3
    assert all(not block._forward_hooks for block in blocks)
    with pytest.raises(ValueError, match=r"\[3\] are outside 1..2"):
        visit_states(model, reading, [1, 3], lambda layer, states: None, top_layer=2)


# ------------------------------------------------------------------------------------- models that can and cannot


SMALL = {
    "vocab_size": VOCAB,
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
REMEDY = r"Unset max_tokens_per_microbatch and set gradient_scope: full for this model\.$"
REFUSED = {
    "eager": ("LlamaConfig", {}, {"attn_implementation": "eager"}, r"sdpa, and LlamaForCausalLM has 'eager'.*"),
    "soft cap": ("Gemma2Config", {"head_dim": 8}, {}, r"sdpa, and Gemma2ForCausalLM has 'eager'"),
    "its own attention": (
        "StableLmConfig",
        {},
        {},
        r"StableLmForCausalLM cannot read packed rows \(its own attention\)",
    ),
    "sinks": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 2}, {}, r"sdpa, and GptOssForCausalLM has 'eager'"),
    "linear attention": (
        "Qwen3NextConfig",
        {"head_dim": 8, "num_experts": 2},
        {},
        r"Qwen3NextForCausalLM cannot read packed rows \(linear_attention\)",
    ),
    "its arguments end on the way": ("NemotronConfig", {}, {}, r"NemotronAttention gets no arguments from its model's"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot(kind):
    name, extra, how, told = REFUSED[kind]
    config = getattr(transformers, name)(**SMALL | extra)
    model = transformers.AutoModelForCausalLM.from_config(config, **how)
    with pytest.raises(ValueError, match=rf"(?s){told}.*{REMEDY}"):
        use_packed_attention(model)
        check_packed_attention(model)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_attention_lacks_is_not_left_out_in_silence(name):
    parts = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    packing = {attention.ARGUMENT: attention.Packing((2, 3))}
    attention.packed_attention_forward(torch.nn.Module(), *parts, None, **{name: None}, **packing)
    with pytest.raises(ValueError, match=rf"^Module needs {name} in its attention\. {REMEDY}"):
        attention.packed_attention_forward(torch.nn.Module(), *parts, None, **{name: torch.ones(2)}, **packing)


def test_a_layer_that_attends_twice_has_no_suffix():
    config = transformers.DiffLlamaConfig(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_packed_attention(model)
    check_packed_attention(model)
    with pytest.raises(ValueError, match=r"DiffLlamaAttention attends twice in a layer\. Set gradient_scope: full"):
        check_packed_attention(model, suffix=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_that_can_pass_the_check_and_keep_their_mode(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    use_packed_attention(model)
    use_packed_attention(model)  # twice is as good as once
    for training in (True, False):
        model.train(training)
        check_packed_attention(model, suffix=True)
        assert all(module.training is training for module in model.modules())


def broken(break_it):
    """The packed attention with its arguments changed on the way."""

    def forward(module, query, key, value, mask, packing, kwargs):
        packing = break_it(query, packing) if packing is not None else None
        return attention.packed_attention_forward(
            module, query, key, value, mask, **kwargs, **{attention.ARGUMENT: packing}
        )

    def interface(module, query, key, value, attention_mask, **kwargs):
        return forward(module, query, key, value, attention_mask, kwargs.pop(attention.ARGUMENT, None), kwargs)

    return interface


BREAKS = {
    "documents see each other": lambda query, p: attention.Packing((query.shape[2],), p.writes, p.reads),
    "documents end elsewhere": lambda query, p: attention.Packing(p.lengths[::-1], p.writes, p.reads),
}


@pytest.mark.parametrize("fault", [*BREAKS, "places of tokens are lost", "the packing is lost", "memory is lost"])
def test_the_check_catches_a_model_that_ignores_the_packing(monkeypatch, fault):
    model = tiny_model()
    use_packed_attention(model)
    check_packed_attention(model, suffix=True)
    backbone = backbone_of(model)
    forward, told, suffix = backbone.forward, "reads packed rows differently", False
    if fault in BREAKS:
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, broken(BREAKS[fault]))
    elif fault == "places of tokens are lost":
        suffix = True  # rotations are relative: documents read whole do not care where they start
        monkeypatch.setattr(
            backbone, "forward", lambda **k: forward(**{n: v for n, v in k.items() if n != "position_ids"})
        )
    elif fault == "the packing is lost":
        told = "gets no arguments"
        monkeypatch.setattr(
            backbone, "forward", lambda **k: forward(**{n: v for n, v in k.items() if n != attention.ARGUMENT})
        )
    else:
        suffix = True
        forget = broken(lambda query, p: attention.Packing(p.lengths, p.writes))
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, forget)
        check_packed_attention(model)
    with pytest.raises(ValueError, match=told):
        check_packed_attention(model, suffix=suffix)
    assert backbone.training is model.training


@pytest.mark.parametrize("architecture", ["qwen3", "grouped", "windows", "windows in turn"])
def test_generation_and_files_stay_as_they_were(tmp_path, architecture):
    """Left-padded prompts get the same answers; nothing that is written names the new attention."""
    model = tiny_model(architecture).eval()
    batch = tiny_batch(lengths=LENGTHS)
    prompts = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}

    def answers():
        torch.manual_seed(3)
        return [
            model.generate(
                **prompts,
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=sample,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for sample in (False, True)
        ]

    before, (logits, loss) = answers(), (model(**prompts).logits, model(**prompts, labels=prompts["input_ids"]).loss)
    described = model.config.to_dict()
    use_packed_attention(model)
    for ours, twin in zip(answers(), before, strict=True):
        assert ours.sequences.equal(twin.sequences)
        assert all(a.equal(b) for a, b in zip(ours.logits, twin.logits, strict=True))
    assert model(**prompts).logits.equal(logits)
    assert model(**prompts, labels=prompts["input_ids"]).loss.equal(loss)
    assert model.config.to_dict() == described
    model.save_pretrained(tmp_path)
    assert not any(attention.PACKED in path.read_text() for path in tmp_path.glob("*.json"))
    assert attention.PACKED not in json.dumps(model.generation_config.to_dict())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_a_padded_reading_goes_on_as_before():
    """A model that reads packed rows takes padded ones too, with the same states."""
    model = tiny_model()
    reading = rollout_of().student
    before, _ = visit_states(model, reading, [], lambda *_: None)
    use_packed_attention(model)
    after, _ = visit_states(model, reading, [], lambda *_: None)
    assert isinstance(reading, Reading)
    assert after.equal(before)
