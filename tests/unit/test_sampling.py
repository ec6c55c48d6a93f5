import copy
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.evaluation import sampling as module
from oprd.evaluation.sampling import Answer, Sampling, TransformersEngine, VLLMEngine, answer_of, load_engine
from tiny import VOCAB, tiny_model, tiny_tokenizer

PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [4], [9, 9, 2, 3]]
EOS = 1
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<turn>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def greedy(**settings):
    return Sampling(**{"samples": 1, "temperature": 0, "max_new_tokens": 8, **settings})


def tokenizer_of(vocabulary, **settings):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"pad_token": "<pad>", "eos_token": "<eos>", **settings})  # fmt: skip


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture
def written(monkeypatch):
    """Token ids as the engine gets them, one list an answer."""
    rows = []

    def answer_and_keep(tokenizer, ids, ends):
        rows.append(ids)
        return answer_of(tokenizer, ids, ends)

    monkeypatch.setattr(module, "answer_of", answer_and_keep)
    return rows


@torch.no_grad()
def argmax_decoding(model, prompt, count, ends=(EOS,), allowed=None):
    """No cache, no padding, one token after the other."""
    ids, new = list(prompt), []
    while len(new) < count:
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if allowed is not None:
            scores[[row for row in range(len(scores)) if row not in allowed]] = -torch.inf
        ids.append(int(scores.argmax()))
        new.append(ids[-1])
        if new[-1] in ends:
            break
    return new


# An answer


@settings(deadline=None)
@given(st.lists(st.integers(2, VOCAB - 1), max_size=6), st.lists(st.integers(0, VOCAB - 1), max_size=6), st.booleans())
def test_an_answer_ends_with_its_first_end_token(before, behind, ends):
    tokenizer, last = tiny_tokenizer(), {1, 5}
    before = [token for token in before if token not in last]
    text = tokenizer.decode(before)
    if ends:
        assert answer_of(tokenizer, [*before, 1, *behind], last) == Answer(text, len(before) + 1, False)
    else:
        assert answer_of(tokenizer, before, last) == Answer(text, len(before), True)


def test_an_end_token_that_is_no_special_token_stays_in_the_text():
    assert answer_of(tiny_tokenizer(), [2, 5, 3], {5}) == Answer("ad", 2, False)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"temperature": -0.1}, "temperature must be a number that is not negative, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": float("inf")}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must lie in"),
        ({"top_p": 1.01}, "top_p must lie in"),
        ({"top_p": float("nan")}, "top_p must lie in"),
        ({"temperature": 0}, "Set samples: 1"),
    ],
)
def test_impossible_sampling_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_edges_of_sampling_are_taken():
    Sampling(samples=1, temperature=0, top_p=1, max_new_tokens=1, batch_size=1)
    Sampling(samples=2, temperature=1e-6, top_p=1e-6)


# transformers


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "llama"])
def test_greedy_is_argmax_whatever_the_padding(architecture, written):
    model, tokenizer = tiny_model(architecture).eval(), tiny_tokenizer()
    together = TransformersEngine(model, tokenizer).generate(PROMPTS, greedy(), 3)
    rows = [row[: len(argmax_decoding(model, prompt, 8))] for row, prompt in zip(written, PROMPTS, strict=True)]
    assert rows == [argmax_decoding(model, prompt, 8) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert TransformersEngine(model, tokenizer).generate([prompt], greedy(), 0) == [answer]
    assert len({answer.text for answer in together}) > 1


OWN = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3}
OWN_DRAWS = {"temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.1}
OWN_DRAWS |= {"epsilon_cutoff": 0.5, "eta_cutoff": 0.5}


def test_the_models_own_sampling_settings_stay_out(model):
    drawn = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=4)
    for chosen, own in ((greedy(), OWN), (drawn, OWN | OWN_DRAWS)):
        plain = TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS, chosen, 0)
        for name, value in own.items():
            other = copy.deepcopy(model)
            other.generation_config.do_sample = True
            setattr(other.generation_config, name, value)
            assert TransformersEngine(other, tiny_tokenizer()).generate(PROMPTS, chosen, 0) == plain, name


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5)])
def test_draws_follow_temperature_and_nucleus(model, written, temperature, top_p):
    prompt, count = [2, 3, 4], 4000
    chosen = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
    TransformersEngine(model, tiny_tokenizer()).generate([prompt] * count, chosen, 0)
    with torch.no_grad():
        chances = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).tolist()
    nucleus, mass = {}, 0.0
    for token in sorted(range(VOCAB), key=lambda token: -chances[token]):
        if mass < top_p:
            nucleus[token] = chances[token]
        mass += chances[token]
    seen = [row[0] for row in written]
    assert set(seen) <= set(nucleus)
    expected = {token: chance / sum(nucleus.values()) for token, chance in nucleus.items()}
    assert 0.5 * sum(abs(seen.count(token) / count - chance) for token, chance in expected.items()) < 0.05


