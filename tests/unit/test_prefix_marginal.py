import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from oprd.objectives.prefix_marginal import (
    FLOOR,
    LEAST_RESIDUE_MASS,
    chain_log_mass,
    prefix_kl,
    prefix_sampled,
)
from oprd.states import PrefixIndex
from unit.test_prefixes import (
    LENGTHS,
    crossing_of,
    extending,
    index_of,
    naive_entries,
    strings,
    texts,
    vocabularies,
    words,
)

SEEDS = st.integers(0, 2**32 - 1)
NAN = float("nan")


class Positions(NamedTuple):
    """Random positions: residues that the teacher can be at, and chains for about half of the sampled tokens."""

    student_logits: torch.Tensor
    teacher_logits: torch.Tensor
    tokens: torch.Tensor
    residues: list[bytes]
    chain: torch.Tensor

    def arguments(self, index):
        number = [index.residue(residue) for residue in self.residues]
        row = torch.arange(len(number))
        return self.student_logits, self.teacher_logits, self.tokens, row, self.chain, index.table(number)


def some_chain(lengths, q, token, residue, share):
    """A probability along several teacher tokens that contradicts no other token's: no less than those of longer tokens,
    no more than that of a shorter one."""
    student, teacher = vocabularies(*lengths)
    said = naive_entries(student, teacher, residue, {})
    listed = [t for t in said if student[token].startswith(student[t])]
    base = max(listed, key=lambda t: len(student[t]), default=None)
    if base is None:
        return 0.0
    alone = set(said[base])
    for longer in said:
        if longer != base and student[longer].startswith(student[base]):
            alone -= said[longer]
    free = share * sum(q[v] for v in alone)
    return float(sum(q[v] for v in said[base]) - free if base == token else free)


def positions(lengths, seed, count=6, chains=True):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = vocabularies(*lengths)
    reachable = [text for text in texts(lengths[1]) if extending(teacher, text)]
    where = torch.randint(len(reachable), (count,), generator=generator)
    residues = [b"", *(reachable[place] for place in where)][:count]
    student_logits = torch.randn(count, len(student), generator=generator).mul(2).requires_grad_()
    teacher_logits = torch.randn(count, len(teacher), generator=generator).mul(2)
    tokens = torch.randint(len(student), (count,), generator=generator)
    shares = torch.rand(2, count, generator=generator).tolist()
    q, chain = teacher_logits.softmax(-1).tolist(), torch.full((count,), NAN, dtype=torch.float64)
    for n, token in enumerate(tokens.tolist()):
        if chains and shares[0][n] < 0.5 and student[token]:
            chain[n] = some_chain(lengths, q[n], token, residues[n], 0.1 + 0.8 * shares[1][n])
    return Positions(student_logits, teacher_logits, tokens, residues, chain.log())


class Slow(NamedTuple):
    cost: torch.Tensor
    supervised: bool
    student_rest: float
    teacher_rest: float


