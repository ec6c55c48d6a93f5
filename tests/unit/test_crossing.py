import codecs
from functools import cache
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from oprd.states import Crossing, PrefixIndex
from oprd.states.crossing import NOWHERE, Crossed, readable
from unit.test_vocabulary import KINDS, LINES, TEXTS, byte_by_byte, decoded, encoded, is_text, sequences, tokenizer_of

PAIRS = list(product(KINDS, KINDS))
KEPT_WHOLE = [kind for kind in KINDS if kind in ("byte-level", "fuse")]  # nothing is dropped at the start of a text


@cache
def crossing(student, teacher):
    student, teacher = tokenizer_of(student), tokenizer_of(teacher)
    return Crossing(student, teacher, student_ends={student.eos_token_id}, teacher_end=teacher.eos_token_id)


def naive_readable(raw):
    """Character by character."""
    text, places, start = "", [0], 0
    while start < len(raw):
        length = next((n for n in (1, 2, 3, 4) if is_text(raw[start : start + n])), None)
        if length is None:
            try:
                codecs.getincrementaldecoder("utf-8")().decode(raw[start:])
                break  # the beginning of a character
            except UnicodeDecodeError:
                text, start = text + "\ufffd", start + 1
                places.append(len(text.encode()))
        else:
            text += raw[start : start + length].decode()
            places += [places[-1] + n + 1 for n in range(length)]
            start += length
    return text, places + [NOWHERE] * (len(raw) - start)


BYTES = st.one_of(
    st.binary(max_size=8),
    st.lists(
        st.sampled_from([b"a", b"\xe6", b"\xbc", b"\xf0", b"\x9f", "é".encode(), "漢".encode(), "😀".encode()]),
        max_size=6,
    ).map(b"".join),
    st.tuples(TEXTS, st.integers(0, 3)).map(lambda cut: cut[0].encode()[: len(cut[0].encode()) - cut[1]]),
)


@settings(max_examples=150, deadline=None)
@given(raw=BYTES)
def test_readable_equals_the_loop(raw):
    assert readable(raw) == naive_readable(raw)


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_text_is_readable_as_it_is(text):
    assert readable(text.encode()) == (text, list(range(len(text.encode()) + 1)))


def without_special(tokenizer, ids):
    return [index for index in ids if index not in tokenizer.all_special_ids]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_partners_have_read_the_same_bytes(student, teacher, data):
    """Where both keep the text whole, and wherever a byte boundary is common, there is a partner."""
    ids = without_special(tokenizer_of(student), data.draw(sequences(student)))
    pair = crossing(student, teacher)
    raw, ends = pair.student.spell(ids)
    assume(is_text(raw) and decoded(tokenizer_of(teacher), pair.teacher.read(raw.decode())[0]).encode() == raw)
    crossed = pair.read(ids)
    spelled = [pair.teacher.spell(crossed.teacher_ids[:j])[0] for j in range(len(crossed.teacher_ids) + 1)]
    assert spelled[-1] == raw
    assert crossed.partner[0] == 0
    for end, j in zip(ends, crossed.partner[1:], strict=True):
        assert (j != NOWHERE) == (raw[:end] in spelled) or end == 0
        assert j == NOWHERE or spelled[j] == raw[:end]