def test_a_turn_that_ends_with_another_token_than_the_models(model, written):
    plain = argmax_decoding(model, PROMPTS[0], 8)
    turn = plain[3]
    letters = [*"abcdefghijklmnopqrstuvwxyz012345678"]
    letters[turn - 2] = "<turn>"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = tokenizer_of(vocabulary, additional_special_tokens=["<turn>"])
    stop = plain.index(turn)
    (without,) = TransformersEngine(model, tokenizer).generate(PROMPTS[:1], greedy(), 0)
    assert without.tokens == len(plain) > stop + 1
    tokenizer.chat_template = TEMPLATE
    (answer,) = TransformersEngine(model, tokenizer).generate(PROMPTS[:1], greedy(), 0)
    assert answer == Answer("".join(letters[token - 2] for token in plain[:stop]), stop + 1, False)
    assert len(written[-1]) == stop + 1  # generation stopped there


def test_every_end_token_of_the_generation_config_ends(model):
    plain = argmax_decoding(model, PROMPTS[0], 8)
    model.generation_config.eos_token_id = [EOS, plain[2]]
    (answer,) = TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS[:1], greedy(), 0)
    assert (answer.tokens, answer.cut_off) == (plain.index(plain[2]) + 1, False)


def test_no_end_token_at_all_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no end token"):
        TransformersEngine(model, tokenizer)


def test_a_tokenizer_without_a_pad_token(model):
    tokenizer = tiny_tokenizer()
    expected = TransformersEngine(model, tokenizer).generate(PROMPTS, greedy(), 0)
    tokenizer.pad_token = None
    assert TransformersEngine(model, tokenizer).generate(PROMPTS, greedy(), 0) == expected