def slow_prefix_kl(student, teacher, atoms, logits, teacher_logits, token, residue, chain, k):
    """One position, set by set. ``student``, ``teacher``: the bytes of their tokens; ``atoms``: tokens that correspond."""
    p, q = logits.softmax(-1), teacher_logits.softmax(-1).double()
    support = set(range(len(student))) if k is None else {*p.topk(min(k, len(p))).indices.tolist(), token}
    residue_mass = sum(q[v] for v in extending(teacher, residue)) if residue else q.sum()
    if residue_mass <= LEAST_RESIDUE_MASS:
        return Slow(logits.sum() * 0, False, NAN, NAN)
    said = naive_entries(student, teacher, residue, atoms)
    mass = {s: sum(q[v] for v in said[s]) / residue_mass for s in support if s in said}
    if not math.isnan(chain):
        mass[token] = min(1.0, math.exp(chain) / residue_mass)
    mass.setdefault(token, 0.0)

    def parent(s):
        """The longest event of another token that is a prefix."""
        shorter = [t for t in mass if t != s and student[t] and student[s].startswith(student[t])]
        return max(shorter, key=lambda t: len(student[t]), default=None)

    if not math.isnan(chain):  # events that the chain runs through hold it
        for s in mass:
            if s != token and student[s] and student[token].startswith(student[s]):
                mass[s] = max(mass[s], mass[token])
    told, own = dict.fromkeys(mass, 0.0), dict(mass)
    for s in range(len(student)):  # the longest event that a token's text begins with is the one it belongs to
        events_of_s = [t for t in mass if t == s or (student[t] and student[s].startswith(student[t]))]
        if events_of_s:
            nearest = max(events_of_s, key=lambda t: (t == s, len(student[t])))
            told[nearest] = told[nearest] + p[s]
    for s in mass:
        if parent(s) is not None:
            own[parent(s)] = own[parent(s)] - mass[s]
    own = {s: max(float(value), 0.0) for s, value in own.items()}
    scale = max(sum(own.values()), 1.0)
    events = [(told[s], own[s] / scale) for s in mass]
    rest = (1 - sum(x for x, _ in events)).clamp(min=1e-12), max(1 - sum(y for _, y in events), 0.0)
    cost = sum(x * (x.log() - math.log(max(y, FLOOR))) for x, y in [*events, rest])
    return Slow(cost, True, float(rest[0].detach()), rest[1])


def same_as_slow(lengths, drawn, k):
    """Values and gradients, under a random weight per position."""
    student, teacher = vocabularies(*lengths)
    atoms = {len(student) - 1: len(teacher) - 2}
    terms = prefix_kl(*drawn.arguments(index_of(*lengths)), k)
    logits = drawn.student_logits.detach().double().requires_grad_()
    slow = [
        slow_prefix_kl(
            student, teacher, atoms, logits[n], drawn.teacher_logits[n], int(token), residue, float(chain), k
        )
        for n, (token, residue, chain) in enumerate(zip(drawn.tokens, drawn.residues, drawn.chain, strict=True))
    ]
    weights = torch.linspace(1, 2, len(slow))
    costs = torch.stack([position.cost for position in slow])
    # Float32 distributions against float64 ones: where a mass is what is left of two, its logarithm keeps three digits.
    torch.testing.assert_close(terms.cost, costs.float(), atol=5e-4, rtol=1e-4)
    (fast_gradient,) = torch.autograd.grad((weights * terms.cost).sum(), drawn.student_logits)
    (slow_gradient,) = torch.autograd.grad((weights * costs).sum(), logits)
    torch.testing.assert_close(fast_gradient, slow_gradient.float(), atol=5e-4, rtol=1e-3)
    assert terms.supervised.tolist() == [position.supervised for position in slow]
    for name in ("student_rest", "teacher_rest"):
        fast = getattr(terms, name)[terms.supervised]
        expected = [getattr(position, name) for position in slow if position.supervised]
        torch.testing.assert_close(fast, torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_the_whole_vocabulary_equals_the_loop(lengths, seed):
    same_as_slow(lengths, positions(lengths, seed), None)


@pytest.mark.parametrize("lengths", LENGTHS)
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 9))
def test_the_top_k_equals_the_loop(lengths, seed, k):
    same_as_slow(lengths, positions(lengths, seed), k)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_as_many_as_there_are_is_the_whole_vocabulary(seed):
    drawn = positions((3, 2), seed)
    arguments = drawn.arguments(index_of(3, 2))
    size = drawn.student_logits.shape[1]
    for k in (size, size + 7):
        for many, whole in zip(prefix_kl(*arguments, k), prefix_kl(*arguments, None), strict=True):
            assert torch.equal(many, whole)


def test_a_sampled_token_in_the_top_k_counts_once():
    """What is told apart is the top k, and the sampled token where it is not among them."""
    drawn = positions((1, 3), 1, chains=False)
    drawn = drawn._replace(residues=[b""] * len(drawn.tokens))
    with torch.no_grad():
        drawn.student_logits[:, 2] = -40  # <own> has no event
    order = drawn.student_logits.argsort(dim=-1, descending=True)
    p = drawn.student_logits.softmax(-1).gather(1, order)
    for place in range(3):
        terms = prefix_kl(*drawn._replace(tokens=order[:, place]).arguments(index_of(1, 3)), 2)
        told = p[:, :2].sum(1) + (p[:, place] if place >= 2 else 0)
        torch.testing.assert_close(terms.student_rest, 1 - told, atol=1e-6, rtol=1e-4)


