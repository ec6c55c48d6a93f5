"""The measurements of ``examples/theory`` against slow, obvious twins in float64, and what docs/theory.md says of them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from oprd.bridge.solve import theorem_rank
from oprd.objectives import position_weights, sampled_token
from oprd.states import make_rollout
from tiny import VOCAB, tiny_batch, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "theory"))
import gradient_noise
import null_space
import rank
from gradient_noise import Comparison, between, over_texts, slope
from null_space import along, centred, head, losses, null_directions, spectrum, with_null_space
from rank import bump, curves_of, error_curve, kept_by, predictable, synthetic, valleys


def rollout_of(lengths):
    batch = tiny_batch(lengths=lengths)
    weights_BC = position_weights(batch["completion_mask"])
    return make_rollout(*batch.values(), state_weights_BC=weights_BC, output_weights_BC=weights_BC)


def comparison(lengths=((3, 2), (4, 3)), student=None, teacher=None):
    student = student or tiny_model(layers=2, dtype=torch.float64)
    teacher = teacher or tiny_model(layers=2, seed=1, dtype=torch.float64)
    return Comparison(student, teacher, rollout_of(lengths))


# ------------------------------------------------------------------------------------------------- gradient noise


def one_position_at_a_time(here):
    """For every position: probabilities ``[V]`` and the gradient for every token it might draw, ``[V, P]``."""
    weights_N, p_NV = here.weights_N, here.own_NV.detach().softmax(-1)
    for place in range(len(weights_N)):
        here.weights_N = weights_N * (torch.arange(len(weights_N)) == place)
        tokens_VN = torch.arange(VOCAB).unsqueeze(1).expand(VOCAB, len(weights_N))
        yield p_NV[place], torch.stack([here.gradient("sampled token", tokens_N) for tokens_N in tokens_VN])
    here.weights_N = weights_N


def test_the_sampled_gradient_over_all_tokens():
    """Enumerated: its mean is full KL's gradient, and its noise what `of_the_gradient` estimates."""
    student = tiny_model(layers=2, dtype=torch.float64)
    student.lm_head.weight.data *= 2  # surer of its token, so that the squares of the means are a fair part
    here = comparison(student=student)
    mean, noise, means = 0, 0, 0
    for p_V, gradient_VP in one_position_at_a_time(here):
        own_P = p_V @ gradient_VP
        mean, means = mean + own_P, means + own_P.square().sum()
        noise = noise + p_V @ gradient_VP.square().sum(1) - own_P.square().sum()
    assert means > 0.1 * noise
    full = here.gradient("full KL")
    torch.testing.assert_close(mean, full, rtol=1e-5, atol=1e-7 * full.norm().item())  # the models' norms are float32
    found = here.of_the_gradient(100, torch.Generator().manual_seed(0))
    assert found["signal"] == pytest.approx(mean.square().sum().item(), rel=1e-5)
    assert found["noise"] == pytest.approx(noise.item(), rel=0.05)


def test_the_value_over_all_tokens():
    here = comparison()
    p_NV = here.own_NV.detach().softmax(-1)
    values_NV = torch.stack(
        [sampled_token(here.own_NV, here.goal_NV, torch.full_like(here.tokens_N, v)) for v in range(VOCAB)], -1
    ).detach()
    mean_N = (p_NV * values_NV).sum(-1)
    variance_N = (p_NV * (values_NV - mean_N.unsqueeze(-1)).square()).sum(-1)
    found = here.of_the_value()
    assert found["signal"] == pytest.approx((here.weights_N * mean_N).sum().square().item())
    assert found["noise"] == pytest.approx((here.weights_N.square() * variance_N).sum().item())


def test_given_the_text_only_the_sampled_token_is_left_to_chance():
    """Another token drawn at every position moves one gradient and no other, to the last bit: top-k and full KL are as free of
    this noise as OPRD."""
    here, again = comparison(), comparison()
    again.tokens_N = (again.tokens_N + 1) % VOCAB
    for method in gradient_noise.METHODS:
        assert here.gradient(method).equal(again.gradient(method)) == (method != "sampled token"), method