VOCABULARIES = {
    "padded": {token: index for index, token in enumerate(["<pad>", "<eos>", *"abcdefghij"])},
    "with holes": {token: 3 * index for index, token in enumerate(["<pad>", "<eos>", *"abcdefghij"])},
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_rows_that_stand_for_no_token_are_never_drawn(kind, written):
    tokenizer, known = tokenizer_of(VOCABULARIES[kind]), set(VOCABULARIES[kind].values())
    model = tiny_model(vocab_size=64).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts, ends = [[6, 9, 9], [6]], (tokenizer.eos_token_id,)
    free = [argmax_decoding(model, prompt, 8, ends) for prompt in prompts]
    assert not {token for row in free for token in row} <= known
    engine = TransformersEngine(model, tokenizer)
    engine.generate(prompts, greedy(), 0)
    expected = [argmax_decoding(model, prompt, 8, ends, known) for prompt in prompts]
    assert [row[: len(best)] for row, best in zip(written, expected, strict=True)] == expected
    del written[:]
    engine.generate(prompts * 300, Sampling(temperature=50.0, top_p=1.0, max_new_tokens=2), 0)
    assert {token for row in written for token in row} == known


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nothing_outside_is_touched(model, training, temperature):
    model.train(training)
    before = model.generation_config.to_dict()
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    prompts = [list(prompt) for prompt in PROMPTS]
    TransformersEngine(model, tiny_tokenizer()).generate(prompts, greedy(temperature=temperature), 5)
    assert model.training is training
    assert torch.get_rng_state().equal(states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert model.generation_config.to_dict() == before
    assert prompts == PROMPTS


def test_dropout_is_off_and_the_mode_comes_back_after_an_error(monkeypatch, model):
    modes = []

    def fail(**_):
        modes.append(model.training)
        raise RuntimeError("out of memory")

    model.train()
    monkeypatch.setattr(model, "generate", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS, greedy(), 0)
    assert modes == [False]
    assert model.training
    assert torch.get_rng_state().equal(before)


def test_the_seed_decides(model):
    engine, chosen = TransformersEngine(model, tiny_tokenizer()), Sampling(temperature=1.0, max_new_tokens=8)
    first = engine.generate([[2, 3]] * 6, chosen, 2**32 - 1)
    torch.manual_seed(99)
    assert engine.generate([[2, 3]] * 6, chosen, 2**32 - 1) == first
    assert engine.generate([[2, 3]] * 6, chosen, 8) != first
    assert len(set(first)) == 6


# vLLM


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM that draws from the seed of each answer."""
    fake, calls = ModuleType("vllm"), SimpleNamespace(llm=None, prompts=[], params=[])

    class LLM:
        def __init__(self, **options):
            calls.llm = options
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=77))

        def generate(self, prompts, params, *, use_tqdm):
            calls.prompts.append(prompts)
            calls.params.append(params)
            outputs = []
            for one in params:
                ids = random.Random(one.seed).choices(range(2, VOCAB), k=one.max_tokens)
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]))
            return outputs

    fake.LLM, fake.SamplingParams = LLM, lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return calls


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_what_vllm_is_given(vllm, folder):
    engine = load_engine(
        folder,
        engine="vllm",
        dtype="float16",
        trust_remote_code=True,
        tensor_parallel_size=2,
        max_model_len=None,
        gpu_memory_utilization=0.5,
    )
    assert vllm.llm == {
        "model": folder,
        "dtype": "float16",
        "load_format": "safetensors",
        "revision": None,
        "trust_remote_code": True,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
    }
    assert (engine.name, engine.context) == ("vllm", 77)
    engine.generate(PROMPTS, Sampling(temperature=0.3, top_p=0.9, max_new_tokens=6), 2**31 - 2)
    assert vllm.prompts == [[{"prompt_token_ids": prompt} for prompt in PROMPTS]]
    shared = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": -1,
        "max_tokens": 6,
        "stop_token_ids": [1],
        "detokenize": False,
    }
    assert [vars(one) for one in vllm.params[0]] == [shared | {"seed": seed} for seed in (2**31 - 2, 2**31 - 1, 0, 1)]


def test_every_answer_of_vllm_has_a_seed_of_its_own(vllm, folder):
    engine, chosen = load_engine(folder, engine="vllm"), Sampling(max_new_tokens=6)
    first = engine.generate([[2, 3]] * 5, chosen, 2**32 - 3)
    assert len(set(first)) == 5
    assert engine.generate([[2, 3]] * 5, chosen, 2**32 - 3) == first
    assert engine.generate([[2, 3]] * 5, chosen, 4) != first
    assert all(0 <= one.seed < 2**31 for params in vllm.params for one in params)


def test_answers_of_vllm_stop_at_the_end_tokens_of_the_model(vllm, folder):
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, *range(20, VOCAB)]
    model.save_pretrained(folder)
    answers = load_engine(folder, engine="vllm").generate([[2, 3]] * 8, Sampling(max_new_tokens=6), 0)
    assert vllm.params[0][0].stop_token_ids == [EOS, *range(20, VOCAB)]
    for seed, answer in enumerate(answers):
        ids = random.Random(seed).choices(range(2, VOCAB), k=6)
        assert answer == answer_of(tiny_tokenizer(), ids, {EOS, *range(20, VOCAB)})
    assert {answer.cut_off for answer in answers} == {True, False} or len({a.tokens for a in answers}) > 1


def test_vllm_without_a_generation_config(vllm, tmp_path):
    VLLMEngine(str(tmp_path), tiny_tokenizer()).generate(PROMPTS, greedy(), 0)
    assert vllm.params[0][0].stop_token_ids == [EOS]


# Loading


def test_a_folder_becomes_an_engine(folder, model):
    engine = load_engine(folder, device="cpu", dtype="float32")
    assert (engine.name, engine.context, engine.model.training) == ("transformers", 128, False)
    expected = TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS, greedy(), 0)
    assert engine.generate(PROMPTS, greedy(), 0) == expected
    assert load_engine(folder, device="cpu", dtype="float64").model.dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "sglang"}, "engine must be transformers or vllm, got 'sglang'"),
        ({"max_model_len": 9, "tensor_parallel_size": 2}, "max_model_len, tensor_parallel_size would be ignored"),
        ({"engine": "vllm", "device": "cpu"}, "device would be ignored"),
        ({"engine": "vllm"}, "vLLM is not installed"),
    ],
)
def test_what_cannot_be_loaded_is_told_before_the_weights(monkeypatch, folder, settings, message):
    import transformers

    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        load_engine(folder, **settings)