def single_characters(seed, residue):
    """Student: a, b and the end. Teacher: all strings up to three."""
    drawn = positions((1, 3), seed, count=4, chains=False)
    return drawn._replace(residues=[residue] * 4)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_single_characters_have_the_plain_kl(seed):
    """No token is a prefix of another: the brute-force marginals are a distribution."""
    drawn = single_characters(seed, b"")
    hidden = drawn.student_logits.detach().clone()
    hidden[:, 2] = -40  # <own>, which the teacher does not know
    logits = hidden.requires_grad_()
    student, teacher = vocabularies(1, 3)
    q = drawn.teacher_logits.softmax(-1)
    marginals = [q[:, sorted(extending(teacher, text))].sum(1) for text in student[:2]]
    log_m = torch.stack([*marginals, q[:, len(teacher) - 2]], 1).log()
    log_p = logits.log_softmax(-1)[:, [0, 1, 3]]
    plain = (log_p.exp() * (log_p - log_m)).sum(1)
    cost = prefix_kl(*drawn._replace(student_logits=logits).arguments(index_of(1, 3)), None).cost
    torch.testing.assert_close(cost, plain, atol=2e-5, rtol=1e-5)
    fast, slow = (torch.autograd.grad(value.sum(), logits)[0] for value in (cost, plain))
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, residue=st.sampled_from([b"a", b"ba"]))
def test_single_characters_after_a_residue(seed, residue):
    """What the student cannot go on with (special tokens) and the teacher's token that ends there are the rest."""
    drawn = single_characters(seed, residue)
    student, teacher = vocabularies(1, 3)
    q = drawn.teacher_logits.softmax(-1)
    whole = q[:, sorted(extending(teacher, residue))].sum(1)
    marginals = [q[:, sorted(extending(teacher, residue + text))].sum(1) for text in student[:2]]
    m = torch.stack([*marginals, q[:, teacher.index(residue)]], 1) / whole.unsqueeze(1)
    p = drawn.student_logits.softmax(-1)
    p = torch.cat([p[:, :2], p[:, 2:].sum(1, keepdim=True)], 1)
    plain = (p * (p / m).log()).sum(1)
    tokens = torch.zeros_like(drawn.tokens)
    terms = prefix_kl(*drawn._replace(tokens=tokens).arguments(index_of(1, 3)), None)
    torch.testing.assert_close(terms.cost, plain, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(terms.teacher_rest, m[:, 2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(1, 3), (3, 2), (3, 3)])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 6))
def test_a_small_support_is_a_lower_bound(lengths, seed, k):
    """Fewer tokens told apart can only hide a difference."""
    drawn = positions(lengths, seed, chains=False)
    drawn = drawn._replace(residues=[b""] * len(drawn.residues))
    some, all_of_them = (prefix_kl(*drawn.arguments(index_of(*lengths)), size).cost for size in (k, None))
    assert (some <= all_of_them + 1e-4).all()


