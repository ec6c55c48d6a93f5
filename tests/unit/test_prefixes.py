from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.objectives.range_mass import sorted_mass
from oprd.states import Crossing, PrefixIndex
from oprd.states.vocabulary import _ALPHABET

STAND_IN = {byte: character for character, byte in _ALPHABET.items()}


def words(tokens, special=("<end>",), text=()):
    """A tokenizer of these tokens, given as strings or bytes; it reads a text by the longest token that fits.

    ``special`` and ``text``: added tokens, special ones and others.
    """
    names = [token if isinstance(token, str) else "".join(STAND_IN[byte] for byte in token) for token in tokens]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=names[0]))
    longest_first = sorted((name for name in names if not name.startswith("<0x")), key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), "isolated")
    if all(isinstance(token, bytes) for token in tokens):
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token) for token in text])
    return tokenizer


def strings(length, alphabet="ab"):
    """All strings up to a length, in no order of their bytes."""
    found = ["".join(letters) for n in range(1, length + 1) for letters in product(alphabet, repeat=n)]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def crossing_of(student, teacher, ends=("<end>",)):
    ids = {student.convert_tokens_to_ids(end) for end in ends}
    return Crossing(student, teacher, student_ends=ids, teacher_end=teacher.convert_tokens_to_ids("<end>"))


@cache
def index_of(student_length, teacher_length):
    """All strings of one length against all of another; each side has a special token that the other does not."""
    student = words(strings(student_length), special=("<own>", "<end>"))
    return PrefixIndex(crossing_of(student, words(strings(teacher_length), special=("<end>", "<other>"))))


@cache
def vocabularies(student_length, teacher_length):
    """The bytes of either side's tokens; special ones have none."""
    return [[token.encode() for token in strings(length)] + [b"", b""] for length in (student_length, teacher_length)]


LENGTHS = [(1, 1), (1, 3), (3, 1), (2, 3), (3, 2), (3, 3)]


def extending(tokens, text):
    return {index for index, token in enumerate(tokens) if token and token.startswith(text)}


def naive_entries(student, teacher, residue, atoms):
    """Student token -> the teacher's tokens that say it after the residue; of equal bytes the first alone."""
    found = {}
    for index, token in enumerate(student):
        if token and index not in atoms and token not in student[:index] and extending(teacher, residue + token):
            found[index] = extending(teacher, residue + token)
    return found if residue else found | {own: {atom} for own, atom in atoms.items()}


def entries_as_sets(index, residue):
    tokens, low, high = index.entries(index.residue(residue))
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    ranges = zip(tokens.tolist(), low, high, strict=True)
    return {token: set(index.order[first:last].tolist()) for token, first, last in ranges}


def texts(length, alphabet="ab"):
    return [b"", *(string.encode() for string in strings(length, alphabet))]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_spans_equal_startswith(lengths):
    index, (_, teacher) = index_of(*lengths), vocabularies(*lengths)
    for text in texts(4)[1:]:
        low, high = index.span(text)
        assert set(index.order[low:high].tolist()) == extending(teacher, text)
    assert index.span(b"") == (0, len(teacher))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_entries_equal_startswith_after_every_residue(lengths):
    index, (student, teacher) = index_of(*lengths), vocabularies(*lengths)
    atoms = {len(student) - 1: len(teacher) - 2}
    for residue in texts(3):
        assert entries_as_sets(index, residue) == naive_entries(student, teacher, residue, atoms)


