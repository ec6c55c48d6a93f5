import json
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from oprd.states import Vocabulary, token_byte_ends, vocabulary_of

LINES = [
    "the other brother gathers the other three there",
    "hello, hello world! yellow mellow",
    "un café à l'été, naïve façade, über größer, señor mañana",
    "Ελληνικά και άλλα ελληνικά",
    "Привет мир, приветливый мир",
    "العربية لغة عربية",
    "हिन्दी भाषा हिन्दी में",
    "中文汉字 中文",
    "日本語のかな カタカナ",
    "한국어 한글 한국",
    "👨‍👩‍👧 😀 👍🏽 😀",
    "∑ x² ≤ ∫ √2 dx ∀ε ∈ ℝ",
    "12 + 34 = 46\n  x = 12\n\n",
]
WORDS = sorted({word for line in LINES for word in line.split()} | {" ", "  ", "\n", " the", "e\u0301", "he"})
PIECES = st.sampled_from(WORDS) | st.sampled_from([word + " " for word in WORDS])
ANY_CHARACTER = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TEXTS = st.lists(PIECES | PIECES | ANY_CHARACTER, max_size=6).map("".join)


def wrapped(tokenizer, **names):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def trained(tokenizer, size, special, lines=LINES, **settings):
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, **settings)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def byte_level(normalizer=None, trim_offsets=False, size=450):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return wrapped(trained(tokenizer, size, ["<end>"], initial_alphabet=sorted(alphabet)), eos_token="<end>")


def metaspace(split=True):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Metaspace(split=split)
    return wrapped(trained(tokenizer, 350, ["<unk>", "<end>"]), unk_token="<unk>", eos_token="<end>")


def llama():
    """SentencePiece as Llama-2 has it: bytes for what is unknown, a space before the text, and no pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [word for line in LINES[:9] for word in line.split()]  # later scripts fall back to bytes
    content = json.loads(trained(tokenizer, 520, ["<unk>", "<end>", *byte_tokens], words).to_str())
    content["added_tokens"] = content["added_tokens"][:2]  # byte tokens are ordinary ones
    return wrapped(Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", eos_token="<end>")


def fuse():
    """No pre-tokenizer, so tokens cross the borders of words, and nothing is added or dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return wrapped(trained(tokenizer, 400, ["<unk>", "<end>"]), unk_token="<unk>", eos_token="<end>")


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "llama": llama, "fuse": fuse}


@cache
def tokenizer_of(kind):
    return KINDS[kind]()


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def byte_by_byte(kind, text):
    """Every byte a token of its own; other tokenizers have no smaller tokens than characters."""
    tokenizer = tokenizer_of(kind)
    if kind == "byte-level":
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return tokenizer.convert_tokens_to_ids([character for piece, _ in pieces for character in piece])
    if kind == "llama":
        return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    return [index for character in text for index in encoded(tokenizer, character)]


def sequences(kind):
    """Tokens of a text: those that the tokenizer chooses, those of its pieces, its bytes, or any tokens."""
    tokenizer = tokenizer_of(kind)
    whole = TEXTS.map(lambda text: encoded(tokenizer, text))
    pieces = st.lists(TEXTS, max_size=4).map(lambda texts: [i for text in texts for i in encoded(tokenizer, text)])
    small = TEXTS.map(lambda text: byte_by_byte(kind, text))
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    return whole | pieces | small | anything