def stands_of(teacher, text):
    """Byte offset after each teacher token, and 0 before the first; where a token has no end of its own, None."""
    ids, ends = teacher.read(text)
    return ids, [0, *(None if end == NOWHERE else end for end in ends)]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_anchors_residues_and_paths_equal_the_loop(student, teacher, data):
    """Any tokens whatever, also such that are not text."""
    ids = without_special(tokenizer_of(student), data.draw(sequences(student)))
    pair = crossing(student, teacher)
    raw, ends = pair.student.spell(ids)
    text, places = naive_readable(raw)
    content, complete = text.encode(), places.index(NOWHERE) - 1 if NOWHERE in places else len(raw)
    teacher_ids, stands = stands_of(pair.teacher, text)
    crossed = pair.read(ids)
    assert crossed.teacher_ids == teacher_ids
    assert [len(x) for x in (crossed.partner, crossed.anchor, crossed.residue)] == [len(ids) + 1] * 3
    assert len(crossed.path) == len(ids)

    def anchor(end):
        return max(j for j, stand in enumerate(stands) if stand is not None and stand <= end)

    opening = anchor(0)  # tokens before which the teacher has read nothing: a space that decoding drops
    now = 0
    for place, raw_end in enumerate(ends):
        end = places[raw_end]
        if end == NOWHERE:
            assert crossed.anchor[place + 1] == anchor(len(content))
            assert crossed.residue[place + 1] == content[stands[anchor(len(content))] :] + raw[complete:raw_end]
            assert crossed.partner[place + 1] == NOWHERE
            assert crossed.path[place] == []
            continue
        if anchor(end) > opening or teacher in KEPT_WHOLE:
            assert crossed.anchor[place + 1] == anchor(end)
            assert crossed.residue[place + 1] == content[stands[anchor(end)] : end]
        if end > 0:
            assert crossed.partner[place + 1] == (anchor(end) if stands[anchor(end)] == end else NOWHERE)
        if end == now and end > 0:
            assert crossed.path[place] == []
        elif end > now and (anchor(now) > opening or teacher in KEPT_WHOLE):
            last = max(j for j, stand in enumerate(stands) if stand is not None and stand < end)
            whole = [(j, teacher_ids[j]) for j in range(anchor(now), last)]
            assert crossed.path[place] == [*whole, (last, content[stands[last] : end])]
        now = end


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_a_path_says_the_students_token_after_the_residue(student, teacher, data):
    ids = without_special(tokenizer_of(student), data.draw(sequences(student)))
    pair = crossing(student, teacher)
    raw, ends = pair.student.spell(ids)
    assume(is_text(raw) and decoded(tokenizer_of(teacher), pair.teacher.read(raw.decode())[0]).encode() == raw)
    crossed, now = pair.read(ids), 0
    for place, end in enumerate(ends):
        steps = crossed.path[place]
        whole = [said for _, said in steps if isinstance(said, int)]
        rest = b"".join(said for _, said in steps if isinstance(said, bytes))
        at_start = bool(steps) and steps[0][0] == 0
        said = pair.teacher.spell(whole, at_start=at_start)[0] + rest
        residue = crossed.residue[place]
        if at_start and teacher not in KEPT_WHOLE:
            assert said.lstrip(b" ") == (residue + raw[now:end]).lstrip(b" ")
        elif end == now:
            assert steps == []
        else:
            assert said == residue + raw[now:end]
        now = end


@cache
def index_of(student, teacher):
    return PrefixIndex(crossing(student, teacher))


def check_what_is_summed(student, teacher, data, *, opening):
    """The range of every step, and the table's of a token with one step, has the teacher's own next token in it.

    ``opening``: while the teacher has not come to the end of its first token with text, or after that.
    """
    tokenizer = tokenizer_of(student)
    ids = encoded(tokenizer, data.draw(st.sampled_from(LINES) | TEXTS))
    assume(without_special(tokenizer, ids) == ids)
    pair = crossing(student, teacher)
    raw = pair.student.spell(ids)[0]
    assume(decoded(tokenizer_of(teacher), pair.teacher.read(raw.decode())[0]).encode() == raw)
    crossed, index = pair.read(ids), index_of(student, teacher)
    rank = {int(token): place for place, token in enumerate(index.order)}
    for place, steps in enumerate(crossed.path):
        anchor = crossed.anchor[place]
        has_read = pair.teacher.spell(crossed.teacher_ids[: max(anchor, 0)])[0] != b""
        if not steps or anchor == NOWHERE or has_read == opening:
            continue
        assert [position for position, _ in steps] == list(range(anchor, anchor + len(steps)))
        for position, said in steps:
            low, high = index.span(said) if isinstance(said, bytes) else index.of_token(said)
            assert low <= rank[crossed.teacher_ids[position]] < high
        if len(steps) == 1:
            tokens, low, high = index.entries(index.residue(crossed.residue[place], b"" if place else crossed.dropped))
            (entry,) = (tokens == ids[place]).nonzero()[0]
            assert low[entry] <= rank[crossed.teacher_ids[anchor]] < high[entry]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_what_is_summed_holds_what_the_teacher_reads(student, teacher, data):
    check_what_is_summed(student, teacher, data, opening=False)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_summed_at_the_start_holds_what_the_teacher_reads(student, teacher, data):
    """Where decoding drops a space, the first token's bytes are not those that it adds to the text."""
    check_what_is_summed(student, teacher, data, opening=True)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_an_empty_response(student, teacher):
    assert crossing(student, teacher).read([]) == Crossed([], [0], [0], [b""], [])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_same_tokenizer_pairs_every_place(kind, data):
    pair, tokenizer = crossing(kind, kind), tokenizer_of(kind)
    ids = encoded(tokenizer, data.draw(TEXTS))
    assume(without_special(tokenizer, ids) == ids and encoded(tokenizer, decoded(tokenizer, ids)) == ids)
    crossed = pair.read(ids)
    assert crossed.teacher_ids == ids
    offsets = [0, *pair.student.spell(ids)[1]]
    assert [offsets[j] for j in crossed.partner] == offsets


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_end_of_a_turn_is_the_teachers(student, teacher):
    pair, own = crossing(student, teacher), tokenizer_of(student)
    ids, end = encoded(own, "hello the"), pair.teacher_end
    whole = pair.teacher.read("hello the")[0]
    crossed = pair.read([*ids, own.eos_token_id])
    assert crossed.teacher_ids == [*whole, end]
    assert crossed.path[-1] == [(len(whole), end)]
    assert (crossed.partner[-2:], crossed.anchor[-2:]) == ([len(whole), len(whole) + 1],) * 2
    assert crossed.residue[-2:] == [b"", b""]


