"""Every path of the output losses against its twin: logits of all positions, formed and differentiated."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oprd import _compat
from oprd.insight.live_bytes import LiveBytes
from oprd.objectives import full_vocab_kl, lean, projection, sampled_token, top_k_kl
from oprd.objectives.fused import differentiated, full_kernel, fused_terms, selected_kernel
from oprd.objectives.lean import top_k_terms, top_tokens
from oprd.objectives.output_space import TOP_K_SUPPORTS, sampled_cost, top_k_selection
from oprd.objectives.projection import Projection
from oprd.training.objective import Objective
from oprd.training.output_term import _one_vocabulary

V, D_S, D_T = 53, 6, 9
SHAPES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale and bias": {"scale": 1.3, "bias": True, "temperature": 1.4},
    "soft cap": {"softcap": 4.0, "scale": 0.8, "temperature": 0.6, "bias": True},
}


class Setting(NamedTuple):
    student: Projection
    teacher: Projection
    own: torch.Tensor
    other: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor


def setting(
    n=11, dtype=torch.float64, *, vocabulary=V, scale=1.0, softcap=None, temperature=1.0, bias=False, widths=(D_S, D_T)
):
    generator = torch.Generator().manual_seed(n + 7)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    heads = [
        Projection(make(vocabulary, d), make(vocabulary) if bias else None, scale, softcap, temperature, dtype)
        for d in widths
    ]
    for parameter in heads[0][:2]:
        if parameter is not None:
            parameter.requires_grad_()
    tokens = torch.randint(vocabulary, (n,), generator=generator)
    return Setting(*heads, make(n, widths[0]).requires_grad_(), make(n, widths[1]), tokens, make(n).abs())


def logits_of(head, states):
    logits = states.double() @ head.weight_Vd.double().T
    logits = (logits if head.bias_V is None else logits + head.bias_V.double()) * head.scale
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)) / head.temperature


def twin(s, cost):
    per_position = cost(logits_of(s.student, s.own), logits_of(s.teacher, s.other), s.tokens)
    return (s.weights.double() * per_position).sum(), per_position.sum()


def learners(s):
    return [x for x in (s.own, s.student.weight_Vd, s.student.bias_V) if x is not None and x.requires_grad]


def same(terms, s, cost, **tolerance):
    """Value, sum and gradients; the graph is scaled, so that backward's own factor counts."""
    slow, total = twin(s, cost)
    torch.testing.assert_close(terms.loss.double(), slow, **tolerance)
    torch.testing.assert_close(terms.sums["output_divergence"].double(), total.detach(), atol=1e-4, rtol=1e-2)
    ours, theirs = (torch.autograd.grad(3.5 * loss, learners(s)) for loss in (terms.loss, slow))
    for own, other, learner in zip(ours, theirs, learners(s), strict=True):
        assert own.dtype == learner.dtype
        torch.testing.assert_close(own.double(), other.double(), **tolerance)


COSTS = {
    "sampled": sampled_token,
    "full": lambda p, q, _: full_vocab_kl(p, q),
    **{
        f"top_k {support} {renormalize}": lambda p, q, _, support=support, renormalize=renormalize: top_k_kl(
            p, q, 4, support, renormalize
        )
        for support in TOP_K_SUPPORTS
        for renormalize in (True, False)
    },
}


def objective_of(name, k=4, vocabulary=V):
    kind, *rest = name.split()
    options = {"top_k_support": rest[0], "top_k_renormalize": rest[1] == "True"} if rest else {}
    return Objective(layers=(1,), num_layers=1, vocab_size=vocabulary, output_loss=kind, output_top_k=k, **options)


def terms_of(name, s, k=4):
    return _one_vocabulary(objective_of(name, k), s.student, s.teacher, s.own, s.other, s.tokens, s.weights)


PATHS = ("dense", "lean, one tile", "lean, small tiles", "TRL's")


def takes(path, name):
    """Whether an objective has the path at all."""
    if "lean" in path:
        return name.startswith("top_k") and not name.endswith("False")
    return path == "dense" or not name.startswith("top_k")


def with_paths(names):
    cases = [(path, name) for path in PATHS for name in names if takes(path, name)]
    return pytest.mark.parametrize(("path", "name"), cases, indirect=["path"])


FEW = ("sampled", "full", "top_k union True", "top_k union False")


@pytest.fixture
def path(request, monkeypatch):
    """Chunks of 4 positions, and which way an objective takes where it has several."""
    monkeypatch.setattr(projection, "CPU_COPY_BYTES", 4 * V * 8)
    monkeypatch.setattr(lean, "LEAST_VOCABULARY_PER_TOKEN", 1 if "lean" in request.param else 10**6)
    monkeypatch.setattr(lean, "TILE", 7 if "small" in request.param else 10**6)
    monkeypatch.setattr(_compat, "has_tiled_kernels", lambda device: request.param == "TRL's")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@with_paths(COSTS)
