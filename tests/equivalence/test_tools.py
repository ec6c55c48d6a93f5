"""Rollouts of several turns: what is supervised, and the pairs that are compared, against chats put together by hand."""

import pytest
import torch

from oprd.objectives import position_weights
from oprd.states import make_rollout
from tiny import logged, reference_states
from tooled import ASSISTANT, SCRIPTS, call, tooled_model, tooled_tokenizer, tooled_trainer, twin_of, user

QUESTIONS = list(SCRIPTS)
POSITIONS = {
    "all": {},
    "first 4": {"positions": "first_k", "position_k": 4},
    "last 9": {"positions": "last_k", "position_k": 9},  # more than the last turn
    "last": {"positions": "last"},
}


def rolled_out(trainer):
    return trainer._generate_and_score_completions(list(trainer.train_dataset))


def supervised_by_hand(question, settings):
    """Places of a response, from 0, whose states are compared: of the student's own tokens alone."""
    own = [place for place, (_, is_own) in enumerate(twin_of(question)[1]) if is_own]
    k = settings.get("position_k", 1)
    return {"all": own, "first_k": own[:k], "last_k": own[-k:], "last": own[-1:]}[settings.get("positions", "all")]


@pytest.mark.parametrize("state_at", ["predictive", "token"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_pairs_and_weights(tmp_path, positions, state_at):
    settings = POSITIONS[positions]
    trainer = tooled_trainer(tmp_path, state_at=state_at, **settings)
    rollout = trainer.make_rollout(rolled_out(trainer))
    expected = {}
    for row, question in enumerate(QUESTIONS):
        prompt, response = twin_of(question)
        ids = rollout.student.ids_BS[row][rollout.student.mask_BS[row]].tolist()
        assert ids == prompt + [token for token, _ in response]  # both read all of it, results too
        places = supervised_by_hand(question, settings)
        for place in places:
            column = len(prompt) + place - (state_at == "predictive")
            expected[row, column] = 1 / len(places) / len(QUESTIONS)
    assert rollout.teacher is rollout.student
    pairs = rollout.state_pairs
    table = torch.stack([pairs.row_N, pairs.student_N], 1).tolist()
    found = {tuple(pair): weight.item() for pair, weight in zip(table, rollout.state_weights_N, strict=True)}
    assert len(found) == len(table) and found == pytest.approx(expected)
    assert torch.equal(pairs.student_N, pairs.teacher_N)


def test_the_first_token_after_a_result_is_predicted_at_the_end_of_its_prompt(tmp_path):
    trainer = tooled_trainer(tmp_path)
    rollout = trainer.make_rollout(rolled_out(trainer))
    before_N = rollout.student.ids_BS[rollout.state_pairs.row_N, rollout.state_pairs.student_N]
    assert (before_N == ASSISTANT).sum() == sum(len(turns) for turns in SCRIPTS.values())


def test_output_losses_see_the_same_tokens(tmp_path):
    """Also under ``last_k``, which is about states alone."""
    trainer = tooled_trainer(tmp_path, output_loss="full", **POSITIONS["last 9"])
    rollout = trainer.make_rollout(rolled_out(trainer))
    for row, question in enumerate(QUESTIONS):
        said = [token for token, is_own in twin_of(question)[1] if is_own]
        assert rollout.output_tokens_N[rollout.output_pairs.row_N == row].tolist() == said


def loss_by_hand(student, teacher, settings):
    """Mean squared error of hidden states, row by row, unpadded."""
    losses = []
    for question in QUESTIONS:
        prompt, response = twin_of(question)
        ids = torch.tensor(prompt + [token for token, _ in response])
        columns = [len(prompt) + place - 1 for place in supervised_by_hand(question, settings)]
        with torch.no_grad():
            target = reference_states(teacher, ids)[1:, columns]
        losses.append((reference_states(student, ids)[1:, columns] - target).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packed", [None, 150], ids=["padded", "packed"])
@pytest.mark.parametrize("positions", ["all", "last 9"])
def test_loss_and_gradient(tmp_path, positions, packed):
    settings = POSITIONS[positions]
    trainer = tooled_trainer(tmp_path, lm_head="keep", logit_weight=0, max_tokens_per_microbatch=packed, **settings)
    loss = trainer.compute_loss(trainer.model, rolled_out(trainer))
    loss.backward()
    twin, teacher = tooled_model(0), tooled_model(1)
    expected = loss_by_hand(twin, teacher, settings)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    ours, moved = dict(trainer.model.named_parameters()), 0
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and "lm_head" not in name:
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
            moved += parameter.grad.abs().max().item() > 1e-4
    assert moved > 10


def test_micro_batches_train_alike(tmp_path):
    losses = []
    for settings in (
        {},
        {"max_tokens_per_microbatch": 150},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        trainer = tooled_trainer(tmp_path, **settings)
        trainer.train()
        losses.append(torch.tensor(logged(trainer)))
    assert (losses[0][0] - losses[0][1]).abs() > 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=1e-6)


def test_another_result_moves_states_and_no_weight(tmp_path):
    """The tool says something else of the same length: same weights, another loss, for what follows is read after it."""

    def add(terms: str) -> str:
        """
        Adds two numbers.

        Args:
            terms: Such as 1+2.
        """
        return {"1+2": "9"}.get(terms, "8")

    scripts = {"1+2": SCRIPTS["1+2"], "7": SCRIPTS["7"]}
    other_scripts = {"1+2": [call("1+2"), "\\boxed{5}<end>"], "7": SCRIPTS["7"]}
    found = {}
    for name, how in {
        "as it was": {"scripts": scripts},
        "another result": {"scripts": scripts, "tools": [add]},
        "another answer": {"scripts": other_scripts},
    }.items():
        trainer = tooled_trainer(tmp_path, **how)
        batch = rolled_out(trainer)
        found[name] = batch["state_weights"], trainer.compute_loss(trainer.model, batch)
    weights, loss = found["as it was"]
    for other_weights, other_loss in (found["another result"], found["another answer"]):
        assert torch.equal(weights, other_weights)
        assert (loss - other_loss).abs() > 1e-4


def test_a_result_that_does_not_fit_is_left_out(tmp_path):
    """``max_completion_length`` counts results: the answer ends with the call, and what is there is supervised."""
    _, response = twin_of("1+2")
    calls = sum(is_own for _, is_own in response[:14])
    trainer = tooled_trainer(tmp_path, prompts=[user("1+2")], max_completion_length=calls + 2)
    batch = rolled_out(trainer)
    own = response[: int(batch["completion_mask"].sum())]
    assert batch["completion_ids"][0].tolist() == [token for token, _ in own] and all(is_own for _, is_own in own)
    assert (batch["state_weights"] > 0).all()


def test_a_result_that_leaves_no_room_for_an_answer(tmp_path):
    """The response ends in the tool's own tokens; the call alone is supervised."""
    _, response = twin_of("1+2")
    fits = [is_own for _, is_own in response].index(False) + sum(not is_own for _, is_own in response)
    trainer = tooled_trainer(tmp_path, prompts=[user("1+2")], max_completion_length=fits)
    batch = rolled_out(trainer)
    assert batch["completion_ids"][0].tolist() == [token for token, _ in response[:fits]]
    assert (batch["state_weights"][0] > 0).tolist() == [is_own for _, is_own in response[:fits]]
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_results_add_nothing_to_own_positions():
    """Pure: weights by hand, holes where a tool spoke; the pair before a hole's end is in the hole."""
    own = torch.tensor([[1, 1, 0, 0, 1, 1, 1]], dtype=torch.bool)
    ones = torch.ones(1, 7, dtype=torch.long)
    weights = position_weights(own, "sequence", num_sequences=1, num_positions=5)
    rollout = make_rollout(
        torch.arange(3).unsqueeze(0), torch.ones(1, 3), ones, ones, state_weights_BC=weights, output_weights_BC=weights
    )
    assert rollout.state_pairs.student_N.tolist() == [2, 3, 6, 7, 8]
    assert rollout.state_weights_N.tolist() == pytest.approx([0.2] * 5)


def test_history_before_the_question(tmp_path):
    """Earlier turns of a prompt, calls and results in them, are prompt: read and not supervised."""
    asked = {"type": "function", "function": {"name": "add", "arguments": {"terms": "1+1"}}}
    history = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "tool_calls": [asked]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
        *user("1+2"),
    ]
    trainer = tooled_trainer(tmp_path, prompts=[history], max_completion_length=60)
    batch = rolled_out(trainer)
    text = tooled_tokenizer().decode(batch["prompt_ids"][0])
    assert text == (
        '<tools>add<end><system>be brief<end><user>1+1<end><assistant><call>{"name": "add", "arguments": '
        '{"terms": "1+1"}}</call><end><result>2</result><assistant>2<end><user>1+2<end><assistant>'
    )
    assert batch["completion_ids"][0].tolist() == [token for token, _ in twin_of("1+2")[1]]
    own = [is_own for _, is_own in twin_of("1+2")[1]]
    assert (batch["state_weights"][0] > 0).tolist() == own
