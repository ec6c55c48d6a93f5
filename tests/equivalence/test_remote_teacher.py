"""A teacher elsewhere teaches what the same teacher here would: targets, losses, gradients and whole runs, bit for bit."""

import pytest
import torch

from oprd.bridge.collect import CONTROLS, SHUFFLED, Collection
from oprd.states import only, pack
from oprd.training.lessons import student_loss
from oprd.training.objective import teacher_states
from oprd.training.solved_head import solve_head
from served import remote_of
from tiny import (
    WIDE,
    canned_trainer,
    logged,
    merged_tokenizer,
    random_bridge,
    tiny_model,
)

PROMPTS = ("ab", "hello", "q1w2e3", "longerprompt", "xyz", "maths", "seven77", "end")
SAME, BRIDGE = {}, {"bridge": random_bridge(8)}
CASES = {
    "states": (SAME, {}),
    "states, some": (
        SAME,
        {"layers": [2], "positions": "last_k", "position_k": 2, "lm_head": "keep", "logit_weight": 0},
    ),
    "head metric": (SAME, {"lm_head": "keep", "logit_weight": 0.7}),
    "full": (SAME, {"output_loss": "full", "representation_weight": 0}),
    "top k": (SAME, {"output_loss": "top_k", "output_top_k": 4}),
    "sampled, packed": (SAME, {"output_loss": "sampled", "max_tokens_per_microbatch": 40}),
    "states, packed suffix": (SAME, {"gradient_scope": "suffix", "positions": "last_k", "position_k": 2}),
    "targets in main memory": (SAME, {"offload_targets": True}),
    "bridge": (BRIDGE, {"lm_head": "keep"}),
    "bridge, packed, full": (BRIDGE, {"output_loss": "full", "max_tokens_per_microbatch": 40}),
}


def both(tmp_path, teacher, remote, *, tokenizer=None, bridge=None, **settings):
    """A trainer with the teacher here, and one with it elsewhere."""
    more = {"teacher_processing_class": tokenizer, "bridge": bridge}
    here = canned_trainer(tmp_path / "here", teacher=teacher, trainer_kwargs=dict(more), **settings)
    there = canned_trainer(tmp_path / "there", teacher=remote, trainer_kwargs=dict(more), **settings)
    return here, there


def assert_same_gradients(here, there):
    """One micro-batch: targets, loss and every gradient."""
    outcomes = []
    for trainer in (here, there):
        batch = trainer._generate_and_score_completions([{"prompt": text} for text in PROMPTS])
        objective = trainer.objective
        rollout = only(trainer.make_rollout(batch), states=objective.uses_states, outputs=objective.uses_output)
        if trainer.args.is_packed:
            rollout = pack(rollout, suffix=trainer.args.gradient_scope == "suffix")
        targets = teacher_states(objective, trainer.teacher_model, rollout)
        loss, terms, _ = student_loss(objective, trainer.model, trainer.teacher_model, rollout, targets)
        trainer.model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        outcomes.append((targets, loss, terms, gradients))
    (targets, loss, terms, gradients), (others, other_loss, other_terms, other_gradients) = outcomes
    assert targets.layers.keys() == others.layers.keys()
    for layer, states in targets.layers.items():
        assert states.dtype == others.layers[layer].dtype
        assert states.equal(others.layers[layer])
    for name in ("at_states", "at_outputs", "at_chains"):
        one, other = getattr(targets, name), getattr(others, name)
        assert (one is None) == (other is None) and (one is None or one.equal(other))
    assert loss.equal(other_loss) and loss.isfinite() and loss != 0
    assert terms == other_terms
    assert gradients.keys() == other_gradients.keys() and gradients
    assert all(gradient.equal(other_gradients[name]) for name, gradient in gradients.items())


