"""What is left out of a rollout, how the rest is laid into one row, and how rows are dealt to micro-batches and processes.

`only` and `pack` are compared with loops over pairs and rows.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.objectives import select_positions
from oprd.states import deal, fill, make_rollout, only, pack
from oprd.states.views import PrefixRows
from tiny import other_prompt, tiny_batch

# ------------------------------------------------------------------------------------------- to micro-batches


@given(st.lists(st.integers(1, 30), max_size=14), st.integers(1, 40), st.integers(1, 18))
def test_fill(lengths, budget, at_least):
    groups = fill(lengths, budget, at_least)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= budget for group in groups if group)
    assert len(groups) >= at_least
    totals = [sum(lengths[row] for row in group) for group in groups]
    assert totals == sorted(totals, reverse=True)
    if len(lengths) >= at_least:
        assert all(groups)  # nothing runs empty while rows are left to share


@given(st.lists(st.integers(1, 30), max_size=14), st.integers(1, 40))
def test_fill_leaves_no_two_that_would_fit_together(lengths, budget):
    totals = sorted(sum(lengths[row] for row in group) for group in fill(lengths, budget))
    assert len(totals) < 2 or totals[0] + totals[1] > budget


@pytest.mark.parametrize(
    ("lengths", "budget", "at_least", "groups"),
    [
        ([3, 3], 6, 1, [[0, 1]]),
        ([3, 3], 5, 1, [[0], [1]]),
        ([2, 9, 4], 8, 1, [[1], [0, 2]]),  # a row over the budget is alone
        ([2, 3, 5, 4], 9, 1, [[2, 3], [0, 1]]),
        ([4, 3, 2, 1], 10, 2, [[0, 1], [2, 3]]),
        ([5], 9, 3, [[0], [], []]),
        ([], 9, 1, [[]]),
    ],
)
def test_fill_by_hand(lengths, budget, at_least, groups):
    assert fill(lengths, budget, at_least) == groups


@given(st.integers(1, 4).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, 50), max_size=6))))
def test_deal(hands_and_some):
    hands, some = hands_and_some
    lengths = [length + shift for length in some for shift in range(hands)]
    dealt = deal(lengths, hands)
    assert sorted(row for hand in dealt for row in hand) == list(range(len(lengths)))
    assert {len(hand) for hand in dealt} == {len(lengths) // hands}
    assert all(hand == sorted(hand) for hand in dealt)
    totals = [sum(lengths[row] for row in hand) for hand in dealt]
    assert max(totals) - min(totals) <= max(lengths, default=0)


@given(st.integers(1, 4), st.integers(0, 6), st.data())
def test_deal_of_any_lengths(hands, share, data):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=hands * share, max_size=hands * share))
    totals = [sum(lengths[row] for row in hand) for hand in deal(lengths, hands)]
    assert max(totals) - min(totals) <= max(lengths, default=0)


def test_deal_of_what_cannot_be_dealt():
    with pytest.raises(ValueError, match="5 rows cannot be dealt evenly to 2"):
        deal([1] * 5, 2)


# ---------------------------------------------------------------------------------------------- what is read


def teacher_text(batch):
    """A teacher with longer prompts, and a chain of two steps behind the first token of row 1."""
    text = other_prompt(batch)
    chain = torch.full((*batch["prompt_ids"].shape[:1], 2, 4), -1)
    start = int(text.before_BC[1, 0])
    chain[1] = torch.tensor([[0, start, 4, 6], [0, start + 2, 2, 3]])
    return dataclasses.replace(text, chain_BE4=chain)


def rollout_of(states, outputs, *, crosses=False, at="predictive", batch=None):
    """A rollout with the given masks of response tokens as weights (each weight another number)."""
    batch = tiny_batch() if batch is None else batch
    numbers = 1 + torch.arange(states.numel(), dtype=torch.float32).view(states.shape)
    text = teacher_text(batch) if crosses else None
    table = (lambda residue_N: (None, torch.zeros_like(residue_N))) if crosses else None
    return make_rollout(
        *batch.values(),
        state_weights_BC=states * numbers,
        output_weights_BC=outputs * numbers / 7,
        state_at=at,
        teacher_text=text,
        prefix_table=table,
    )


def masks(**marks):
    """Masks of a few response tokens: ``states={row: [t, ...]}``."""
    found = {name: torch.zeros(4, 7, dtype=torch.bool) for name in ("states", "outputs")}
    for name, rows in marks.items():
        for row, places in rows.items():
            found[name][row, places] = True
    return found


EVERY = tiny_batch()["completion_mask"].bool()
NONE = torch.zeros_like(EVERY)
CASES = {
    "all of both": {"states": EVERY, "outputs": EVERY},
    "first_k of states": {"states": select_positions(EVERY, "first_k", 2), "outputs": NONE},
    "last_k of states, all outputs": {"states": select_positions(EVERY, "last_k", 2), "outputs": EVERY},
    "last of states": {"states": select_positions(EVERY, "last", 1), "outputs": NONE},
    "holes": masks(states={0: [0, 4], 2: [1, 3, 6]}, outputs={0: [2], 3: [0, 3]}),
    "rows without a pair": masks(states={2: [5]}, outputs={2: [4]}),
    "first row without a pair": masks(states={1: [1], 3: [2]}),
    "nothing": {"states": NONE, "outputs": NONE},
}


def tokens_under(rollout, pairs):
    """The token under every pair on both sides, and its place in its own text."""
    found = []
    for reading, column_N in ((rollout.student, pairs.student_N), (rollout.teacher, pairs.teacher_N)):
        for row, column in zip(pairs.row_N.tolist(), column_N.tolist(), strict=True):
            place = column if reading.positions_BS is None else int(reading.positions_BS[row, column])
            assert reading.mask_BS[row, column]
            found.append((int(reading.ids_BS[row, column]), place))
    return found


@pytest.mark.parametrize("at", ["predictive", "token"])
@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_pack_against_loops(case, suffix, crosses, at):
    rollout = rollout_of(**CASES[case], crosses=crosses, at=at)
    packed = pack(rollout, suffix=suffix)
    starts, ends, teacher_ends = [], [], []
    for row in range(4):
        sets = [(p.row_N == row, p) for p in (rollout.state_pairs, rollout.output_pairs)]
        own = [c for here, p in sets for c in p.student_N[here].tolist()]
        other = [c for here, p in sets for c in p.teacher_N[here].tolist()]
        if crosses:
            other += rollout.prefix.chain_column_E[rollout.prefix.chain_row_E == row].tolist()
        ends.append(max(own, default=-1) + 1)
        teacher_ends.append(max(other, default=-1) + 1)
        starts.append(min(own, default=0) if suffix else 0)
    if not any(ends):
        ends[0] = teacher_ends[0] = 1

    def expected(reading, starts, ends):
        kept = [(row, start, end) for row, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
        ids = [reading.ids_BS[row, start:end] for row, start, end in kept]
        places = [torch.arange(start, end) for _, start, end in kept]
        return torch.cat(ids), torch.cat(places), tuple(end - start for _, start, end in kept)

    for reading, whole, begin, end in (
        (packed.student, rollout.student, starts, ends),
        (packed.teacher, rollout.teacher, [0] * 4, teacher_ends),
    ):
        ids, places, lengths = expected(whole, begin, end)
        assert reading.ids_BS.tolist() == [ids.tolist()]
        assert reading.positions_BS.tolist() == [places.tolist()]
        assert reading.lengths == lengths
        assert reading.mask_BS.all()
        assert reading.mask_BS.shape == reading.ids_BS.shape
    before = packed.student_prefix
    if not any(starts):
        assert before is None
    else:
        read = [(row, starts[row]) for row in range(4) if ends[row] > starts[row]]
        assert before.lengths == tuple(start for _, start in read)  # one for every document, also if it is empty
        assert before.ids_BS[0].tolist() == [i for row, s in read for i in rollout.student.ids_BS[row, :s].tolist()]
        assert before.positions_BS[0].tolist() == [i for _, s in read for i in range(s)]
    for name in ("state_pairs", "output_pairs"):
        assert tokens_under(packed, getattr(packed, name)) == tokens_under(rollout, getattr(rollout, name))
        assert getattr(packed, name).row_N.eq(0).all()
    for name in ("state_weights_N", "output_weights_N", "output_tokens_N"):
        assert getattr(packed, name).equal(getattr(rollout, name))
    if crosses:
        moved, was = packed.prefix, rollout.prefix
        for e, (row, column) in enumerate(zip(was.chain_row_E.tolist(), was.chain_column_E.tolist(), strict=True)):
            at_e = moved.chain_row_E[e], moved.chain_column_E[e]
            assert packed.teacher.ids_BS[at_e] == rollout.teacher.ids_BS[row, column]
            assert packed.teacher.positions_BS[at_e] == column
        for name in ("residue_N", "chain_pair_E", "chain_low_E", "chain_high_E"):
            assert getattr(moved, name).equal(getattr(was, name))


def test_suffix_with_a_pair_at_the_first_column():
    """A prompt of one token: its state is supervised, nothing lies before it, and the next row still has a prefix."""
    batch = tiny_batch(lengths=((1, 3), (4, 3)))
    every = batch["completion_mask"].bool()
    packed = pack(rollout_of(every, torch.zeros_like(every), batch=batch), suffix=True)
    assert packed.student_prefix.lengths == (0, 3)
    assert packed.student.lengths == (3, 3)
    assert packed.student.positions_BS.tolist() == [[0, 1, 2, 3, 4, 5]]
    alone = tiny_batch(lengths=((1, 3), (1, 2)))
    every = alone["completion_mask"].bool()
    assert pack(rollout_of(every, torch.zeros_like(every), batch=alone), suffix=True).student_prefix is None


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_only_what_is_used_is_read(case, crosses, outputs, states):
    rollout = rollout_of(**CASES[case], crosses=crosses)
    less = only(rollout, states=states, outputs=outputs)
    own, other = [], []
    for is_on, kind in ((states, "state"), (outputs, "output")):
        left, was = (getattr(r, f"{kind}_pairs") for r in (less, rollout))
        assert len(left) == (len(was) if is_on else 0) == len(getattr(less, f"{kind}_weights_N"))
        if is_on:
            assert tokens_under(less, left) == tokens_under(rollout, was)
            assert getattr(less, f"{kind}_weights_N").equal(getattr(rollout, f"{kind}_weights_N"))
        own += left.student_N.tolist()
        other += left.teacher_N.tolist()
    assert len(less.output_tokens_N) == len(less.output_pairs)
    assert (less.prefix is None) is not (crosses and outputs)
    if less.prefix is not None:
        other += less.prefix.chain_column_E.tolist()
    for reading, whole, columns in ((less.student, rollout.student, own), (less.teacher, rollout.teacher, other)):
        width = max(columns, default=0) + 1
        assert reading.ids_BS.equal(whole.ids_BS[:, :width])
        assert reading.mask_BS.equal(whole.mask_BS[:, :width])


def test_a_chain_behind_the_last_pair_is_read():
    rollout = rollout_of(**masks(outputs={1: [0]}), crosses=True)
    assert rollout.prefix.chain_column_E.max() > rollout.output_pairs.teacher_N.max()
    width = int(rollout.prefix.chain_column_E.max()) + 1
    assert only(rollout, states=False, outputs=True).teacher.ids_BS.shape[1] == width
    assert pack(rollout).teacher.lengths == (width,)


def test_a_chain_that_goes_with_another_row_moves_with_it():
    """Chains of a later row start behind the documents before it."""
    rollout = rollout_of(**masks(outputs={0: [1], 1: [0]}), crosses=True)
    packed = pack(rollout)
    assert isinstance(packed.prefix, PrefixRows)
    assert packed.prefix.chain_column_E.equal(rollout.prefix.chain_column_E + packed.teacher.lengths[0])
    assert dataclasses.replace(packed.prefix, chain_column_E=rollout.prefix.chain_column_E).chain_row_E.eq(0).all()
