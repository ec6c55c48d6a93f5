"""Teachers of another shape, prompt or tokenizer, against slow twins: plain forwards, loops over positions, text."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from oprd.bridge import BridgeFitter, model_fingerprint
from oprd.objectives import map_layers, position_weights
from oprd.states import make_rollout
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states
from tiny import (
    VOCAB,
    WIDE,
    canned_completion,
    canned_trainer,
    logged,
    merged_tokenizer,
    random_bridge,
    reference_states,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("kind", ["normalized_mse", "mse", "cosine"])
@pytest.mark.parametrize("layers", [(1, 2, 3), (2,)])
def test_eq_14_and_15_against_their_twin(kind, layers):
    student, teacher = tiny_model(seed=0, dtype=torch.float64), tiny_model(seed=1, dtype=torch.float64, **WIDE)
    bridge, batch = random_bridge(), tiny_batch()
    objective = Objective(layers=layers, num_layers=3, vocab_size=VOCAB, representation_loss=kind, bridge=bridge)
    weights = position_weights(batch["completion_mask"])
    rollout = make_rollout(*batch.values(), state_weights_BC=weights, output_weights_BC=weights)
    loss, _, sums = student_loss(objective, student, teacher, rollout, teacher_states(objective, teacher, rollout))
    rows = []
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])
        own, other = reference_states(student, ids), reference_states(teacher, ids)
        total = 0.0
        for layer in layers:
            tensors = {n: t.double()[layer - 1] for n, t in bridge._tensors.items()}
            partner = other[bridge.layer_map[layer - 1]]
            for at in range(len(prompt) - 1, len(ids) - 1):
                a = tensors["student_map"] @ (own[layer, at] - tensors["student_mean"])
                b = tensors["teacher_map"] @ (partner[at] - tensors["teacher_mean"])
                if kind == "normalized_mse":
                    total = total + (a / a.norm() - b / b.norm()).pow(2).sum()
                elif kind == "mse":
                    total = total + (a - b).pow(2).mean()
                else:
                    total = total + 1 - F.cosine_similarity(a, b, dim=0)
        rows.append(total / len(layers) / len(completion))
    slow = sum(rows) / 4
    torch.testing.assert_close(loss.double(), slow, atol=1e-6, rtol=1e-5)
    parameters = [p for name, p in student.named_parameters() if "lm_head" not in name]
    for ours, twin in zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, slow)), strict=True):
        if twin is not None and (ours is not None or twin.abs().max() > 0):  # no gradient at all, or one of zeros
            torch.testing.assert_close(ours, twin, atol=1e-6, rtol=1e-4)
    assert set(sums) == {"cosine", *(f"cosine/layer_{layer:02d}" for layer in layers)}


def teacher_path(tmp_path, seed=1, tokenizer=None, **shape):
    model = tiny_model(seed=seed, **{**WIDE, **shape})
    model.generation_config.eos_token_id = (tokenizer or tiny_tokenizer()).eos_token_id
    return model


def bridged_trainer(tmp_path, **settings):
    return canned_trainer(
        tmp_path, teacher=teacher_path(tmp_path), trainer_kwargs={"bridge": random_bridge()}, **settings
    )


def test_training_through_a_bridge_moves_the_body_and_leaves_bridge_and_teacher(tmp_path):
    bridge = random_bridge()
    before = {n: t.clone() for n, t in bridge._tensors.items()}
    teacher = teacher_path(tmp_path)
    trainer = canned_trainer(
        tmp_path, teacher=teacher, trainer_kwargs={"bridge": bridge}, max_steps=30, optim="adamw_torch"
    )
    trainer.train()
    cosines = logged(trainer, "cosine")
    assert cosines[-1] > cosines[0] + 0.1
    assert all(t.equal(before[n]) for n, t in bridge._tensors.items())
    for name, weight in teacher_path(tmp_path).named_parameters():
        assert dict(teacher.named_parameters())[name].equal(weight)
    assert trainer.model.lm_head.weight.equal(tiny_model(seed=0).lm_head.weight)
    assert trainer.objective.representation_loss == "normalized_mse"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"output_loss": "full"},
        {"output_loss": "sampled", "positions": "last_k", "position_k": 3, "layers": [2, 3]},
        {"logit_weight": 0.5},
    ],
    ids=str,
)
def test_accumulation_does_not_matter_through_a_bridge(tmp_path, settings):
    outcomes = []
    for size in (8, 2):
        trainer = bridged_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        trainer.train()
        outcomes.append(dict(trainer.model.named_parameters()))
    for name, weight in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], weight, atol=3e-6, rtol=1e-4)


def test_one_shape_does_not_switch_the_bridge_off(tmp_path):
    bridge = random_bridge(teacher_width=16, teacher_layers=3)
    plain, through = (
        canned_trainer(tmp_path, lm_head="keep", logit_weight=0, trainer_kwargs={"bridge": b}) for b in (None, bridge)
    )
    assert through.objective.bridge is not None
    losses = []
    for trainer in (plain, through):
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_lora_through_a_bridge(tmp_path):
    from peft import LoraConfig

    peft = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    bridge = random_bridge()
    bridge.fitted_for = {"student": model_fingerprint(tiny_model(seed=0))}
    trainer = canned_trainer(
        tmp_path, teacher=teacher_path(tmp_path), trainer_kwargs={"bridge": bridge, "peft_config": peft}
    )
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n and p.abs().max() > 0]
    assert moved


def test_a_bridge_for_others_is_refused(tmp_path):
    bridge = random_bridge()
    bridge.fitted_for = {"student": "0" * 32}
    with pytest.raises(ValueError, match=f"another student: {'0' * 32}, not [0-9a-f]{{32}}"):
        canned_trainer(tmp_path, teacher=teacher_path(tmp_path), trainer_kwargs={"bridge": bridge})
    with pytest.raises(ValueError, match=r"bridge is for a student of 3 layers x 8"):
        canned_trainer(
            tmp_path, teacher=teacher_path(tmp_path), trainer_kwargs={"bridge": random_bridge(student_width=8)}
        )
    with pytest.raises(ValueError, match="at least 9 layers"):
        wrong = random_bridge(teacher_layers=9)
        canned_trainer(tmp_path, teacher=teacher_path(tmp_path), trainer_kwargs={"bridge": wrong})
    with pytest.raises(ValueError, match="There is no bridge in"):
        canned_trainer(tmp_path, teacher=teacher_path(tmp_path), bridge=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="lm_head: teacher cannot be"):
        bridged_trainer(tmp_path, lm_head="teacher")


# ------------------------------------------------------------------------------------------------ another tokenizer


def other_tokenizer_trainer(tmp_path, *, bridge=None, **settings):
    tokenizer = merged_tokenizer()
    teacher = teacher_path(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer))
    return canned_trainer(
        tmp_path,
        teacher=teacher,
        trainer_kwargs={"teacher_processing_class": tokenizer, "bridge": bridge},
        **settings,
    )


def tiny_texts(trainer, batch, row):
    ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
    return ids, [trainer.processing_class.decode([i]) if i > 1 else "" for i in ids]


@pytest.mark.parametrize("state_at", ["predictive", "token"])
def test_states_are_paired_where_both_have_read_the_same_text(tmp_path, state_at):
    trainer = other_tokenizer_trainer(tmp_path, bridge=random_bridge(), state_at=state_at)
    inputs = [{"prompt": text} for text in ("ab", "hello", "q1w2e3", "longerprompt")]
    batch = trainer._generate_and_score_completions(inputs)
    rollout = trainer.make_rollout(batch)
    other = merged_tokenizer()
    found = 0
    for row, own_column, column in zip(
        *(
            t.tolist()
            for t in (rollout.state_pairs.row_N, rollout.state_pairs.student_N, rollout.state_pairs.teacher_N)
        ),
        strict=True,
    ):
        own = rollout.student.ids_BS[row, : own_column + 1]
        theirs = rollout.teacher.ids_BS[row, : column + 1]
        a, b = (t.decode(x, skip_special_tokens=True) for t, x in ((trainer.processing_class, own), (other, theirs)))
        assert a == b
        assert (own[-1] == 1) == (theirs[-1] == other.eos_token_id)  # end of turn with end of turn
        found += 1
    generated = int(batch["completion_mask"].sum())
    assert generated > found > generated / 4
    torch.testing.assert_close(batch["state_weights"].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["full", "top_k", "sampled"])
def test_prefix_marginals_against_text(tmp_path, kind):
    """Single letters against pairs: the twin reads the teacher's text prefix by prefix and sums over its tokens."""
    trainer = other_tokenizer_trainer(
        tmp_path, representation_weight=0, output_loss=kind, **({"output_top_k": 5} if kind == "top_k" else {})
    )
    trainer.model.double(), trainer.teacher_model.double()
    inputs = [{"prompt": text} for text in ("ab", "hello", "q1w2e3", "longerprompt")]
    batch = trainer._generate_and_score_completions(inputs)
    rollout = trainer.make_rollout(batch)
    targets = teacher_states(trainer.objective, trainer.teacher_model, rollout)
    loss, _, sums = student_loss(trainer.objective, trainer.model, trainer.teacher_model, rollout, targets)
    other, own = merged_tokenizer(), trainer.processing_class
    names = {i: t for t, i in other.get_vocab().items()}
    letters = {i: t for t, i in own.get_vocab().items()}
    rows = []
    for row, prompt in enumerate(inputs):
        ids, _ = tiny_texts(trainer, batch, row)
        text = own.decode(ids, skip_special_tokens=True)
        theirs = other(text, add_special_tokens=False)["input_ids"] if text else []
        before = other(prompt["prompt"])["input_ids"]
        with torch.no_grad():
            q = trainer.teacher_model(torch.tensor([before + theirs])).logits[0].softmax(-1)[len(before) - 1 :]
        ends = [0]
        for token in theirs:
            ends.append(ends[-1] + len(names[token]))
        start = own(prompt["prompt"])["input_ids"]
        log_p = trainer.model(torch.tensor([start + ids])).logits[0].log_softmax(-1)[len(start) - 1 :]
        values = []
        for t, token in enumerate(ids):
            anchor = max(k for k, end in enumerate(ends) if end <= t)
            residue = text[ends[anchor] : t]
            total = sum(
                q[anchor, v] for v, name in names.items() if not residue or (v > 1 and name.startswith(residue))
            )

            def mass(s, q=q, anchor=anchor, residue=residue, total=total):
                if s < 2:
                    special = {0: 1, 1: 0}[s]  # pad is pad, end is end
                    return q[anchor, special] / total if not residue else torch.tensor(0.0)
                said = [v for v, name in names.items() if v > 1 and name.startswith(residue + letters[s])]
                return q[anchor, said].sum() / total

            if total <= 1e-4:
                values.append(0.0 * log_p[t, 0])
            elif kind == "sampled":
                cost = (log_p[t, token] - mass(token).clamp(1e-6, 1).log()).detach()
                values.append(cost * log_p[t, token])
            else:
                chosen = range(VOCAB) if kind == "full" else {*log_p[t].topk(5).indices.tolist(), token}
                can = [s for s in chosen if s == token or mass(s) > 0]
                p, m = log_p[t, can].exp(), torch.stack([mass(s).to(log_p) for s in can])
                value = (p * (p.log() - m.clamp(min=1e-6).log())).sum()
                rest = 1 - p.sum()
                if rest > 1e-9:
                    value = value + rest * (rest.log() - (1 - m.sum()).clamp(min=1e-6).log())
                values.append(value)
        rows.append(torch.stack(values).mean())
    slow = torch.stack(rows).mean()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    if kind != "sampled":
        torch.testing.assert_close(loss.double(), slow.double(), atol=2e-5, rtol=1e-4)
    for ours, twin in zip(*(torch.autograd.grad(x, parameters) for x in (loss, slow)), strict=True):
        torch.testing.assert_close(ours, twin, atol=2e-5, rtol=1e-3)
    assert {"prefix/supervised", "prefix/student_rest", "prefix/teacher_rest"} <= set(sums)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_student_whose_tokens_are_longer_is_supervised_through_chains(tmp_path, kind):
    """Pairs against single letters: the sampled pair's probability is the product of its letters'."""
    from datasets import Dataset

    from oprd import OPRDConfig, OPRDTrainer

    own, other = merged_tokenizer(), tiny_tokenizer()

    class Canned(OPRDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            texts = [tiny_tokenizer().decode(canned_completion(ids), skip_special_tokens=True) for ids in prompt_ids]
            return [own(text)["input_ids"] + [own.eos_token_id] for text in texts]

    student = tiny_model(seed=0, vocab_size=len(own))
    student.generation_config.eos_token_id = own.eos_token_id
    trainer = Canned(
        model=student,
        teacher_model=tiny_model(seed=1, **WIDE),
        args=OPRDConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            representation_weight=0,
            output_loss=kind,
            report_to="none",
            max_completion_length=32,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "hello", "q1w2e3", "longerprompt"] * 4}),
        processing_class=own,
        teacher_processing_class=other,
    )
    inputs = [{"prompt": text} for text in ("ab", "hello", "q1w2e3", "longerprompt")]
    batch = trainer._generate_and_score_completions(inputs)
    rollout = trainer.make_rollout(batch)
    assert len(rollout.prefix.chain_pair_E) > 0
    teacher = trainer.teacher_model
    targets = teacher_states(trainer.objective, teacher, rollout)
    from oprd.models import head_of
    from oprd.training.output_term import _chains, _projection

    head = _projection(trainer.objective, head_of(teacher, VOCAB), targets.at_chains)
    chain_N = _chains(head, rollout, targets.at_chains)
    checked = 0
    for n, (row, token) in enumerate(
        zip(rollout.output_pairs.row_N.tolist(), rollout.output_tokens_N.tolist(), strict=True)
    ):
        piece = own.decode([token], skip_special_tokens=True)
        assert chain_N[n].isnan().item() is (len(piece) < 2)
        if len(piece) == 2:
            column = rollout.output_pairs.teacher_N[n]
            ids = rollout.teacher.ids_BS[row, : column + 3]
            assert other.decode(ids[-2:]) == piece
            log_q = teacher(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
            expected = log_q[column, ids[-2]] + log_q[column + 1, ids[-1]]
            torch.testing.assert_close(chain_N[n], expected, atol=1e-4, rtol=1e-4)
            checked += 1
    assert checked > 5
    loss, _, sums = student_loss(trainer.objective, trainer.model, teacher, rollout, targets)
    loss.backward()
    assert trainer.model.lm_head.weight.grad.abs().max() > 0
    total, count = sums["prefix/supervised"]
    assert total == count == len(rollout.output_pairs)


def test_too_few_pairs_show_an_example(tmp_path):
    trainer = other_tokenizer_trainer(tmp_path, bridge=random_bridge(), min_paired_share=1.0)
    inputs = [{"prompt": text} for text in ("ab", "hello", "q1w2e3", "longerprompt") * 8]
    with pytest.raises(
        ValueError,
        match=r"(?s)Only \d+% of the student's positions.*\n  student: .*\|.*\n  teacher: .*min_paired_share",
    ):
        trainer._generate_and_score_completions(inputs)


def test_training_across_tokenizers_lowers_the_divergence(tmp_path):
    trainer = other_tokenizer_trainer(
        tmp_path, representation_weight=0, output_loss="top_k", max_steps=30, optim="adamw_torch"
    )
    trainer.train()
    divergence = logged(trainer, "output_divergence")
    assert divergence[-1] < 0.6 * divergence[0]
    assert min(logged(trainer, "paired_share")) > 0.3


def test_the_combination_of_bridge_and_prefix_marginals(tmp_path):
    trainer = other_tokenizer_trainer(tmp_path, bridge=random_bridge(), output_loss="top_k", representation_weight=0.1)
    trainer.train()
    assert {"loss/representation", "loss/output", "cosine", "prefix/supervised"} <= set(trainer.state.log_history[0])


def test_only_the_head_trains_where_that_is_asked_for(tmp_path):
    trainer = canned_trainer(
        tmp_path, representation_weight=0, output_loss="full", trainable="head", lm_head="keep", logit_weight=0
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not p.equal(start[n])}
    assert moved == {"lm_head.weight"}
    with pytest.raises(ValueError, match="this student ties them"):
        canned_trainer(tmp_path, model=tiny_model(tied=True), output_loss="full", trainable="head", lm_head="keep")


def test_a_fitted_bridge_fits_its_models(tmp_path):
    """States of the two models on one text, through a fitter, into a trainer: cosine starts where the report says."""
    student, teacher = tiny_model(seed=0), teacher_path(tmp_path)
    fitter = BridgeFitter(map_layers(3, 5), 16, 24)
    trainer = canned_trainer(tmp_path, teacher=teacher, trainer_kwargs={"bridge": random_bridge()})
    inputs = [
        {"prompt": text} for text in ("ab", "hello", "q1w2e3", "longerprompt", "xyz", "maths", "seven77", "end") * 4
    ]
    batch = trainer._generate_and_score_completions(inputs)
    from oprd.bridge.collect import _states

    rollout = trainer.make_rollout(batch)
    pairs = rollout.state_pairs
    own = _states(student, rollout.student, [1, 2, 3], pairs, "student")
    theirs = _states(teacher, rollout.teacher, fitter.layer_map, pairs, "teacher")
    fitter.update(own, theirs)
    objective = dataclasses.replace(trainer.objective, bridge=fitter.fit(rank=4))
    _, _, sums = student_loss(objective, student, teacher, rollout, teacher_states(objective, teacher, rollout))
    total, count = sums["cosine"]
    assert total / count > 0.5
