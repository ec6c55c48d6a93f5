import pytest
import torch
from peft import LoraConfig, get_peft_model

from oprd import models
from tiny import ARCHITECTURES, VOCAB, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbone_blocks_and_head(architecture):
    model = tiny_model(architecture).eval()
    wrapped = get_peft_model(tiny_model(architecture).eval(), LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.randint(2, VOCAB, (2, 6))
    for lm in (model, wrapped):
        backbone = models.backbone_of(lm)
        assert len(models.decoder_layers(backbone)) == 3
        states = backbone(input_ids=ids).last_hidden_state
        ours = models.head_of(lm).logits(states.flatten(0, 1)).view(2, 6, -1)
        torch.testing.assert_close(ours, lm(input_ids=ids).logits)  # soft caps and scales included


def test_a_scaled_head():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = GraniteForCausalLM(config).eval()
    ids = torch.randint(2, VOCAB, (1, 5))
    states = models.backbone_of(model)(input_ids=ids).last_hidden_state[0]
    head = models.head_of(model)
    torch.testing.assert_close(head.logits(states), model(input_ids=ids).logits[0])
    torch.testing.assert_close(head.linear_states(states) @ head.linear_form().T, head.logits(states))


def test_a_head_with_bias_as_one_matrix():
    head = models.Head(torch.randn(VOCAB, 4), torch.randn(VOCAB), 0.5, None)
    states = torch.randn(3, 4)
    torch.testing.assert_close(head.linear_states(states) @ head.linear_form().T, head.logits(states))


def test_soft_capped_logits_have_no_linear_form():
    with pytest.raises(ValueError, match="logit_weight: 0"):
        models.head_of(tiny_model("gemma2")).linear_form()


def test_a_model_without_a_head_or_with_unclear_blocks():
    with pytest.raises(ValueError, match="LM head"):
        models.backbone_of(tiny_model().model)
    backbone = tiny_model().model
    backbone.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="0 module lists have 7"):
        models.decoder_layers(backbone)


def test_head_drift_and_adoption():
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    own, other = student.lm_head.weight.detach().clone(), teacher.lm_head.weight
    assert models.head_drift(student, teacher, VOCAB) == pytest.approx(((other - own).norm() / own.norm()).item())
    models.adopt_head(student, teacher, VOCAB - 4)  # the last four rows are padding to this tokenizer
    assert student.lm_head.weight[: VOCAB - 4].equal(other[: VOCAB - 4])
    assert student.lm_head.weight[VOCAB - 4 :].equal(own[VOCAB - 4 :])
    assert models.head_drift(student, teacher, VOCAB - 4) == 0
    assert models.head_drift(student, tiny_model(width=32), VOCAB) is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"tied": True}, {}, "ties its head"),
        ({}, {"width": 32}, "16 wide and the teacher 32"),
        ({}, {"vocab_size": 30}, "fewer rows"),
    ],
)
def test_heads_that_cannot_move(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        models.adopt_head(tiny_model(**student), tiny_model(**teacher), VOCAB)


def test_a_tied_teacher_can_lend_its_head():
    student, teacher = tiny_model(seed=0), tiny_model(seed=1, tied=True)
    models.adopt_head(student, teacher, VOCAB)
    assert student.lm_head.weight.equal(teacher.model.embed_tokens.weight)
    assert not models.is_tied(student)


def frozen(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_freeze_unreachable():
    model = tiny_model()
    assert models.freeze_unreachable(model, top_layer=3, head=False) == model.lm_head.weight.numel()
    assert frozen(model) == {"lm_head.weight"}
    model = tiny_model()
    models.freeze_unreachable(model, top_layer=1, head=False)
    assert frozen(model) == {n for n, _ in model.named_parameters() if "layers.0." not in n and "embed" not in n}
    model = tiny_model()
    assert models.freeze_unreachable(model, top_layer=3, head=True) == 0
    model = tiny_model(tied=True)
    assert models.freeze_unreachable(model, top_layer=3, head=False) == 0


def test_resolve_path():
    assert models.resolve_path("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert models.resolve_path("miniature:train.jsonl").endswith("train.jsonl")
    with pytest.raises(ValueError, match="miniature:teacher"):
        models.resolve_path("miniature:pupil")
