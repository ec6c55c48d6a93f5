import logging
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3Config, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from oprd import OPRDConfig
from oprd.miniature.task import build_tokenizer
from oprd.models import end_token_ids
from oprd.training.preflight import (
    Shapes,
    check_crossing,
    check_datasets,
    check_end_tokens,
    check_models,
    check_step_size,
    compare_tokenizers,
    fit_prompts,
    prompt_lengths,
)

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}{% if think %} think think{% endif %}"
)
WORDS = ["<pad>", "<eos>", "<eot>", "user", "system", "assistant", "think", "a", "b", "c", "<unk>"]


def word_tokenizer(words=WORDS, template=None, eos="<eos>"):
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


def shape(layers=4, width=32, vocabulary=64):
    return Qwen2Config(num_hidden_layers=layers, hidden_size=width, vocab_size=vocabulary, num_attention_heads=4)


@pytest.fixture
def warnings_of(caplog):
    """What a call says aloud."""
    PartialState()  # the logger asks it which process this is

    def collect(call):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="oprd.training.preflight"):
            call()
        return [record.getMessage() for record in caplog.records if record.name == "oprd.training.preflight"]

    return collect


# ------------------------------------------------------------------------------------------------------------- models


def test_equal_shapes():
    size = len(word_tokenizer())
    checked = check_models(shape(), shape(), word_tokenizer(), layers="even", compares_states=True)
    assert checked == Shapes(layers=[2, 4], num_layers=4, vocab_size=size, context=32768, teacher_context=32768)
    assert size == len(WORDS)


@pytest.mark.parametrize(("own", "other"), [(64, 96), (96, 64), (11, 12)])
def test_padded_vocabularies_are_cut_to_the_tokenizer(own, other):
    checked = check_models(
        shape(vocabulary=own), shape(vocabulary=other), word_tokenizer(), layers=[-1], compares_states=True
    )
    assert checked == Shapes(layers=[4], num_layers=4, vocab_size=len(WORDS), context=32768, teacher_context=32768)


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        (shape(layers=6), "4 layers of width 32, the teacher 6 of width 32"),
        (shape(width=64), "4 layers of width 32, the teacher 4 of width 64"),
    ],
)
def test_other_shapes_need_a_bridge_only_where_states_are_compared(teacher, told):
    with pytest.raises(ValueError, match=rf"{told}\. .*oprd bridge fit.*representation_weight: 0.*output_loss: top_k"):
        check_models(shape(), teacher, word_tokenizer(), layers="all", compares_states=True)
    checked = check_models(shape(), teacher, word_tokenizer(), layers="all", compares_states=False)
    assert checked == Shapes(
        layers=[1, 2, 3, 4], num_layers=4, vocab_size=len(WORDS), context=32768, teacher_context=32768
    )


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_fewer_embeddings_than_tokens(role):
    pair = {"student": shape(), "teacher": shape(), role: shape(vocabulary=10)}
    with pytest.raises(
        ValueError, match=rf"The {role} has 10 embeddings for a tokenizer whose ids go up to 10.*resize_token"
    ):
        check_models(*pair.values(), word_tokenizer(), layers="all", compares_states=True)


def test_added_tokens_count():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["d", "e"])
    assert check_models(shape(), shape(), tokenizer, layers="all", compares_states=True).vocab_size == 13
    with pytest.raises(ValueError, match="12 embeddings for a tokenizer whose ids go up to 12"):
        check_models(shape(vocabulary=12), shape(), tokenizer, layers="all", compares_states=True)


def test_layers_are_those_of_the_student():
    with pytest.raises(ValueError, match=r"\[5\] are outside 1\.\.4"):
        check_models(shape(), shape(), word_tokenizer(), layers=[5], compares_states=True)