def with_added(kind, special, text):
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in text])
    return tokenizer


@pytest.fixture(scope="module")
def unlike():
    """A student that knows more: ``<call>`` (special) and ``<think>`` (text) are its own; ids differ everywhere."""
    student = with_added("byte-level", ["<call>", "<both>", "<stop>"], ["<think>", "<shared>"])
    teacher = with_added("fuse", ["<both>"], ["<shared>"])
    ends = {student.eos_token_id, student.convert_tokens_to_ids("<stop>")}
    return Crossing(student, teacher, student_ends=ends, teacher_end=teacher.eos_token_id)


def of(vocabulary, *pieces):
    """Ids of pieces of text and of tokens by their names."""
    ids = []
    for piece in pieces:
        named = vocabulary.tokenizer.get_added_vocab().get(piece)
        ids += encoded(vocabulary.tokenizer, piece) if named is None else [named]
    return ids


@pytest.mark.parametrize("name", ["<both>", "<shared>"])
def test_tokens_of_the_same_name_are_the_same(unlike, name):
    before, after = of(unlike.teacher, "hello "), of(unlike.teacher, "the other")
    ids = of(unlike.student, "hello ", name, "the other")
    crossed = unlike.read(ids)
    assert crossed.teacher_ids == of(unlike.teacher, "hello ", name, "the other")
    place = ids.index(unlike.student.tokenizer.convert_tokens_to_ids(name))
    atom = unlike.teacher.tokenizer.convert_tokens_to_ids(name)
    assert crossed.path[place] == [(len(before), atom)]
    assert crossed.partner[place : place + 2] == [len(before), len(before) + 1]
    assert crossed.partner[-1] == len(before) + 1 + len(after)


def test_every_end_token_of_the_student_is_the_teachers_one(unlike):
    end = unlike.teacher_end
    for name in ("<end>", "<stop>"):
        assert unlike.read(of(unlike.student, "hello", name)).teacher_ids == [*of(unlike.teacher, "hello"), end]


def test_a_special_token_of_the_student_alone_is_skipped(unlike):
    ids = of(unlike.student, "hello ", "<call>", "the other")
    place = ids.index(unlike.student.tokenizer.convert_tokens_to_ids("<call>"))
    crossed = unlike.read(ids)
    before = len(of(unlike.teacher, "hello "))
    assert crossed.teacher_ids == of(unlike.teacher, "hello ", "the other")
    assert crossed.path[place] == []
    assert crossed.partner[place : place + 2] == [before, NOWHERE]
    assert crossed.anchor[place + 1] == before
    assert crossed.residue[place + 1] == b""
    assert crossed.partner[-1] == len(crossed.teacher_ids)


