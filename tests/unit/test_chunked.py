import pytest
import torch

from oprd.objectives import full_vocab_kl, sampled_token
from oprd.objectives.chunked import chunked_output_terms, entropy, top_k_overlap

POSITIONS, WIDTH, VOCAB = 11, 4, 23


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    student = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(POSITIONS, WIDTH, dtype=torch.float64)
    heads = [torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=own) for own in (True, False)]
    return student, teacher, torch.randint(VOCAB, (POSITIONS,)), torch.rand(POSITIONS), heads


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 1000])
@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_chunks_equal_the_whole_with_gradients(inputs, kind, chunk_size):
    student, teacher, tokens, weights, (own, other) = inputs
    cost = {"full": lambda s, t, y: full_vocab_kl(s, t), "sampled": sampled_token}[kind]

    def logged(s, t, y):
        return cost(s, t, y), {"overlap": top_k_overlap(s, t)}

    terms = chunked_output_terms(
        logged, student, teacher, [tokens], weights, lambda h: h @ own.T, lambda h: h @ other.T, chunk_size
    )
    p, q = student @ own.T, teacher @ other.T
    whole = (weights * cost(p, q, tokens)).sum()
    torch.testing.assert_close(terms.loss, whole)
    for ours, twin in zip(*(torch.autograd.grad(x, (student, own)) for x in (terms.loss, whole)), strict=True):
        torch.testing.assert_close(ours, twin)
    twins = {"output_divergence": cost(p, q, tokens), "entropy/student": entropy(p), "overlap": top_k_overlap(p, q)}
    assert terms.sums.keys() == twins.keys()
    for name, twin in twins.items():
        torch.testing.assert_close(terms.sums[name].double(), twin.detach().double().sum())


def test_no_logits_wider_than_a_chunk_are_formed_and_the_log_is_not_recomputed(inputs):
    student, teacher, tokens, weights, (own, other) = inputs
    seen = {"student": [], "teacher": []}

    def project(role, head):
        return lambda h: seen[role].append(len(h)) or h @ head.T

    terms = chunked_output_terms(
        lambda *rows: (sampled_token(*rows), {}),
        student,
        teacher,
        [tokens],
        weights,
        project("student", own),
        project("teacher", other),
        4,
    )
    assert seen == {"student": [4, 4, 3], "teacher": [4, 4, 3]}
    terms.loss.backward()
    assert sorted(seen["student"]) == [3, 3, 4, 4, 4, 4]


def test_entropy_and_overlap_by_hand():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert entropy(logits).item() == pytest.approx(0.6931472)
    student, teacher = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert top_k_overlap(student, teacher, k=2).item() == 0.5
    assert top_k_overlap(student, teacher, k=99).item() == 1.0