def is_text(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_last_end_is_the_length_of_the_decoded_text(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = encoded(tokenizer, data.draw(TEXTS))
    assert token_byte_ends(tokenizer, ids)[-1:] == [len(decoded(tokenizer, ids).encode())][: len(ids)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_prefix_agrees_with_decode(kind, data):
    tokenizer, ids = tokenizer_of(kind), data.draw(sequences(kind))
    text, ends = vocabulary_of(tokenizer).spell(ids)
    assert token_byte_ends(tokenizer, ids) == ends
    assert len(ends) == len(ids)
    assert ends[-1:] == [len(text)][: len(ids)]
    assert all(earlier <= later for earlier, later in pairwise(ends))
    for place, end in enumerate(ends):
        prefix, seen = text[:end], decoded(tokenizer, ids[: place + 1])
        if is_text(prefix):
            assert seen.encode() == prefix
        else:
            assert "\ufffd" in seen


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@settings(max_examples=20, deadline=None)
@given(text=TEXTS)
def test_one_byte_tokens_count_the_bytes(kind, text):
    tokenizer = tokenizer_of(kind)
    dropped = int(kind == "llama" and text.startswith(" "))
    ends = [max(0, place + 1 - dropped) for place in range(len(text.encode()))]
    assert token_byte_ends(tokenizer, byte_by_byte(kind, text)) == ends


def test_a_character_split_over_tokens():
    assert token_byte_ends(tokenizer_of("byte-level"), byte_by_byte("byte-level", "a€😀")) == list(range(1, 9))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_sequences_that_continue_a_text_keep_their_spaces(kind, data):
    vocabulary, ids = vocabulary_of(tokenizer_of(kind)), data.draw(sequences(kind))
    text, ends = vocabulary.spell(ids, at_start=False)
    assert text == b"".join(vocabulary.tokens[index] for index in ids)
    assert ends == [sum(len(vocabulary.tokens[index]) for index in ids[: place + 1]) for place in range(len(ids))]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes(kind):
    tokenizer = tokenizer_of(kind)
    end, word = tokenizer.eos_token_id, encoded(tokenizer, "hello")
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.special == set(tokenizer.all_special_ids)
    assert all(vocabulary.tokens[index] == b"" for index in vocabulary.special)
    assert vocabulary.spell([end, *word, end, end])[0] == b"hello"
    ends = token_byte_ends(tokenizer, [end, *word, end, end])
    assert (ends[0], ends[-3:]) == (0, [5, 5, 5])


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_that_are_not_special_are_text(kind):
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    ids = encoded(tokenizer, "hello<think>hello")
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    text, ends = vocabulary_of(tokenizer).spell(ids)
    assert text.decode() == decoded(tokenizer, ids)
    assert ends[ids.index(tokenizer.convert_tokens_to_ids("<think>"))] == len("hello<think>")


def words_apart():
    """No decoder: decoding joins tokens with spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "é": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(tokenizer, unk_token="<unk>")


@given(ids=st.lists(st.integers(0, 3), max_size=6))
def test_without_a_decoder_tokens_are_joined_by_spaces(ids):
    tokenizer = words_apart()
    assert vocabulary_of(tokenizer).spell(ids)[0].decode() == decoded(tokenizer, ids)


def test_without_a_decoder_added_tokens_are_joined_by_spaces_too():
    tokenizer = words_apart()
    tokenizer.add_tokens(["<think>"])
    ids = encoded(tokenizer, "one <think> two")
    assert vocabulary_of(tokenizer).spell(ids)[0].decode() == decoded(tokenizer, ids)


def test_a_first_token_with_several_spaces():
    """Metaspace drops every space of the first token, as it decodes."""
    vocabulary = {"<unk>": 0, "▁▁": 1, "▁a▁b": 2, "▁": 3, "a": 4, "b": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = wrapped(tokenizer, unk_token="<unk>")
    for ids in ([1, 4], [2, 4], [3, 3, 4], [4, 1, 5]):
        assert vocabulary_of(tokenizer).spell(ids)[0].decode() == decoded(tokenizer, ids)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_unknown_ids_are_refused(index):
    tokenizer = tokenizer_of("byte-level")
    for ids in ([index], [5, index], [index, 5]):
        with pytest.raises(ValueError, match=f"{index} is outside"):
            token_byte_ends(tokenizer, ids)
    token_byte_ends(tokenizer, [len(tokenizer) - 1])
    with pytest.raises(ValueError, match="outside"):
        token_byte_ends(tokenizer, [len(tokenizer)])


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Replace(Regex(" +"), " "),
        decoders.Strip(" ", 0, 1),
        decoders.Strip("a", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Sequence([decoders.WordPiece()])]),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_decoders_that_do_not_concatenate_bytes_are_refused(decoder):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.decoder = decoder
    with pytest.raises(ValueError, match="does not concatenate"):
        Vocabulary(wrapped(tokenizer))


def test_a_tokenizer_without_a_fast_backend_is_refused():
    with pytest.raises(ValueError, match="fast"):
        Vocabulary(SimpleNamespace(get_vocab=dict))


def test_a_vocabulary_is_made_once_and_again_when_tokens_were_added():
    tokenizer = words_apart()
    first = vocabulary_of(tokenizer)
    assert vocabulary_of(tokenizer) is first
    tokenizer.add_tokens(["three"])
    assert vocabulary_of(tokenizer).size == first.size + 1


def test_ids_with_holes():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 2, "b": 5}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    vocabulary = Vocabulary(wrapped(tokenizer))
    assert vocabulary.size == 6
    assert vocabulary.tokens == [b"<unk>", b"", b"a", b"", b"", b"b"]
    assert vocabulary.ids_by_bytes == {b"<unk>": 0, b"a": 2, b"b": 5}


def test_of_tokens_with_equal_bytes_the_one_that_is_no_byte_token():
    tokenizer = tokenizer_of("llama")
    vocabulary = vocabulary_of(tokenizer)
    letter, byte = tokenizer.convert_tokens_to_ids(["e", "<0x65>"])
    assert vocabulary.tokens[letter] == vocabulary.tokens[byte] == b"e"
    assert byte < letter
    assert vocabulary.ids_by_bytes[b"e"] == letter
    rare = tokenizer.convert_tokens_to_ids("<0xF0>")
    assert vocabulary.ids_by_bytes[b"\xf0"] == rare


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_read_is_the_tokenizer_and_its_ends(kind, data):
    tokenizer, text = tokenizer_of(kind), data.draw(TEXTS)
    ids, ends = vocabulary_of(tokenizer).read(text)
    assert ids == (encoded(tokenizer, text) if text else [])
    if decoded(tokenizer, ids) == text:
        assert ends == token_byte_ends(tokenizer, ids)
    else:  # text that the tokenizer does not keep whole: offsets still are those of the text
        kept = [end for end in ends if end != -1]
        assert kept == sorted(kept)
        assert all(is_text(text.encode()[:end]) for end in kept)
        assert kept == [] or kept[-1] <= len(text.encode())


@pytest.mark.parametrize("kind", ["byte-level", "llama", "fuse"])
def test_special_tokens_spelled_out_are_read_as_text(kind):
    tokenizer = tokenizer_of(kind)
    text = "hello<end>hello"
    assert tokenizer.eos_token_id in encoded(tokenizer, text)
    ids, ends = vocabulary_of(tokenizer).read(text)
    assert tokenizer.eos_token_id not in ids
    assert ends[-1] == len(text)


def test_an_unknown_character_has_its_place():
    vocabulary = vocabulary_of(tokenizer_of("fuse"))
    ids, ends = vocabulary.read("he☃he")
    assert [vocabulary.tokens[index] for index in ids] == [b"he", b"", b"he"]
    assert ends == [2, 5, 7]


def test_a_space_that_decoding_drops_is_still_counted():
    ids, ends = vocabulary_of(tokenizer_of("metaspace")).read(" hello")
    assert decoded(tokenizer_of("metaspace"), ids) == "hello"
    assert ends[-1] == 6


@cache
def composing(trim_offsets):
    return byte_level(normalizers.NFC(), trim_offsets)


DECOMPOSED = st.lists(
    st.sampled_from(
        ["e", "a", "x", " ", "\u0301", "\u0323", "\u0308", "é", "ᄒ", "ᅡ", "ᆫ", "한", "\u212b", "क\u093c", "\u0958"]
    ),
    max_size=8,
).map("".join)


def naive_ends(tokenizer, text, ids):
    """Where some beginning of the text, normalised, is what the tokens so far spell; else -1."""
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    beginnings = {normalize(text[:stop]).encode(): len(text[:stop].encode()) for stop in range(len(text), -1, -1)}
    spelled, ends = vocabulary_of(tokenizer).spell(ids)
    return [beginnings.get(spelled[:end], -1) for end in ends]


@pytest.mark.parametrize("trim_offsets", [False, True])
@settings(max_examples=80, deadline=None)
@given(text=DECOMPOSED)
def test_a_token_never_ends_before_what_it_has_read(trim_offsets, text):
    """With a normalizer, offsets are those of the text that was given; where there is none, -1."""
    tokenizer = composing(trim_offsets)
    ids, ends = vocabulary_of(tokenizer).read(text)
    assert ids == (encoded(tokenizer, text) if text else [])
    if decoded(tokenizer, ids) == text:
        assert ends == token_byte_ends(tokenizer, ids)
        return
    for end, expected in zip(ends, naive_ends(tokenizer, text, ids), strict=True):
        assert end in (-1, expected)


@pytest.mark.parametrize(
    ("text", "characters"),
    [("e\u0301x", ["e\u0301", "x"]), ("xe\u0301", ["x", "e\u0301"]), ("ᄒ\u1161\u11abx", ["ᄒ\u1161\u11ab", "x"])],
)
def test_ends_of_composed_characters(text, characters):
    tokenizer = composing(False)
    _, ends = vocabulary_of(tokenizer).read(text)
    expected = [sum(len(c.encode()) for c in characters[: n + 1]) for n in range(len(characters))]
    assert [end for end in ends if end != -1] == expected


@given(text=st.lists(st.sampled_from(["é", "x", " ", "한", "中", "😀"]), max_size=8).map("".join))
@example("café x")
def test_composed_text_is_read_exactly(text):
    tokenizer = composing(True)
    ids, ends = vocabulary_of(tokenizer).read(text)
    assert ends == token_byte_ends(tokenizer, ids)
    assert ends[-1:] == [len(text.encode())][: len(ids)]