def test_a_config_with_a_text_part():
    nested = Gemma3Config(
        text_config={"num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4}
    )
    checked = check_models(nested, shape(), word_tokenizer(), layers="last", compares_states=True)
    assert checked == Shapes(layers=[4], num_layers=4, vocab_size=len(WORDS), context=32768, teacher_context=32768)


# --------------------------------------------------------------------------------------------------------- tokenizers

MESSAGES = [{"role": "user", "content": "a b"}]


@pytest.mark.parametrize("prompt", ["a b", MESSAGES])
def test_same_tokenizers(prompt):
    one, other = word_tokenizer(template=TEMPLATE), word_tokenizer(template=TEMPLATE)
    assert compare_tokenizers(one, other, prompt) == "same"


def test_another_chat_template_is_another_prompt_where_it_is_used():
    student = word_tokenizer(template=TEMPLATE)
    teacher = word_tokenizer(template="system think " + TEMPLATE)
    assert compare_tokenizers(student, teacher, MESSAGES) == "other prompt"
    assert compare_tokenizers(student, teacher, "a b") == "same"
    assert compare_tokenizers(student, word_tokenizer(), MESSAGES) == "same"


@pytest.mark.parametrize("words", [[*WORDS[:7], "b", "a", *WORDS[9:]], [*WORDS, "d"]])
def test_other_ids_are_other_tokens(words):
    assert compare_tokenizers(word_tokenizer(), word_tokenizer(words), "a") == "other tokens"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*WORDS[:7], "b", "a", *WORDS[9:]], r"11 and 11 tokens; 'a' is 7 and 8, 'b' is 8 and 7\)"),
        ([*WORDS, "d"], r"11 and 12 tokens; 'd' is None and 11\)"),
    ],
)
def test_states_of_other_tokenizers_need_a_bridge(words, told):
    settings = {"layers": "all", "other_tokenizer": word_tokenizer(words)}
    with pytest.raises(ValueError, match=rf"different tokenizers \({told}.*oprd bridge fit.*output_loss: top_k"):
        check_models(shape(), shape(), word_tokenizer(), compares_states=True, **settings)
    checked = check_models(shape(), shape(), word_tokenizer(), compares_states=False, **settings)
    assert (checked.vocab_size, checked.teacher_vocab_size) == (11, len(words))


def test_no_more_than_three_examples():
    with pytest.raises(ValueError, match="different tokenizers") as refused:
        check_models(
            shape(vocabulary=400),
            shape(vocabulary=400),
            word_tokenizer(),
            layers="all",
            compares_states=True,
            other_tokenizer=build_tokenizer(),
        )
    assert str(refused.value).count(" is ") == 3


def test_a_teacher_with_fewer_embeddings_than_its_own_tokenizer():
    with pytest.raises(ValueError, match="The teacher has 64 embeddings for a tokenizer whose ids go up to 129"):
        check_models(
            shape(), shape(), word_tokenizer(), layers="all", compares_states=False, other_tokenizer=build_tokenizer()
        )


def test_a_longer_context_of_a_teacher_that_counts_otherwise_does_not_bound_the_student():
    short = shape()
    short.max_position_embeddings = 16
    checked = check_models(
        shape(),
        short,
        word_tokenizer(),
        layers="all",
        compares_states=False,
        other_tokenizer=word_tokenizer([*WORDS, "d"]),
    )
    assert (checked.context, checked.teacher_context) == (32768, 16)


@pytest.mark.parametrize(
    ("settings", "size", "prompt", "tools", "told"),
    [
        ({"logit_weight": 1.0}, 10, "a", False, "logit_weight compares logits of one vocabulary"),
        ({"output_loss": "top_k", "top_k_support": "teacher"}, 10, "a", False, "no meaning across tokenizers"),
        ({"output_loss": "top_k", "top_k_renormalize": False}, 10, "a", False, "no meaning across tokenizers"),
        ({"output_loss": "full"}, 600, "a", False, "output_loss: top_k"),
        ({}, 10, "a", True, "tools need one tokenizer"),
        ({}, 10, MESSAGES, False, "teacher's tokenizer has no chat template"),
    ],
)
def test_settings_that_need_one_vocabulary(tmp_path, settings, size, prompt, tools, told):
    args = OPRDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=told):
        check_crossing(args, size, word_tokenizer(), prompt, tools)


def test_settings_that_do_not():
    args = OPRDConfig(output_dir="x", use_cpu=True, output_loss="full")
    check_crossing(args, 512, word_tokenizer(template=TEMPLATE), MESSAGES, False)
    with pytest.raises(ValueError, match="teacher's tokenizer has no end token"):
        check_crossing(args, 512, word_tokenizer(eos=None), "a", False)


