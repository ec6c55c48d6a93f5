"""What only a GPU can show: torch's varlen kernel, planned against allocated bytes, weights that come and go.

python -m pytest tests/gpu        # on a machine with CUDA; elsewhere nothing is collected
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from oprd.insight.simulate import Shapes, _model, _prepared, layout, simulate
from oprd.states import attention, check_packed_attention, tile_mlps, use_packed_attention
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states
from oprd.training.teacher import Offloaded

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

CONFIG = Qwen2Config(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
ROWS = ((100, 3000), (60, 1100), (200, 2400))
LAST = {"positions": "last_k", "position_k": 512}


def update(shapes, chosen, models, rollout):
    targets = teacher_states(chosen, models[1], rollout)
    loss = student_loss(chosen, *models, rollout, targets)[0]
    loss.backward()
    return loss.detach()


def models_of(shapes, chosen):
    torch.manual_seed(0)
    student, teacher = (_model(CONFIG, shapes).cuda() for _ in range(2))
    teacher.requires_grad_(False).eval()
    tile_mlps(teacher)
    tile_mlps(student, with_gradient=shapes.tile_mlp)
    return _prepared(student, shapes, chosen), teacher


@pytest.mark.parametrize("scope", ["full", "suffix"])
def test_varlen_kernel_is_the_loop_over_documents(scope, monkeypatch):
    shapes = Shapes(CONFIG, CONFIG, ROWS, is_packed=True, gradient_scope=scope, dtype=torch.bfloat16, **LAST)
    chosen = Objective((1, 2, 3, 4, 5, 6), 6, 32_000)
    models, rollout = models_of(shapes, chosen), layout(shapes, chosen, "cuda")
    found = []
    for has_kernel in (True, False):
        monkeypatch.setattr(attention, "_has_varlen_kernel", lambda *_, has=has_kernel: has)
        models[0].zero_grad()
        loss = update(shapes, chosen, models, rollout)
        grads = torch.cat([p.grad.flatten().float() for p in models[0].parameters() if p.grad is not None])
        found.append((loss, grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-2, atol=0)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.999


def test_packed_attention_passes_its_own_check():
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype).cuda()
        use_packed_attention(model)
        check_packed_attention(model)


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({}, {}),
        ({}, {"gradient_scope": "suffix", **LAST}),
        ({}, {"tile_mlp": True}),
        ({"logit_weight": 1.0}, {}),
        ({"representation_weight": 0.0, "output_loss": "top_k"}, {}),
        ({"representation_weight": 0.0, "output_loss": "full"}, {}),
    ],
)
def test_planned_peak_is_what_is_allocated(settings, about):
    shapes = Shapes(CONFIG, CONFIG, ROWS, is_packed=True, dtype=torch.bfloat16, **about)
    chosen = Objective((1, 2, 3, 4, 5, 6), 6, 32_000, **settings)
    planned = simulate(shapes, chosen)
    models, rollout = models_of(shapes, chosen), layout(shapes, chosen, "cuda")
    update(shapes, chosen, models, rollout)  # gradients exist, kernels are loaded
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    update(shapes, chosen, models, rollout)
    rise = torch.cuda.max_memory_allocated() - before
    assert max(planned.teacher_rise, planned.targets + planned.student_rise) == pytest.approx(rise, rel=0.10)


def test_offloaded_teacher_leaves_the_gpu_and_changes_nothing():
    shapes = Shapes(CONFIG, CONFIG, ROWS, is_packed=True, dtype=torch.bfloat16)
    chosen = Objective((1, 2, 3, 4, 5, 6), 6, 32_000)
    models, rollout = models_of(shapes, chosen), layout(shapes, chosen, "cuda")
    expected = teacher_states(chosen, models[1], rollout)
    there = torch.cuda.memory_allocated()
    away = Offloaded(models[1], torch.device("cuda"))
    weights = sum(p.numel() * 2 for p in models[1].model.parameters())
    assert there - torch.cuda.memory_allocated() > 0.95 * weights
    with away.here():
        found = teacher_states(chosen, models[1], rollout)
    for layer, states in expected.layers.items():
        torch.testing.assert_close(found.layers[layer], states)
