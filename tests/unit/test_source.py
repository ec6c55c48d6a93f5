import pytest

from oprd.models import resolve_path
from oprd.training.source import Source
from tiny import tiny_model, tiny_tokenizer


def test_a_path_and_an_instance_know_the_same(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path, instance = Source(str(tmp_path)), Source(model)
    assert (path.is_path, instance.is_path) == (True, False)
    assert path.config.hidden_size == instance.config.hidden_size == 16
    assert path.generation_config.eos_token_id == instance.generation_config.eos_token_id == [1, 5]
    assert path.tokenizer("student", "processing_class").get_vocab() == tiny_tokenizer().get_vocab()


def test_without_a_generation_config_the_models_config_counts(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert Source(str(tmp_path)).generation_config.eos_token_id == 1


def test_an_instance_from_nowhere_needs_its_tokenizer():
    with pytest.raises(
        ValueError, match="The student is a model without a path: pass its tokenizer as processing_class"
    ):
        Source(tiny_model()).tokenizer("student", "processing_class")


def test_an_instance_from_somewhere_brings_it():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_path("miniature:student"))
    assert len(Source(model).tokenizer("student", "processing_class")) == model.config.vocab_size