# --------------------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize(
    ("declared", "expected"), [(None, {1}), (2, {1, 2}), ([1, 2], {1, 2}), ([2, 5], {1, 2, 5}), (0, {0, 1})]
)
def test_end_token_ids(declared, expected):
    assert end_token_ids(word_tokenizer(), GenerationConfig(eos_token_id=declared)) == expected


def test_end_token_ids_of_one_source_or_none():
    assert end_token_ids(word_tokenizer(), None) == {1}
    assert end_token_ids(word_tokenizer(eos=None), GenerationConfig(eos_token_id=2)) == {2}
    assert end_token_ids(word_tokenizer(eos=None), SimpleNamespace()) == set()


@pytest.mark.parametrize(("own", "other"), [({1}, {1}), ({1, 2}, {2}), ({1}, {1, 2}), ({1}, set())])
def test_end_tokens_that_meet(own, other):
    check_end_tokens(word_tokenizer(), own, other)


def test_end_tokens_that_do_not_meet_are_named():
    with pytest.raises(ValueError, match=r"responses end with <eos>, the teacher's with <eot>, a\. .*never stop"):
        check_end_tokens(word_tokenizer(), {1}, {7, 2})


def test_the_token_that_the_teacher_writes_must_end_the_student_too():
    """A base student and its instruct teacher share the end of text, but the teacher ends its turns otherwise."""
    check_end_tokens(word_tokenizer(), {1, 2}, {1, 2}, teacher_main=2)
    with pytest.raises(ValueError, match=r"end with <eos>, the teacher's with <eot>\. .*Set eos_token: '<eot>'"):
        check_end_tokens(word_tokenizer(), {1}, {1, 2}, teacher_main=2)


def test_a_tokenizer_whose_ids_have_holes():
    tokenizer = word_tokenizer()
    tokenizer.get_vocab = lambda: {"a": 0, "b": 40}
    config = shape(vocabulary=64)
    assert check_models(config, config, tokenizer, layers="all", compares_states=True).vocab_size == 41


def test_a_step_needs_its_prompts():
    check_step_size(4, 8, 2)
    with pytest.raises(ValueError, match="has 3 prompts and one step needs 4"):
        check_step_size(3, 8, 2)


def test_no_end_token():
    with pytest.raises(ValueError, match="has no end token"):
        check_end_tokens(word_tokenizer(), set(), {1})


# ------------------------------------------------------------------------------------------------------------ prompts


def dataset_of(*prompts):
    return Dataset.from_dict({"prompt": list(prompts)})


def test_datasets_that_will_do():
    check_datasets(dataset_of("a"), responses_per_prompt=4)
    check_datasets(dataset_of("a").to_iterable_dataset(), responses_per_prompt=1)


@pytest.mark.parametrize(
    ("dataset", "responses", "message"),
    [
        (None, 1, "missing"),
        (dataset_of("a").rename_column("prompt", "text"), 1, "no 'prompt' column; it has text"),
        (Dataset.from_dict({}), 1, "it has none"),
        (dataset_of("a").select([]), 1, "empty"),
        (dataset_of("a").to_iterable_dataset(), 2, "streaming.*responses_per_prompt: 1"),
        (dataset_of("a").rename_column("prompt", "text").to_iterable_dataset(), 1, "no 'prompt' column"),
    ],
)
def test_datasets_that_will_not(dataset, responses, message):
    with pytest.raises(ValueError, match=message):
        check_datasets(dataset, responses_per_prompt=responses)


def test_lengths_of_text():
    tokenizer, prompts = build_tokenizer(), ["37+4-9=?", "1", "10+1"]
    assert prompt_lengths(dataset_of(*prompts), tokenizer) == [len(tokenizer(p)["input_ids"]) for p in prompts]
    assert prompt_lengths(dataset_of("a b c", "", "a"), word_tokenizer()) == [3, 0, 1]


def test_lengths_of_chats_are_those_of_the_rendering():
    tokenizer = word_tokenizer(template=TEMPLATE)
    short, long = MESSAGES, [{"role": "system", "content": "c"}, {"role": "user", "content": "a b c"}]
    assert prompt_lengths(dataset_of(short, long), tokenizer) == [4, 7]  # roles, words and the generation prompt
    assert prompt_lengths(dataset_of(short, long), tokenizer, think=True) == [6, 9]