def test_a_token_of_the_student_alone_that_is_not_special_is_text(unlike):
    ids = of(unlike.student, "hello ", "<think>", "the other")
    crossed = unlike.read(ids)
    assert crossed.teacher_ids == unlike.teacher.read("hello <think>the other")[0]
    place = ids.index(unlike.student.tokenizer.convert_tokens_to_ids("<think>"))
    assert len(crossed.path[place]) > 1
    assert crossed.partner[-1] == len(crossed.teacher_ids)


def test_ids_beyond_the_tokenizer_are_skipped(unlike):
    hello, the = of(unlike.student, "hello"), of(unlike.student, "the")
    beyond = unlike.student.size + 3
    crossed = unlike.read([beyond, *hello, beyond, *the])
    assert crossed.teacher_ids == of(unlike.teacher, "hello", "the")
    assert crossed.path[0] == crossed.path[len(hello) + 1] == []
    assert crossed.partner[1] == crossed.partner[len(hello) + 2] == NOWHERE
    assert crossed.anchor[1] == 0
    assert crossed.partner[-1] == len(crossed.teacher_ids)


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in PAIRS if pair[0] in ("byte-level", "llama")])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_cut_off_in_the_middle_of_a_character(student, teacher, kept):
    pair = crossing(student, teacher)
    ids = byte_by_byte(student, "he😀")[: 2 + kept]
    crossed = pair.read(ids)
    assert crossed.teacher_ids == pair.teacher.read("he")[0]
    assert crossed.partner[3:] == [NOWHERE] * kept
    assert crossed.residue[3:] == ["😀".encode()[: n + 1] for n in range(kept)]
    assert crossed.anchor[2:] == [len(crossed.teacher_ids)] * (kept + 1)
    assert crossed.path[2:] == [[]] * kept


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in PAIRS if pair[0] in ("byte-level", "llama")])
def test_a_lone_byte_becomes_the_replacement_character(student, teacher):
    pair = crossing(student, teacher)
    lone = byte_by_byte(student, "😀")[2]
    ids = [*byte_by_byte(student, "he"), lone, *byte_by_byte(student, "he")]
    crossed = pair.read(ids)
    assert crossed.teacher_ids == pair.teacher.read("he\ufffdhe")[0]
    assert crossed.partner[-1] == len(crossed.teacher_ids)
    said = [what if isinstance(what, bytes) else pair.teacher.tokens[what] for _, what in crossed.path[2]]
    assert b"".join(said) == "\ufffd".encode() or "\ufffd" not in decoded(tokenizer_of(teacher), crossed.teacher_ids)


def test_a_token_in_the_middle_of_a_character_cannot_be_said(unlike):
    lone = byte_by_byte("byte-level", "😀")[:2]
    ids = [*of(unlike.student, "hello"), *lone, unlike.student.tokenizer.eos_token_id]
    crossed = unlike.read(ids)
    assert crossed.teacher_ids == [*of(unlike.teacher, "hello"), unlike.teacher_end]
    assert crossed.path[-1] == []
    assert crossed.residue[-1] == b""
    assert crossed.anchor[-1] == len(crossed.teacher_ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_places_rise_whatever_was_sampled(unlike, data):
    ids = data.draw(st.lists(st.integers(0, unlike.student.size + 2), max_size=12))
    special = sorted(unlike.student.added)
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, data.draw(st.sampled_from(special)))
    crossed = unlike.read(ids)
    assert [len(x) for x in (crossed.partner, crossed.anchor, crossed.residue)] == [len(ids) + 1] * 3
    assert len(crossed.path) == len(ids)
    assert crossed.anchor == sorted(crossed.anchor)
    assert all(0 <= anchor <= len(crossed.teacher_ids) for anchor in crossed.anchor)
    for partner, anchor, residue in zip(crossed.partner, crossed.anchor, crossed.residue, strict=True):
        assert partner in (NOWHERE, anchor)
        assert not (residue and partner != NOWHERE)
    for place, steps in enumerate(crossed.path):
        positions = [position for position, _ in steps]
        assert positions == list(range(crossed.anchor[place], crossed.anchor[place] + len(steps)))
        assert all(crossed.teacher_ids[position] == said for position, said in steps if isinstance(said, int))