def test_on_a_straight_line_the_value_drowns_and_the_gradient_does_not():
    """Reward and gradient shrink together, so their ratio stays; only the value's falls with the divergence."""
    ends = [tiny_model(layers=2, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    points = []
    for left in (1e-3, 1e-4, 1e-5):
        here = comparison(student=between(*ends, 1 - left), teacher=ends[1])
        gradient = here.of_the_gradient(20, torch.Generator().manual_seed(0))
        value = here.of_the_value()
        points.append((here.loss("full KL").item(), *(m["signal"] / m["noise"] for m in (gradient, value))))
    kl, gradient, value = zip(*points, strict=True)
    assert slope(kl, gradient) == pytest.approx(0, abs=0.02)
    assert slope(kl, value) == pytest.approx(1, abs=0.02)
    assert gradient[-1] > 0.01


def test_over_texts_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    found = [over_texts(mean + torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in range(2000)]
    assert sum(f["noise"] for f in found) / 2000 == pytest.approx(3, rel=0.02)
    assert sum(f["signal"] for f in found) / 2000 == pytest.approx(mean.square().sum().item(), rel=0.15)


def test_slope():
    assert slope([1, 2, 8], [3, 12, 192]) == pytest.approx(2)
    assert slope([1, 2], [1, -1]) is None


# ---------------------------------------------------------------------------------------------------- null space


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_in_the_null_space_only_oprd_sees_a_difference():
    """Values and gradients of all output-space losses are 0; OPRD's is the squared length over d."""
    weight_Vd = with_null_space(drawn(VOCAB, 16), 3)
    basis_Kd = null_directions(weight_Vd)
    assert len(basis_Kd) == 3
    torch.testing.assert_close(basis_Kd @ basis_Kd.T, torch.eye(3, dtype=torch.float64))
    logits_KV = basis_Kd @ weight_Vd.T
    torch.testing.assert_close(logits_KV, logits_KV.mean(1, keepdim=True).expand_as(logits_KV))  # proportional to 1
    goal_Nd, off_Nd = drawn(5, 16, seed=1), drawn(5, 3, seed=2) @ basis_Kd
    own_Nd = (goal_Nd + off_Nd).requires_grad_()
    for name, values_N in losses(own_Nd, goal_Nd, weight_Vd, torch.arange(5)).items():
        (gradient_Nd,) = torch.autograd.grad(values_N.sum(), own_Nd, retain_graph=True)
        expected = off_Nd if name == "OPRD" else torch.zeros_like(off_Nd)
        torch.testing.assert_close(values_N.detach(), expected.square().mean(1), atol=1e-13, rtol=1e-9)
        torch.testing.assert_close(gradient_Nd, expected * 2 / 16, atol=1e-12, rtol=1e-9)


def test_outside_of_it_all_see_one():
    weight_Vd, goal_Nd = drawn(VOCAB, 16), drawn(5, 16, seed=1)
    assert len(null_directions(weight_Vd)) == 0
    found = losses(goal_Nd + drawn(5, 16, seed=2), goal_Nd, weight_Vd, torch.arange(5))
    assert all((values_N > 1e-6).all() for values_N in found.values())


def test_along_singular_directions():
    """Logit mse is ``size^2 s_i^2 / V``, so OPRD over it grows as ``(s_1 / s_i)^2``; KL follows its Hessian there."""
    weight_Vd, goal_Nd = drawn(VOCAB, 16), drawn(5, 16, seed=1)
    values_d, directions_dd = spectrum(weight_Vd)
    rows = along(directions_dd, goal_Nd, weight_Vd, torch.arange(5), size=1e-4)
    measured = torch.tensor([row["logit mse"] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(measured, 1e-8 * values_d.square() / VOCAB, rtol=1e-6, atol=0)
    p_NV = (goal_Nd @ weight_Vd.T).softmax(-1)
    for direction_d, row in zip(directions_dd, rows, strict=True):
        z_V = weight_Vd @ direction_d
        variance_N = p_NV @ z_V.square() - (p_NV @ z_V).square()
        assert row["full KL"] == pytest.approx(0.5e-8 * variance_N.mean().item(), rel=1e-3)


def test_heads_of_the_miniature():
    """More tokens than dimensions: no null space. Fewer: one of ``d - (V - 1)`` dimensions."""
    found = {row["head of"]: row for row in null_space.heads_of(("student", "wide-teacher", "digit-student"))}
    assert [found[name]["null directions"] for name in found] == [0, 0, 64 - 29]
    student = head(null_space.load("student"))
    assert found["student"]["smallest"] == pytest.approx(torch.linalg.svdvals(centred(student))[-1].item())


# ------------------------------------------------------------------------------------------------------------ rank


def test_the_error_curve_is_its_formula():
    variance, rho2 = drawn(9).square(), drawn(9, seed=1).sigmoid()
    for r, error in enumerate(error_curve(variance, rho2).tolist()):
        left_out = sum((variance[i] * rho2[i]).item() for i in range(r, 9))
        taken_in = sum((variance[i] * (1 - rho2[i])).item() for i in range(r))
        assert error == pytest.approx(left_out + taken_in)


def test_where_rho_falls_the_curve_has_one_valley_at_a_half():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        variance = torch.rand(12, generator=generator, dtype=torch.float64)
        rho2 = torch.rand(12, generator=generator, dtype=torch.float64).sort(descending=True).values
        curve = error_curve(variance, rho2)
        assert bump(curve) < 1e-12
        assert valleys(curve) == [int((rho2 > 0.5).sum())]
        assert max(int(curve.argmin()), 1) == theorem_rank([variance], [rho2], 12)


def test_where_it_does_not_there_may_be_several():
    """The counterexample: not quasi-convex, and the first crossing of 1/2 is not the best rank."""
    variance, rho2 = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64), torch.tensor([0.9, 0.4, 0.9]).double()
    curve = error_curve(variance, rho2)
    assert valleys(curve) == [1, 3]
    assert bump(curve) == pytest.approx((curve[2] - curve[1]).item()) == pytest.approx(0.2)
    assert curve.argmin() == 3 == theorem_rank([variance], [rho2], 3)


def test_no_encoder_keeps_more_than_the_principal_one():
    rows_nd = drawn(200, 8) @ drawn(8, 8, seed=1)
    covariance = torch.cov(rows_nd.T)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1).T
    for r in range(1, 9):
        best = kept_by(basis[:r], covariance)
        others = [torch.linalg.qr(drawn(8, r, seed=seed)).Q.T for seed in range(20)]
        assert all(kept_by(other, covariance) <= best + 1e-12 for other in others)


def test_the_most_that_can_be_predicted():
    """Reduced-rank regression on the rows themselves: singular values of the fitted teacher states."""
    own, noise = drawn(300, 5), drawn(300, 7, seed=2)
    noise[:, 0] *= 5  # much variance, and nothing to predict
    goal = own @ drawn(5, 7, seed=1) + noise
    fitter = rank.BridgeFitter([1], 5, 7)
    fitter.update([own], [goal])
    own, goal = own - own.mean(0), goal - goal.mean(0)
    fitted = own @ torch.linalg.lstsq(own, goal).solution
    expected = torch.linalg.svdvals(fitted).square().cumsum(0) / 300
    torch.testing.assert_close(predictable(fitter.train[0])[:5], expected[:5], rtol=1e-6, atol=0)
    layer = curves_of(fitter)[0]
    assert (layer["principal"] <= layer["any"] + 1e-9).all()
    assert (layer["any"] - layer["principal"])[0] > 0.05  # principal directions are not the best to predict


def test_made_up_data_have_the_rho_they_were_given():
    rho2 = torch.tensor([0.9, 0.2, 0.8, 0.1], dtype=torch.float64)
    layer = curves_of(synthetic(rho2, torch.tensor([8.0, 4, 2, 1]).double(), 40_000))[0]
    torch.testing.assert_close(layer["rho2"], rho2, atol=0.02, rtol=0)


# ------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", [gradient_noise, null_space, rank], ids=lambda module: module.__name__)
def test_scripts_run(script, tmp_path, monkeypatch, capsys):
    name = script.__name__.replace("_", "-")
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(tmp_path)])
    script.main()
    assert (tmp_path / f"theory-{name}.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / f"theory-{name}.json").read_text())
    assert f"theory-{name}.png" in capsys.readouterr().out
    if script is gradient_noise:
        first = numbers["paths"]["OPRD run"][0]
        assert first["KL"] > 0.1 and first["given the text: value"] > first["given the text: gradient"] > 0
    elif script is null_space:
        assert numbers["null space"]["OPRD"] > 0.5 and abs(numbers["null space"]["full KL"]) < 1e-12
        last = numbers["directions"][-1]
        assert last["logit mse"] == pytest.approx(last["(s_1/s_i)^2"], rel=1e-6)
    else:
        assert numbers["accuracy"]["64"] > numbers["accuracy"]["8"]
        assert numbers["table"][0]["bump"] < 1e-6 < numbers["table"][1]["bump"]