def test_lengths_of_more_chats_than_one_batch():
    words = [1 + index % 5 for index in range(2003)]
    dataset = dataset_of(*([{"role": "user", "content": " ".join("a" * count)}] for count in words))
    assert prompt_lengths(dataset, word_tokenizer(template=TEMPLATE)) == [count + 2 for count in words]


def test_chats_without_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        prompt_lengths(dataset_of(MESSAGES), word_tokenizer())


def fit(lengths, *, context=None, longest=None, completion=4):
    dataset = dataset_of(*(f"of {length}" for length in lengths))
    kept = fit_prompts(dataset, lengths, context=context, max_prompt_length=longest, max_completion_length=completion)
    return list(kept["prompt"])


def test_prompts_that_fit_stay(warnings_of):
    kept = []
    assert warnings_of(lambda: kept.extend(fit([3, 1, 6], context=10, longest=6))) == []
    assert kept == ["of 3", "of 1", "of 6"]
    assert fit([3, 1, 600]) == ["of 3", "of 1", "of 600"]  # no context known


def test_long_prompts_are_dropped_aloud(warnings_of):
    kept = []
    (said,) = warnings_of(lambda: kept.extend(fit([3, 9, 1, 7], longest=3, context=7)))
    assert kept == ["of 3", "of 1"]
    assert said.endswith("Dropped 2 of 4 prompts over 3 tokens.")  # accelerate may put the rank before it


def test_no_room_for_a_response():
    with pytest.raises(
        ValueError,
        match=r"row 3: a prompt of 8 tokens and a response of 4 .* context of 10 \(2 such .*length: 6 to drop",
    ):
        fit([3, 7, 8, 6], context=10)
    fit([3, 6, 6], context=10)


def test_a_row_fits_a_micro_batch():
    dataset = dataset_of("w", "x", "y", "z")

    def of(budget, **more):
        settings = {"context": None, "max_prompt_length": None, "max_completion_length": 4} | more
        return fit_prompts(dataset, [5, 3, 9, 8], max_tokens_per_microbatch=budget, **settings)

    told = r"row 3: a prompt of 9 tokens and a response of 4 do not fit max_tokens_per_microbatch=11 \(2 such rows\)\. "
    with pytest.raises(
        ValueError, match=told + "Set it to at least 13, or lower max_completion_length or max_prompt_l"
    ):
        of(11)
    assert len(of(13)) == len(of(None)) == 4
    with pytest.raises(ValueError, match=r"row 4: .* \(1 such rows\)\. Set it to at least 12"):
        of(11, max_prompt_length=8)
    assert len(of(11, max_prompt_length=7)) == 2
    with pytest.raises(ValueError, match="do not fit the context of 12"):  # no budget helps there
        of(11, context=12)


def test_nothing_left():
    with pytest.raises(ValueError, match="max_prompt_length=2 drops every prompt; the shortest has 3"):
        fit([3, 5], longest=2)


def test_a_prompt_without_tokens():
    with pytest.raises(ValueError, match="row 2: the prompt has no tokens"):
        fit([3, 0, 5])


def test_the_row_at_fault_is_counted_in_the_file_not_in_what_is_left():
    dataset = Dataset.from_dict({"prompt": ["w", "x", "y", "z"]})
    with pytest.raises(ValueError, match=r"row 4: a prompt of 8 tokens.*max_prompt_length: 6"):
        fit_prompts(dataset, [50, 3, 50, 8], context=10, max_prompt_length=20, max_completion_length=4)
    with pytest.raises(ValueError, match=r"Lower max_completion_length\.$"):
        fit_prompts(dataset, [5, 3, 5, 8], context=10, max_prompt_length=None, max_completion_length=10)


def test_the_shorter_context_counts():
    short, long = shape(), shape()
    short.max_position_embeddings = 100
    for pair in ((short, long), (long, short)):
        assert check_models(*pair, word_tokenizer(), layers="all", compares_states=True).context == 100


def test_evaluation_sets_are_checked_too():
    good, bad = Dataset.from_dict({"prompt": ["a"]}), Dataset.from_dict({"text": ["a"]})
    check_datasets(good, {"one": good})
    with pytest.raises(ValueError, match=r"eval_dataset\['two'\] has no 'prompt' column"):
        check_datasets(good, {"one": good, "two": bad})
    with pytest.raises(ValueError, match="eval_dataset has no 'prompt'"):
        check_datasets(good, bad)