def test_a_small_support_finds_no_difference_where_there_is_none():
    """Both sides the same; ab and abc, which are outside the support, are on the same side of both."""
    index = pair(["a", "ab", "abc"], ["a", "ab", "abc"])
    same = [0.5, 0.25, 0.15, 0.1]
    for k in (None, 3, 2, 1):
        cost = prefix_kl(*one_position(index, same, same, 0), k).cost
        torch.testing.assert_close(cost, torch.zeros(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [None, 1, 3])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_the_cost_is_never_negative(k, seed):
    drawn = positions((3, 2), seed)
    assert (prefix_kl(*drawn.arguments(index_of(3, 2)), k).cost > -1e-5).all()


@pytest.mark.parametrize("k", [None, 2])
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_the_sampled_gradient_is_the_policy_gradient(k, seed):
    drawn = positions((3, 2), seed)
    student_logits, *others = drawn.arguments(index_of(3, 2))
    terms = prefix_sampled(student_logits, *others)
    log_p = student_logits.log_softmax(-1).gather(1, drawn.tokens.unsqueeze(1)).squeeze(1)
    reward = -terms.cost.detach()
    policy = -(reward * log_p)[terms.supervised].sum()
    fast, slow = (torch.autograd.grad(value, student_logits)[0] for value in (terms.cost.sum(), policy))
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    assert slow.abs().max() > 0


@pytest.mark.parametrize("lengths", LENGTHS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_sampled_cost_is_the_log_ratio(lengths, seed):
    drawn = positions(lengths, seed)
    student, teacher = vocabularies(*lengths)
    atoms = {len(student) - 1: len(teacher) - 2}
    terms = prefix_sampled(*drawn.arguments(index_of(*lengths)))
    q = drawn.teacher_logits.double().softmax(-1)
    for n, (token, residue) in enumerate(zip(drawn.tokens.tolist(), drawn.residues, strict=True)):
        whole = float(sum(q[n, v] for v in extending(teacher, residue))) if residue else 1.0
        said = float(sum(q[n, v] for v in naive_entries(student, teacher, residue, atoms).get(token, ())))
        said = said if drawn.chain[n].isnan() else math.exp(drawn.chain[n])
        m = min(max(said / whole, FLOOR), 1.0)
        log_p = drawn.student_logits.log_softmax(-1)[n, token].item()
        assert bool(terms.supervised[n]) == (whole > LEAST_RESIDUE_MASS)
        if terms.supervised[n]:
            assert terms.cost[n].item() == pytest.approx(log_p - math.log(m), abs=1e-4)
            assert terms.teacher_rest[n].item() == pytest.approx(1 - m, abs=1e-5)
            assert terms.student_rest[n].item() == pytest.approx(1 - math.exp(log_p), abs=1e-5)


@pytest.mark.parametrize("loss", ["whole", "top_k", "sampled"])
def test_an_impossible_residue_has_no_say(loss):
    """Cost 0 and no gradient there, and as ever elsewhere."""
    index, (_, teacher) = index_of(2, 3), vocabularies(2, 3)
    drawn = positions((2, 3), 5, count=4, chains=False)._replace(residues=[b"a", b"", b"a", b"bb"])
    for row in (0, 3):
        drawn.teacher_logits[row, sorted(extending(teacher, drawn.residues[row]))] = -30
    run = {
        "whole": lambda *x: prefix_kl(*x, None),
        "top_k": lambda *x: prefix_kl(*x, 3),
        "sampled": lambda *x: prefix_sampled(*x),
    }[loss]
    terms = run(*drawn.arguments(index))
    assert terms.supervised.tolist() == [False, True, True, False]
    assert terms.cost[[0, 3]].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(terms.cost.sum(), drawn.student_logits)
    assert torch.isfinite(gradient).all()
    assert gradient[[0, 3]].eq(0).all()
    assert (gradient[[1, 2]].abs().amax(1) > 1e-4).all()


def test_just_enough_mass_has_a_say():
    index, (_, teacher) = index_of(2, 3), vocabularies(2, 3)
    drawn = positions((2, 3), 5, count=2, chains=False)._replace(residues=[b"a", b"a"])
    within = sorted(extending(teacher, b"a"))
    for row, mass in enumerate((0.9 * LEAST_RESIDUE_MASS, 1.1 * LEAST_RESIDUE_MASS)):
        q = drawn.teacher_logits[row].softmax(-1)
        q[within] *= mass / (1 - mass) * (1 - q[within].sum()) / q[within].sum()
        drawn.teacher_logits[row] = q.log()
    assert prefix_kl(*drawn.arguments(index), None).supervised.tolist() == [False, True]
    assert prefix_sampled(*drawn.arguments(index)).supervised.tolist() == [False, True]


def test_the_end_of_a_turn_is_told_apart():
    """It has the teacher's mass on its own end, wherever no text is pending; another special token adds to the rest."""
    index, (student, teacher) = index_of(2, 2), vocabularies(2, 2)
    end, own = len(student) - 1, len(student) - 2
    logits = torch.full((1, len(teacher)), -10.0)
    logits[0, len(teacher) - 2] = 5.0
    drawn = Positions(torch.zeros(1, len(student)), logits, torch.tensor([end]), [b""], torch.tensor([NAN]))
    cost = prefix_sampled(*drawn.arguments(index)).cost
    torch.testing.assert_close(cost, torch.tensor([math.log(1 / len(student))]), atol=1e-4, rtol=0)
    cost = prefix_sampled(*drawn._replace(tokens=torch.tensor([own])).arguments(index)).cost
    torch.testing.assert_close(cost, torch.tensor([math.log(1 / len(student) / FLOOR)]), atol=1e-4, rtol=0)


def pair(student_words, teacher_words, **added):
    student, teacher = (words(tokens, **added.get(side, {})) for side, tokens in
                        (("student", student_words), ("teacher", teacher_words)))  # fmt: skip
    return PrefixIndex(crossing_of(student, teacher, added.get("ends", ("<end>",))))


def one_position(index, p, q, token):
    logits = torch.tensor([p]).clamp(min=1e-12).log(), torch.tensor([q]).clamp(min=1e-12).log()
    none, row = torch.tensor([NAN], dtype=torch.float64), torch.tensor([0])
    return *logits, torch.tensor([token]), row, none, index.table([0])


def test_tokens_with_equal_bytes_are_one_event():
    """<0x61> and a: the teacher cannot tell them apart, so only their sum matters."""
    twice = pair(["<0x61>", "a", "b", "ab"], strings(2))
    once = pair(["a", "b", "ab"], strings(2))
    q = [0.1, 0.2, 0.15, 0.25, 0.05, 0.15, 0.1]
    cost = prefix_kl(*one_position(twice, [0.25, 0.05, 0.2, 0.4, 0.1], q, 2), None).cost
    torch.testing.assert_close(cost, prefix_kl(*one_position(once, [0.3, 0.2, 0.4, 0.1], q, 1), None).cost)


@pytest.mark.parametrize("loss", ["kl", "sampled"])
def test_a_sampled_byte_token_has_the_mass_of_its_character(loss):
    index = pair(["<0x61>", "a", "b"], ["a", "b"])
    p, q = [0.3, 0.3, 0.2, 0.2], [0.6, 0.2, 0.2]
    if loss == "sampled":
        byte, character = (prefix_sampled(*one_position(index, p, q, token)).cost for token in (0, 1))
    else:
        byte, character = (prefix_kl(*one_position(index, p, q, token), None).cost for token in (0, 1))
    torch.testing.assert_close(byte, character)


def test_two_ends_of_the_student_share_the_teachers_mass():
    """The teacher has said no more than once that the turn ends."""
    index = pair(["a"], ["a"], student={"special": ("<end>", "<stop>")}, ends=("<end>", "<stop>"))
    cost = prefix_kl(*one_position(index, [0.0, 0.5, 0.5], [0.0, 1.0], 1), None).cost
    assert cost.item() > -1e-5


ONE_SIDED = {"text": {"text": ("<t>",)}, "special": {"special": ("<end>", "<t>")}}


@pytest.mark.parametrize(
    ("own", "other"), [("text", "text"), ("special", "special"), ("text", "special"), ("special", "text")]
)
def test_a_token_known_to_both_is_told_apart_from_its_letters(own, other):
    """Whether or not it is special to either: where both say the same, the cost is 0."""
    index = pair(["<", "a"], ["<", "a"], student=ONE_SIDED[own], teacher=ONE_SIDED[other])
    same = [0.4, 0.1, 0.1, 0.4]
    cost = prefix_kl(*one_position(index, same, same, 1), None).cost
    torch.testing.assert_close(cost, torch.zeros(1), atol=1e-5, rtol=0)


def test_a_chain_is_not_counted_twice():
    """aba as the teacher says it, a and then ba, is among what starts with a, though not with the token ab."""
    merges = Tokenizer(models.BPE({"a": 0, "b": 1, "ba": 2, "ab": 3}, [("b", "a"), ("a", "b")]))
    merges.decoder = decoders.Fuse()
    teacher = PreTrainedTokenizerFast(tokenizer_object=merges, eos_token="<end>")
    crossing = crossing_of(words(["a", "ab", "aba"]), teacher)
    index, crossed = PrefixIndex(crossing), crossing.read([2])
    assert crossed.path == [[(0, 0), (1, b"ba")]]
    q = [0.9, 0.02, 0.02, 0.04, 0.02]
    student, teacher, token, row, _, table = one_position(index, [0.499, 0.001, 0.499, 0.001], q, 2)
    chain = torch.tensor([0.9 * 0.98], dtype=torch.float64).log()
    assert prefix_kl(student, teacher, token, row, chain, table, None).cost.item() > -1e-5


# A whole response


class Response(NamedTuple):
    """What the objective is given for one response of the student, and the response in the teacher's tokens."""

    arguments: tuple
    crossed: object
    logits: torch.Tensor  # of the teacher after each of its own tokens


def response(index, crossing, ids, seed, forbid_longer=False):
    """Teacher logits at random, and the chains summed by hand over the steps of every path."""
    generator = torch.Generator().manual_seed(seed)
    crossed = crossing.read(ids)
    logits = torch.randn(len(crossed.teacher_ids) + 1, crossing.teacher.size, generator=generator).mul(0.7)
    if forbid_longer:
        for place, index_there in enumerate(crossed.teacher_ids):
            text = crossing.teacher.tokens[index_there]
            if text:
                logits[place, sorted(extending(crossing.teacher.tokens, text) - {index_there})] = -torch.inf
    chain = torch.full((len(ids),), NAN, dtype=torch.float64)
    for place, steps in enumerate(crossed.path):
        if len(steps) > 1:
            spans = [index.span(said) if isinstance(said, bytes) else index.of_token(said) for _, said in steps]
            low, high = torch.tensor(spans).T
            at = logits[[position for position, _ in steps]]
            chain[place] = chain_log_mass(at, low, high, torch.from_numpy(index.order)).sum()
    student = torch.randn(len(ids), crossing.student.size, generator=generator)
    number = [index.residue(residue) for residue in crossed.residue[:-1]]
    arguments = (student, logits[crossed.anchor[:-1]], torch.tensor(ids), torch.arange(len(ids)), chain)
    return Response((*arguments, index.table(number)), crossed, logits)


@cache
def readers(student_words, teacher_words):
    crossing = crossing_of(words(list(student_words)), words(list(teacher_words)))
    return PrefixIndex(crossing), crossing


TEACHERS = [tuple(strings(1)), tuple(strings(2)), tuple(strings(3)), ("ab", "a", "b", "bab", "abb"), ("b", "a", "aabb")]


def log_masses(told):
    """log m(y) of every sampled token, out of the costs."""
    student_logits, _, tokens, *_ = told.arguments
    log_p = student_logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    terms = prefix_sampled(*told.arguments)
    assert terms.supervised.all()
    return log_p - terms.cost


@pytest.mark.parametrize("teacher", TEACHERS)
@settings(max_examples=10, deadline=None)
@given(ids=st.lists(st.integers(0, 13), min_size=1, max_size=6), ends=st.booleans(), seed=SEEDS)
def test_masses_multiply_to_the_teachers_probability_of_the_text(teacher, ids, ends, seed):
    """Exactly, where the teacher could not have said longer tokens than it did."""
    index, crossing = readers(tuple(strings(3)), teacher)
    ids = [*ids, 14] if ends else ids
    told = response(index, crossing, ids, seed, forbid_longer=True)
    log_q = told.logits[:-1].log_softmax(-1)
    exact = sum(log_q[place, token] for place, token in enumerate(told.crossed.teacher_ids))
    torch.testing.assert_close(log_masses(told).sum(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("teacher", TEACHERS)
@settings(max_examples=10, deadline=None)
@given(ids=st.lists(st.integers(0, 13), min_size=1, max_size=6), seed=SEEDS)
def test_masses_multiply_to_whatever_starts_with_the_text(teacher, ids, seed):
    """At a place that both have come to, the teacher's token and all longer ones count; inside a student's token, it alone."""
    index, crossing = readers(tuple(strings(3)), teacher)
    told = response(index, crossing, ids, seed)
    q = told.logits.double().softmax(-1)
    total = 0.0
    for place, token in enumerate(told.crossed.teacher_ids):
        longer = extending(crossing.teacher.tokens, crossing.teacher.tokens[token])
        said = longer if place + 1 in told.crossed.partner else {token}
        total += math.log(sum(q[place, v] for v in said))
    assert log_masses(told).double().sum().item() == pytest.approx(total, abs=1e-4)


@settings(max_examples=12, deadline=None)
@given(ids=st.lists(st.integers(0, 13), min_size=1, max_size=6), seed=SEEDS)
def test_costs_add_up_to_the_log_ratio_of_every_chunk(ids, seed):
    """Between two common boundaries."""
    index, crossing = readers(tuple(strings(3)), tuple(strings(2)))
    told = response(index, crossing, ids, seed, forbid_longer=True)
    log_q, log_m = told.logits[:-1].log_softmax(-1), log_masses(told)
    meets = [place for place, partner in enumerate(told.crossed.partner) if partner != -1]
    for start, stop in pairwise(meets):
        first, last = told.crossed.partner[start], told.crossed.partner[stop]
        chunk = sum(log_q[place, told.crossed.teacher_ids[place]] for place in range(first, last))
        torch.testing.assert_close(log_m[start:stop].sum(), chunk, atol=1e-4, rtol=1e-4)


def test_the_masses_of_what_may_follow_are_a_distribution():
    """Over characters and the end, at every position of a response."""
    index, crossing = readers(tuple(strings(1)), tuple(strings(3)))
    told = response(index, crossing, [0, 1, 1, 0, 0, 1, 0], 3)
    _, teacher_logits, _, row, _, table = told.arguments
    none = torch.full((len(row),), NAN, dtype=torch.float64)
    m = torch.stack(
        [
            1 - prefix_sampled(torch.zeros(len(row), 3), teacher_logits, torch.full_like(row, s), row, none, table)[3]
            for s in range(3)
        ],
        1,
    )
    at_boundary = torch.tensor([residue == b"" for residue in told.crossed.residue[:-1]])
    torch.testing.assert_close(m.sum(1)[at_boundary], torch.ones(int(at_boundary.sum())), atol=1e-5, rtol=0)
    assert (m.sum(1)[~at_boundary] < 1).all()
    assert (~at_boundary).any()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_chain_mass_is_that_of_a_range(seed):
    generator = torch.Generator().manual_seed(seed)
    index, (_, teacher) = index_of(2, 3), vocabularies(2, 3)
    logits = torch.randn(5, len(teacher), generator=generator)
    bounds = torch.randint(len(teacher), (5, 2), generator=generator).sort(1).values
    low, high = bounds[:, 0], bounds[:, 1] + 1
    order = torch.from_numpy(index.order)
    slow = [logits[n].double().softmax(-1)[order[low[n] : high[n]]].sum().log() for n in range(5)]
    torch.testing.assert_close(chain_log_mass(logits, low, high, order), torch.stack(slow), atol=1e-5, rtol=1e-5)
    assert chain_log_mass(logits[:1], low[:1], low[:1], order).item() == pytest.approx(math.log(1e-30))


def test_logits_of_half_precision_are_read_in_full():
    drawn = positions((3, 2), 2, chains=False)
    half = drawn._replace(
        student_logits=drawn.student_logits.detach().bfloat16(), teacher_logits=drawn.teacher_logits.bfloat16()
    )
    full = half._replace(student_logits=half.student_logits.float(), teacher_logits=half.teacher_logits.float())
    for loss in (lambda x: prefix_kl(*x, 3), lambda x: prefix_sampled(*x)):
        ours, theirs = (loss(x.arguments(index_of(3, 2))) for x in (half, full))
        assert ours.cost.dtype == torch.float32
        assert torch.equal(ours.cost, theirs.cost)