RAW_TOKENS = st.lists(
    st.lists(st.sampled_from([0x20, 0x61, 0xFE, 0xFF]), min_size=1, max_size=3).map(bytes),
    min_size=1,
    max_size=12,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(student=RAW_TOKENS, teacher=RAW_TOKENS, residues=st.lists(st.binary(max_size=2), max_size=2))
def test_any_bytes(student, teacher, residues):
    """Also 0xFF, above which there is no byte."""
    index = PrefixIndex(crossing_of(words(student), words(teacher)))
    atoms = {len(student): len(teacher)}
    residues = {b"", b"\xff", b"\xfe\xff", *residues, *(token[:-1] for token in teacher)}
    for residue in residues:
        if residue:
            low, high = index.span(residue)
            assert set(index.order[low:high].tolist()) == extending(teacher, residue)
        assert entries_as_sets(index, residue) == naive_entries(student, teacher, residue, atoms)
    for own, text in enumerate(student):
        for other, longer in enumerate(student):
            extends = index.rank[own] < index.rank[other] <= index.last[own]
            assert extends == (own != other and longer.startswith(text))


def test_special_tokens_extend_nothing():
    index, (student, _) = index_of(3, 2), vocabularies(3, 2)
    for special in (len(student) - 2, len(student) - 1):
        assert index.rank[special] == index.last[special]
        assert not any(index.rank[own] < index.rank[special] <= index.last[own] for own in range(len(student)))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_special_tokens_of_the_teacher_have_a_place_of_their_own(lengths):
    index, (_, teacher) = index_of(*lengths), vocabularies(*lengths)
    assert sorted(index.order.tolist()) == list(range(len(teacher)))
    behind = index.order[-2:].tolist()
    assert sorted(behind) == [len(teacher) - 2, len(teacher) - 1]
    assert max(index.span(text)[1] for text in texts(3)[1:]) <= len(teacher) - 2
    for token in range(len(teacher)):
        low, high = index.of_token(token)
        assert index.order[low:high].tolist() == [token]


def test_the_ways_to_end_a_turn_add_up():
    """The teacher's are one range. Of several ends of the student its tokenizer's own is listed."""
    student = words(["a", "b"], special=("<stop>", "<own>", "<end>"))
    teacher = words(["a", "b", "ba"], special=("<other>", "<end>", "<more>", "<stop>"), text=("</a>",))
    ends = {student.convert_tokens_to_ids("<stop>"), student.convert_tokens_to_ids("<end>")}
    first, *others = teacher.convert_tokens_to_ids(["<end>", "<stop>", "</a>"])
    for own, listed in ((None, "<stop>"), ("<end>", "<end>")):  # without an own one, that with the lowest id
        student.eos_token = own
        crossing = Crossing(student, teacher, student_ends=ends, teacher_end=first, teacher_ends={first, *others})
        index = PrefixIndex(crossing)
        expected = {0: {0}, 1: {1, 2}, student.convert_tokens_to_ids(listed): {first, *others}}
        assert entries_as_sets(index, b"") == expected
        assert entries_as_sets(index, b"b") == {0: {2}}
        assert sorted(index.order.tolist()) == list(range(8))


def test_ordinary_tokens_come_in_the_order_of_their_bytes():
    index, (_, teacher) = index_of(2, 3), vocabularies(2, 3)
    ordinary = [teacher[token] for token in index.order[:-2]]
    assert ordinary == sorted(token for token in teacher if token)


def test_an_added_token_that_is_text_on_both_sides():
    """It is that token and no other, and the teacher's is among those that start with its first letters."""
    student, teacher = (words(["a", "b", "<"], text=("<t>",)) for _ in range(2))
    index = PrefixIndex(crossing_of(student, teacher))
    entries = entries_as_sets(index, b"")
    assert entries == {0: {0}, 1: {1}, 2: {2}, 3: {3}, 4: {4}}


def test_a_token_that_only_the_student_knows_as_one_is_text():
    student, teacher = words(["a", "<", "t", ">"], text=("<t>",)), words(["a", "<t", "<t>a", ">"])
    index = PrefixIndex(crossing_of(student, teacher))
    assert entries_as_sets(index, b"")[student.convert_tokens_to_ids("<t>")] == {2}
    assert entries_as_sets(index, b"<")[student.convert_tokens_to_ids("t")] == {1, 2}


def test_residues_are_numbered_once():
    index = PrefixIndex(crossing_of(words(strings(1)), words(strings(2))))
    assert index.residue(b"") == 0
    assert [index.residue(text) for text in (b"b", b"a", b"b", b"")] == [1, 2, 1, 0]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_table_finds_what_the_entries_say(lengths):
    index, (student, teacher) = index_of(*lengths), vocabularies(*lengths)
    residues = [b"b", b"", b"zz", b"ab", b"b"]
    table = index.table([index.residue(text) for text in residues])
    everything = torch.arange(len(student)).expand(len(residues), -1)
    low, high, found = table.lookup(torch.arange(len(residues)), everything)
    for row, residue in enumerate(residues):
        entries = entries_as_sets(index, residue)
        assert found[row].nonzero().flatten().tolist() == sorted(entries)
        for token, said in entries.items():
            assert set(table.order_V[low[row, token] : high[row, token]].tolist()) == said
        bounds = table.order_V[table.residue_low_U[row] : table.residue_high_U[row]]
        assert set(bounds.tolist()) == (extending(teacher, residue) if residue else set(range(len(teacher))))


def test_a_table_in_which_nothing_can_be_said():
    index = index_of(2, 1)
    table = index.table([index.residue(b"a"), index.residue(b"q")])
    _, _, found = table.lookup(torch.tensor([0, 1, 1]), torch.arange(len(index.rank)).expand(3, -1))
    assert not found.any()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_masses_equal_the_sum_over_tokens(lengths):
    index, (student, teacher) = index_of(*lengths), vocabularies(*lengths)
    atoms = {len(student) - 1: len(teacher) - 2}
    residues = texts(2)
    q = torch.randn(len(residues), len(teacher), dtype=torch.float64).mul(3).softmax(-1)
    table = index.table([index.residue(text) for text in residues])
    cumulative = sorted_mass(q.log(), table.order_V)
    tokens = torch.arange(len(student)).expand(len(residues), -1)
    low, high, found = table.lookup(torch.arange(len(residues)), tokens)
    mass = torch.where(found, cumulative.of(low, high), 0.0)
    for row, residue in enumerate(residues):
        said = naive_entries(student, teacher, residue, atoms)
        slow = [sum(q[row, v] for v in said.get(token, ())) for token in range(len(student))]
        torch.testing.assert_close(mass[row], torch.tensor(slow, dtype=torch.float64), atol=1e-7, rtol=1e-5)


def test_small_masses_are_not_lost_behind_large_ones():
    """Far behind in the order, after nearly all of the mass."""
    index, (_, teacher) = index_of(1, 3), vocabularies(1, 3)
    logits = torch.full((1, len(teacher)), -40.0)
    logits[0, teacher.index(b"a")] = 0.0
    logits[0, teacher.index(b"bb")] = -25.0
    table = index.table([index.residue(b"")])
    low, high = index.span(b"b")
    mass = sorted_mass(logits, table.order_V).of(torch.tensor([[low]]), torch.tensor([[high]]))
    torch.testing.assert_close(mass.log().item(), -25.0, atol=1e-3, rtol=0)