def assert_same_runs(here, there):
    for trainer in (here, there):
        torch.manual_seed(0)  # rows are shuffled
        trainer.train()
    assert logged(here) == logged(there) and len(logged(here)) == 2
    others = dict(there.model.named_parameters())
    assert all(weight.equal(others[name]) for name, weight in here.model.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_one_vocabulary(tmp_path, case):
    further, settings = CASES[case]
    shape = WIDE if further else {}
    with remote_of(tmp_path / "files", tiny_model(seed=1, **shape)) as remote:
        here, there = both(tmp_path, tiny_model(seed=1, **shape), remote, **further, **settings)
        assert there.lm_head == here.lm_head and there.objective.logit_weight == here.objective.logit_weight
        assert_same_gradients(here, there)
        assert_same_runs(here, there)
        needs_head = here.lm_head == "teacher" or here.objective.uses_head
        assert remote.has_head == needs_head


@pytest.mark.parametrize("kind", ["top_k", "full", "sampled"])
@pytest.mark.parametrize("further", [{}, BRIDGE, {"max_tokens_per_microbatch": 60}], ids=["alone", "bridge", "packed"])
def test_another_tokenizer(tmp_path, kind, further):
    tokenizer = merged_tokenizer()

    def teacher():
        model = tiny_model(seed=1, vocab_size=len(tokenizer), **WIDE)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model

    settings = {"output_loss": kind} | (further if "bridge" in further else {"representation_weight": 0, **further})
    with remote_of(tmp_path / "files", teacher(), tokenizer) as remote:
        here, there = both(tmp_path, teacher(), remote, tokenizer=tokenizer, **settings)
        assert_same_gradients(here, there)
        assert_same_runs(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_askers(tmp_path, dtype):
    """Under autocast the service reads in the same precision, and targets come in it."""
    with remote_of(tmp_path / "files") as remote:
        here, there = both(tmp_path, tiny_model(seed=1), remote, output_loss="full")
        batch = here._generate_and_score_completions([{"prompt": text} for text in PROMPTS])
        rollout = here.make_rollout(batch)
        with torch.autocast("cpu", dtype):
            targets, others = (teacher_states(t.objective, t.teacher_model, rollout) for t in (here, there))
        plain = teacher_states(here.objective, here.teacher_model, rollout)
    for layer, states in targets.layers.items():
        assert states.dtype == others.layers[layer].dtype == dtype
        assert states.equal(others.layers[layer])
        assert not states.float().equal(plain.layers[layer])
    assert targets.at_outputs.equal(others.at_outputs) and targets.at_outputs.dtype == others.at_outputs.dtype


def test_other_architectures(tmp_path):
    """A soft-capped tied teacher, whose head is its embedding."""

    def gemma():
        return tiny_model("gemma2", seed=1, tied=True)

    losses = []
    with remote_of(tmp_path / "files", gemma()) as remote:
        for teacher in (gemma(), remote):
            student = tiny_model("gemma2", tied=True)
            trainer = canned_trainer(tmp_path, model=student, teacher=teacher, output_loss="full")
            trainer.train()
            losses.append(logged(trainer))
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_the_solved_head(tmp_path):
    heads = []
    with remote_of(tmp_path / "files", tiny_model(seed=1, **WIDE)) as remote:
        for trainer in both(tmp_path, tiny_model(seed=1, **WIDE), remote, **BRIDGE):
            torch.manual_seed(0)
            trainer.train()
            assert trainer.lm_head == "solved"
            solve_head(trainer, prompts=8)
            heads.append(trainer.model.lm_head.weight)
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(tiny_model(seed=0).lm_head.weight)


def test_sums_for_a_bridge(tmp_path):
    """What a fit collects, without the random teacher that a teacher elsewhere has no place for."""
    with remote_of(tmp_path / "files", tiny_model(seed=1, **WIDE)) as remote:
        here, there = both(tmp_path, tiny_model(seed=1, **WIDE), remote, **BRIDGE)
        rollout = here.make_rollout(here._generate_and_score_completions([{"prompt": text} for text in PROMPTS]))
        held_out = torch.arange(len(PROMPTS)) % 4 == 3
        found = []
        for trainer in (here, there):
            collection = Collection(random_bridge().layer_map, 16, 24, controls=[SHUFFLED])
            collection.add(trainer.model, trainer.teacher_model, rollout, held_out)
            found.append(collection)
    for one, other in zip(found[0].fitter.train, found[1].fitter.train, strict=True):
        assert one.count == other.count > 0
        assert all(t.equal(other.tensors()[name]) for name, t in one.tensors().items())
    assert list(found[0].controls) == [SHUFFLED] and set(found[0].controls) < set(CONTROLS)


def test_a_bridge_for_another_teacher_is_refused(tmp_path):
    bridge = random_bridge(8)
    with remote_of(tmp_path / "files", tiny_model(seed=1, **WIDE)) as remote:
        bridge.fitted_for = {"teacher": remote.fingerprint}
        canned_trainer(tmp_path, teacher=remote, trainer_kwargs={"bridge": bridge})
        bridge.fitted_for = {"teacher": "0" * 32}
        with pytest.raises(ValueError, match=f"another teacher: {'0' * 32}, not {remote.fingerprint}"):
            canned_trainer(tmp_path, teacher=remote, trainer_kwargs={"bridge": bridge})


@pytest.mark.parametrize(
    "settings",
    [
        {"lm_head": "teacher"},
        {"output_loss": "full", "max_tokens_per_microbatch": 40},
        {"representation_loss": "transition"},
    ],
    ids=["mean of the heads", "full, packed", "changes"],
)
def test_one_of_several_teachers(tmp_path, settings):
    """Beside one that is here, each with its rows."""
    routed = {"teacher_column": "kind", "columns": {"kind": ["a", "b"] * 8}, "teachers": {"a": {}, "b": {}}, **settings}
    with remote_of(tmp_path / "files", tiny_model(seed=1)) as remote:
        here, there = (
            canned_trainer(tmp_path / where, teacher={"a": one, "b": tiny_model(seed=2)}, **routed)
            for where, one in (("here", tiny_model(seed=1)), ("there", remote))
        )
        assert here.lm_head == there.lm_head
        assert_same_runs(here, there)


def test_a_remote_teacher_gives_no_attention_maps(tmp_path):
    with (
        remote_of(tmp_path / "files", tiny_model(seed=1)) as remote,
        pytest.raises(ValueError, match=r"A teacher elsewhere gives no attention maps\. Set attention_weight: 0"),
    ):
        canned_trainer(tmp_path, teacher=remote, attention_weight=1.0)