def test_fast_equals_slow(path, name, shape):
    if path == "TRL's":  # in float32 inside
        s = setting(dtype=torch.float32, **SHAPES[shape])
        same(terms_of(name, s), s, COSTS[name], atol=2e-4, rtol=2e-4)
    else:
        s = setting(**SHAPES[shape])
        same(terms_of(name, s), s, COSTS[name], atol=1e-11, rtol=1e-9)


@with_paths(COSTS)
def test_float32(path, name):
    s = setting(dtype=torch.float32, **SHAPES["soft cap"])
    same(terms_of(name, s), s, COSTS[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@with_paths(["sampled", "full", "top_k teacher True", "top_k teacher False"])
def test_bfloat16(path, name, autocast):
    """bf16 models, and fp32 ones under autocast: both multiply in bf16. The teacher's support, so that ties of the student's
    rounded logits do not matter; its own logits are made distinct."""
    s = setting(dtype=torch.float32 if autocast else torch.bfloat16, **SHAPES["scale and bias"])
    with torch.no_grad():
        s.teacher.weight_Vd.zero_()
        s.teacher.bias_V.copy_(torch.linspace(-2, 2, V)[torch.randperm(V)])
    s = s._replace(student=s.student._replace(dtype=torch.bfloat16), teacher=s.teacher._replace(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = terms_of(name, s)
    assert terms.loss.dtype == torch.float32
    same(terms, s, COSTS[name], atol=0.15, rtol=0.1)


@pytest.mark.parametrize("n", [0, 1, 4, 13])
@with_paths(FEW)
def test_any_number_of_positions(path, name, n):
    s = setting(n, torch.float32, **SHAPES["scale and bias"])
    terms = terms_of(name, s)
    same(terms, s, COSTS[name], atol=1e-4, rtol=1e-4)
    if n == 0:
        assert terms.loss == 0
        assert terms.loss.requires_grad
        assert all(g.eq(0).all() for g in torch.autograd.grad(terms_of(name, s).loss, learners(s)))


@with_paths(FEW)
@pytest.mark.parametrize("frozen", ["head", "states", "bias"])
def test_what_is_frozen_gets_no_gradient(path, name, frozen):
    s = setting(dtype=torch.float32, **SHAPES["scale and bias"])
    tensors = {"head": s.student.weight_Vd, "states": s.own, "bias": s.student.bias_V}
    tensors[frozen].requires_grad_(False)
    terms = terms_of(name, s)
    same(terms, s, COSTS[name], atol=1e-4, rtol=1e-4)
    terms_of(name, s).loss.backward()
    assert [tensor.grad is None for tensor in tensors.values()] == [key == frozen for key in tensors]


@with_paths(FEW)
def test_evaluation_computes_no_gradients(path, name):
    s = setting(dtype=torch.float32)
    with torch.no_grad():
        terms = terms_of(name, s)
    assert not terms.loss.requires_grad
    torch.testing.assert_close(terms.loss.double(), twin(s, COSTS[name])[0].detach(), atol=1e-4, rtol=1e-4)


def test_evaluation_multiplies_the_head_once_for_each_model():
    counts = {}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[str(func)] = counts.get(str(func), 0) + 1
            return func(*args, **(kwargs or {}))

    s = setting()
    for train in (True, False):
        counts.clear()
        with torch.set_grad_enabled(train), Products():
            loss = terms_of("full", s).loss
            if train:
                loss.backward()
        assert counts["aten.mm.default"] == 2 + train  # and by the states
        assert counts.get("aten.addmm_.default", 0) == train  # by the head


@pytest.mark.parametrize("k", [1, V - 1, V, V + 10])
@with_paths([name for name in COSTS if name.startswith("top_k")])
def test_as_many_tokens_as_there_are(path, name, k):
    s = setting(**SHAPES["temperature"])
    _, support, renormalize = name.split()
    same(
        terms_of(name, s, k),
        s,
        lambda p, q, _: top_k_kl(p, q, k, support, renormalize == "True"),
        atol=1e-11,
        rtol=1e-9,
    )


def test_a_token_may_be_selected_twice():
    s = setting(**SHAPES["soft cap"])
    at = torch.tensor([3, 5, 3])

    def cost(log_p, log_q):
        return (log_p * log_q * torch.tensor([1.0, 2.0, 3.0])).sum(-1)

    terms = fused_terms(
        selected_kernel(lambda p, q: (at.expand(len(p), -1), cost)), s.student, s.teacher, s.own, s.other, [], s.weights
    )
    same(terms, s, lambda p, q, _: cost(p.log_softmax(-1)[:, at], q.log_softmax(-1)[:, at]), atol=1e-11, rtol=1e-9)


def test_any_cost_is_differentiated():
    s = setting(**SHAPES["soft cap"])

    def cost(p, q, y):
        return (p.softmax(-1) * (p - q).square()).sum(-1) + p.gather(1, y.unsqueeze(1)).squeeze(1)

    kernel = differentiated(lambda p, q, y: (cost(p, q, y), {"twice": 2 * y}))
    terms = fused_terms(kernel, s.student, s.teacher, s.own, s.other, [s.tokens], s.weights)
    same(terms, s, cost, atol=1e-11, rtol=1e-9)
    assert terms.sums["twice"] == 2 * s.tokens.sum()


@pytest.mark.parametrize("tile", [1, 7, 52, 53, 100])
def test_the_search_over_tiles_finds_the_top_tokens(monkeypatch, tile):
    monkeypatch.setattr(lean, "TILE", tile)
    s = setting(**SHAPES["soft cap"])
    for k in (1, 5, V, V + 1):
        found = top_tokens(s.student, s.own, k)
        assert found.tolist() == logits_of(s.student, s.own).topk(min(k, V)).indices.tolist()


def test_errors():
    s = setting()
    arguments = s.student, s.teacher, s.own, s.other, s.weights
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_k_terms(*arguments, 0, "student")
    with pytest.raises(ValueError, match="top_k_support must be one of"):
        top_k_terms(*arguments, 2, "both")
    short = s.teacher._replace(weight_Vd=s.teacher.weight_Vd[:-1])
    with pytest.raises(ValueError, match="cover 53 and 52 tokens"):
        top_k_terms(s.student, short, s.own, s.other, s.weights, 2, "student")
    loss = fused_terms(full_kernel, *arguments[:4], [], s.weights).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator made, the head itself aside."""

    def __init__(self, besides):
        super().__init__()
        self.besides, self.elements = besides, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and sorted(tensor.shape) != sorted(self.besides):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", COSTS)
def test_no_logits_of_all_positions_exist_and_the_peak_does_not_grow(monkeypatch, name):
    vocabulary, width, chunk = 4096, 4, 8
    monkeypatch.setattr(projection, "CPU_COPY_BYTES", chunk * vocabulary * 4)
    peaks = {}
    for n in (64, 256):
        s = setting(n, torch.float32, vocabulary=vocabulary, widths=(width, width))
        with LargestTensor((vocabulary, width)) as largest, LiveBytes() as memory:
            terms_of(name, s).loss.backward()
        assert largest.elements <= chunk * vocabulary
        peaks[n] = memory.peak
    positions = 256 - 64
    assert peaks[256] - peaks[64] <= positions * 16 * 4 * width  # rows of states and a few numbers each
    assert peaks[256] <= 6 * chunk * vocabulary * 4 + 3 * vocabulary * width * 4


def test_gathered_rows_are_chunked_too(monkeypatch):
    """Where they are wider than the vocabulary."""
    vocabulary, width, k, rows = 256, 64, 16, 8
    monkeypatch.setattr(lean, "LEAST_VOCABULARY_PER_TOKEN", 1)
    monkeypatch.setattr(projection, "CPU_COPY_BYTES", rows * k * width * 4)
    s = setting(64, torch.float32, vocabulary=vocabulary, widths=(width, width))
    with LargestTensor((vocabulary, width)) as largest:
        terms_of("top_k student True", s, k).loss.backward()
    assert largest.elements == rows * k * width


def test_the_kernels_are_the_objectives():
    """By hand at one position: two tokens, certain teacher."""
    p = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    value, gradient, _ = full_kernel(p, lambda: q, True)
    kl = 0.25 * (torch.tensor(0.5).log()) + 0.75 * torch.tensor(1.5).log()
    assert value.item() == pytest.approx(kl.item(), abs=1e-6)
    assert gradient[0, 0].item() == pytest.approx(0.25 * (torch.tensor(0.5).log() - kl).item(), abs=1e-6)
    kernel = selected_kernel(lambda *_: (torch.tensor([[1]]), lambda a, b: sampled_cost(a, b).squeeze(1)))
    value, gradient, _ = kernel(p, lambda: q, True)
    assert value.item() == pytest.approx(torch.tensor(1.5).log().item(), abs=1e-6)
    assert gradient[0, 1].item() == pytest.approx(0.25 * torch.tensor(1.5).log().item(), abs=1e-6)
    index, _ = top_k_selection(p, q, 1, "student", True)
    assert index.tolist() == [[1]]
