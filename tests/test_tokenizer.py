"""Tokenizers: lossless, deterministic, no special tokens from text, and equal to transformers."""

import json
import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.data import tokenizer as tokenizer_module
from nextword.data.tokenizer import (
    BYTE_CHARS,
    DELIMITER_TOKEN,
    END_OF_TURN_TOKEN,
    EOS_TOKEN,
    EXTRACT_TOKEN,
    PAD_TOKEN,
    START_TOKEN,
    UNK_TOKEN,
    Tokenizer,
    count_broken_tokens,
    hash_sample,
    normalized,
    sample_key,
    train_bpe,
    train_bpe_from_sample,
    train_byte_bpe,
    train_char,
    vocab_size_for,
)

SCRIPTS = {
    "Latin": "The quick brown fox can't jump 1,234 times.\n\n  It won't!",
    "Devanagari": "सभी मनुष्य जन्म से स्वतंत्र तथा मर्यादा और अधिकारों में समान होते हैं।",
    "Arabic": "يُولَدُ جَمِيعُ ٱلنَّاسِ أَحْرَارًا وَمُتَسَاوِينَ فِي ٱلْكَرَامَةِ وَٱلْحُقُوقِ.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、カタカナも。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며",
    "Cyrillic": "Все люди рождаются свободными и равными в своём достоинстве.",
    "Greek": "Ὅλοι οἱ ἄνθρωποι γεννιοῦνται ἐλεύθεροι.",
    "Ge'ez": "የሰው ልጅ ሁሉ ሲወለድ ነጻ ነው።",
    "Hebrew": "כָּל בְּנֵי הָאָדָם נוֹלְדוּ בְּנֵי חוֹרִין",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0323 \x00\x7f\ufeff",
}
SPECIAL_TOKENS = [START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN]
SINGLE, PAIR = [START_TOKEN, "A", EXTRACT_TOKEN], [START_TOKEN, "A", DELIMITER_TOKEN, "B", EXTRACT_TOKEN]
LOOKALIKES = [
    EOS_TOKEN,
    PAD_TOKEN,
    UNK_TOKEN,
    f"a{EOS_TOKEN}b {PAD_TOKEN}{PAD_TOKEN}",
    "<|endoftext|",
    "</s><s>[PAD_TOKEN]",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(list(SCRIPTS.values()) * 3 + LOOKALIKES * 5, 800)


@pytest.fixture(scope="module")
def small_bpe():
    return train_bpe(["abc"], 300)


@pytest.fixture(scope="module")
def char():
    return train_char([*SCRIPTS.values(), *LOOKALIKES])


def test_special_token_ids_and_vocabulary_sizes(bpe, char):
    assert (bpe.kind, bpe.eos_id, bpe.pad_id, bpe.unk_id) == ("bpe", 0, 1, None)
    assert (char.kind, char.eos_id, char.pad_id, char.unk_id) == ("char", 0, 1, 2)
    assert bpe.vocab_size == bpe.backend.get_vocab_size() <= 800
    assert char.vocab_size == 3 + len(set("".join([*SCRIPTS.values(), *LOOKALIKES])))
    assert train_bpe(["abab"], 5000).vocab_size < 270  # a small text has few merges


def test_the_byte_alphabet_is_that_of_the_library():
    assert sorted(BYTE_CHARS) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_decoded_exactly(script, bpe, char):
    text = SCRIPTS[script]
    for tokenizer in (bpe, char):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize("word", ["हिन्दी", "ที่นี่", "كِتَاب", "தமிழ்", "e\u0301te\u0301"])
def test_a_word_is_not_split_at_combining_marks(word, bpe):
    assert len(bpe.backend.pre_tokenizer.pre_tokenize_str(f"{word} {word}")) == 2


@settings(max_examples=300)
@given(st.text())
def test_bpe_is_lossless_on_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and bpe.decode_bytes(ids) == text.encode()
    assert not {0, 1} & set(ids)


@settings(max_examples=500)
@given(
    st.one_of(
        st.binary(),
        st.lists(st.sampled_from([b"\xe0\xa4", b"a", b"\xff", "é".encode(), b"<|endoftext|>"])).map(b"".join),
    )
)
def test_bpe_is_lossless_on_bytes(bpe, data):
    ids = bpe.encode(data)
    assert bpe.decode_bytes(ids) == data
    assert bpe.decode(ids) == data.decode("utf-8", "replace")
    assert not {0, 1} & set(ids)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(), st.sampled_from(LOOKALIKES)), max_size=8))
def test_batches_equal_single_texts(bpe, char, texts):
    for tokenizer in (bpe, char):
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
        assert all(ids.dtype == np.uint32 for ids in batch)


@pytest.mark.parametrize("text", LOOKALIKES)
def test_text_never_becomes_a_special_token(text, bpe, char):
    for tokenizer in (bpe, char):
        for ids in (tokenizer.encode(text), tokenizer.encode(text.encode()), *tokenizer.encode_batch([text])):
            assert {0, 1, 2 if tokenizer is char else 0}.isdisjoint(np.asarray(ids).tolist())
            assert tokenizer.decode(ids) == text


def test_decoding_omits_special_tokens_and_shows_unknown_characters(bpe, char):
    assert bpe.decode([0, *bpe.encode("a"), 1, 0]) == "a"
    assert char.encode("a☃")[1] == char.unk_id and char.decode(char.encode("a☃")) == "a\ufffd"
    assert bpe.decode([10**6]) == ""  # a model's vocabulary may be padded past the tokenizer's


def test_lone_surrogates_and_invalid_bytes_become_replacement_characters(bpe, char):
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
    assert [*map(bpe.decode, bpe.encode_batch(["\udfff"]))] == ["\ufffd"]
    assert char.encode(b"a\xff") == [*char.encode("a"), char.unk_id]


def test_training_is_deterministic(bpe):
    again = train_bpe(list(SCRIPTS.values()) * 3 + LOOKALIKES * 5, 800)
    assert again.backend.to_str() == bpe.backend.to_str()
    program = (
        "import hashlib, sys; from nextword.data.tokenizer import train_bpe;"
        "texts = ['%d words of %d' % (i * 7919 % 1000, i * i % 611) for i in range(5000)];"
        "print(hashlib.sha256(train_bpe(texts, 600).backend.to_str().encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "12"]
    assert runs[0].stdout == runs[1].stdout and runs[0].stderr == ""


def thai_texts() -> list[str]:
    """Texts of random Thai syllables, without spaces between words."""
    rng = random.Random(0)
    consonants, vowels = [chr(code) for code in range(0x0E01, 0x0E2F)], ["า", "ี", "ู", "ะ", "ิ", "ุ", "ื"]
    syllables = [rng.choice(consonants) + rng.choice(vowels) + rng.choice(consonants) for _ in range(300)]
    return ["".join(rng.choices(syllables, k=12)) + " " + "".join(rng.choices(syllables, k=9)) for _ in range(300)]


def test_characters_are_merged_first_where_that_gives_fewer_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = thai_texts()
    by_bytes, chosen = train_byte_bpe(texts, 512), train_bpe_from_sample(texts, 512)
    assert chosen.vocab_size == by_bytes.vocab_size == 512
    (num_bytes, broken), (num_tokens, still_broken) = (count_broken_tokens(t, texts) for t in (by_bytes, chosen))
    assert broken > 0.02 * num_bytes and num_tokens < num_bytes and still_broken <= 0.01 * num_tokens
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    chosen.save(tmp_path, context_length=77)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts[:20], *SCRIPTS.values(), "<|endoftext|>", "\0\ufffd"]:
        ids = chosen.encode(text)
        assert chosen.decode(ids) == text and Tokenizer.open(tmp_path).encode(text) == ids
        assert stock.decode(ids) == text and (text.startswith("<|") or stock.encode(text) == ids)


def test_a_script_of_single_bytes_is_merged_by_bytes():
    texts = ["the cat sees the garden and the river", "a small dog follows the teacher"] * 30
    trained = train_bpe_from_sample(texts, 300)
    assert trained.backend.to_str() == train_byte_bpe(texts, 300).backend.to_str()
    assert count_broken_tokens(trained, texts)[1] == 0


@pytest.mark.parametrize("sign", ["\u02cb\u02dc", "'", "\u200d"], ids=["tone letters", "apostrophe", "joiner"])
def test_words_with_signs_inside_are_kept_whole_where_that_gives_fewer_tokens(sign, tmp_path):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(0)
    syllables = [rng.choice("ptksmnlr") + rng.choice("aeiou") for _ in range(40)]
    words = [sign.join(rng.choices(syllables, k=rng.choice([2, 3]))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=15)) + ". In 1984 there were 37," for _ in range(200)]
    by_default, chosen = train_byte_bpe(texts, 600), train_bpe_from_sample(texts, 600)
    num_default, num_chosen = (count_broken_tokens(tokenizer, texts)[0] for tokenizer in (by_default, chosen))
    assert chosen.backend.to_str() != by_default.backend.to_str() and num_chosen <= 0.98 * num_default
    assert not any(re.search(r"\d.*\d", token) for token in chosen.backend.get_vocab())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    chosen.save(tmp_path)
    stock, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    for text in [*texts[:20], *SCRIPTS.values(), "(a|b)  \n\n c, d…e"]:
        assert chosen.decode(chosen.encode(text)) == text
        assert stock.encode(text) == again.encode(text) == chosen.encode(text)


def test_quotation_marks_and_contractions_do_not_change_the_words():
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.choice([2, 4, 5, 7]))) for _ in range(400)]
    endings = ["", "", "", "", "'s", "n't", ",", ".'", '?"', ", '"]
    texts = [" ".join(rng.choice(words) + rng.choice(endings) for _ in range(20)) for _ in range(200)]
    assert train_bpe_from_sample(texts, 400).backend.to_str() == train_byte_bpe(texts, 400).backend.to_str()


@pytest.mark.parametrize("make", [lambda texts: train_bpe(texts, 600), train_char], ids=["bpe", "char"])
def test_a_tokenizer_that_normalizes_gives_both_forms_the_same_ids(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = [unicodedata.normalize("NFC", text) for text in SCRIPTS.values() if "\x7f" not in text] * 3
    tokenizer = normalized(make(texts), to_nfc=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    tokenizer.save(tmp_path)
    stock, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    assert (tokenizer.normalization, again.normalization) == ("nfc", "nfc")
    for text in texts:
        other = unicodedata.normalize("NFD", text)
        assert tokenizer.encode(other) == again.encode(other) == stock.encode(other) == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(other)) == text == tokenizer.normalize(other)
        assert tokenizer.lost_text([text, other]) == ["", ""]
    tokenizer.backend.normalizer = normalizers.Sequence([normalizers.NFC()])
    assert Tokenizer(tokenizer.backend, tokenizer.config).normalization == "nfc"
    tokenizer.backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert Tokenizer(tokenizer.backend, tokenizer.config).normalization == "none"


def test_errors_of_the_texts_are_raised_by_training():
    def texts():
        yield "some text"
        raise NextwordError("the file changed")

    with pytest.raises(NextwordError, match="the file changed"):
        train_bpe(texts(), 300)


def test_the_sample_is_bounded_and_spread(monkeypatch):
    texts = [f"{i} " * 100 for i in range(1000)]
    keyed = [(sample_key(index), text) for index, text in enumerate(texts)]
    assert hash_sample(keyed)[0] == keyed
    monkeypatch.setattr(tokenizer_module, "MAX_SAMPLE_CHARS", 40_000)
    sample = [text for _, text in hash_sample(keyed)[0]]
    assert 15_000 < sum(map(len, sample)) <= 40_000
    indices = [texts.index(text) for text in sample]
    assert min(indices) < 100 and max(indices) > 900
    monkeypatch.setattr(tokenizer_module, "MAX_SAMPLE_WORD_BYTES", 100)
    assert 5 < len(hash_sample(keyed)[0]) < 50


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(UsageError, match="258"):
        train_bpe(["abc"], 100)


def test_the_default_vocabulary_size_grows_with_the_corpus():
    sizes = [vocab_size_for(n) for n in (0, 1, 10**6, 2 * 10**6, 36 * 10**6, 10**9, 10**15)]
    assert sizes == [512, 512, 1024, 2048, 8192, 32768, 65536]
    characters = [chr(0x4E00 + i) for i in range(900)]  # as in 0.12 MB of Japanese
    assert vocab_size_for(120_000, ["".join(characters * 2)]) == 2048
    assert vocab_size_for(120_000, ["".join(characters)]) == 512  # no character occurs twice
    assert vocab_size_for(10**6, SCRIPTS.values()) == 1024


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_stock_class_gives_the_same_ids(family, kind, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ours.save(tmp_path, context_length=77)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (stock.eos_token_id, stock.pad_token_id, stock.model_max_length) == (0, 1, 77)
    for text in [*SCRIPTS.values(), " a , b . ' c n't", "x"]:
        ids = ours.encode(text)
        assert stock.encode(text) == ids
        if ours.unk_id not in ids:
            assert stock.decode(ids) == ours.decode(ids) == text
    again = Tokenizer.open(tmp_path)
    assert again.encode(SCRIPTS["Thai"]) == ours.encode(SCRIPTS["Thai"]) and again.kind == kind
    assert Tokenizer.open(tmp_path / "tokenizer.json").vocab_size == ours.vocab_size


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_stock_class_applies_the_templates(family, kind, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(kind)
    before = ours.backend.to_str(), dict(ours.config), ours.vocab_size
    extended = ours.with_special_tokens(SPECIAL_TOKENS, single=SINGLE, pair=PAIR)
    assert (ours.backend.to_str(), ours.config, ours.vocab_size) == before and START_TOKEN not in ours.special_tokens
    start, delimiter, extract = range(ours.vocab_size, ours.vocab_size + 3)
    assert (
        extended.convert_tokens_to_ids(SPECIAL_TOKENS) == [start, delimiter, extract]
        and extended.vocab_size == ours.vocab_size + 3
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    extended.save(tmp_path)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*SCRIPTS.values(), "", " a , b . ' c n't", "x"]
    for a, b in zip(texts, reversed(texts), strict=True):
        assert set(stock(a)) == {"input_ids", "attention_mask"}  # GPT-2 would embed token type ids
        assert stock(a)["input_ids"] == [start, *ours.encode(a), extract]
        if b:  # transformers ignores an empty second text
            assert stock(a, b)["input_ids"] == [start, *ours.encode(a), delimiter, *ours.encode(b), extract]
        assert stock.decode(stock(a)["input_ids"], skip_special_tokens=True) == ours.decode(ours.encode(a))
    for again in (extended, Tokenizer.open(tmp_path)):
        assert (again.kind, again.pad_id, again.unk_id, again.bos_id) == (kind, ours.pad_id, ours.unk_id, None)
        assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
        assert again.decode([start, *ours.encode("a"), extract, ours.pad_id]) == "a"
        assert again.special_tokens == ours.special_tokens | dict(
            zip(SPECIAL_TOKENS, [start, delimiter, extract], strict=True)
        )


@settings(max_examples=100)
@given(
    st.lists(st.one_of(st.text(max_size=5), st.sampled_from([*SPECIAL_TOKENS, *LOOKALIKES])), max_size=5).map("".join)
)
def test_text_never_becomes_an_added_special_token(bpe, char, text):
    for tokenizer in (bpe, char):
        extended = tokenizer.with_special_tokens(SPECIAL_TOKENS, single=SINGLE, pair=PAIR)
        assert extended.encode(text) == tokenizer.encode(text)
        assert extended.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


def test_the_first_token_of_a_template_is_not_the_bos_token(bpe):
    assert bpe.with_special_tokens(SPECIAL_TOKENS, single=[START_TOKEN, "A", DELIMITER_TOKEN]).bos_id is None
    ended = bpe.with_special_tokens([], single=["A", EOS_TOKEN])  # the first id of an empty text is not the BOS
    assert ended.config["bos_token"] == EOS_TOKEN and ended.bos_id is None
    assert bpe.with_special_tokens([], single=[EOS_TOKEN, "A"]).bos_id == bpe.eos_id
    assert bpe.with_special_tokens(SPECIAL_TOKENS).backend.encode("a").ids == bpe.encode(
        "a"
    )  # without a template nothing changes
    assert bpe.with_special_tokens(SPECIAL_TOKENS, pair=PAIR).backend.encode("a").ids == bpe.encode("a")
    with pytest.raises(UsageError, match=r"names <\|extract\|>, which"):
        bpe.with_special_tokens([START_TOKEN], single=SINGLE)
    for wrong in (["A", "A"], [START_TOKEN], ["A", "B"]):
        with pytest.raises(UsageError, match="once"):
            bpe.with_special_tokens(SPECIAL_TOKENS, single=wrong)
    with pytest.raises(UsageError, match="once"):
        bpe.with_special_tokens(SPECIAL_TOKENS, pair=SINGLE)


def test_existing_special_tokens_keep_their_ids(bpe):
    extended = bpe.with_special_tokens(SPECIAL_TOKENS, single=SINGLE)
    more = extended.with_special_tokens([EXTRACT_TOKEN, END_OF_TURN_TOKEN, END_OF_TURN_TOKEN])
    assert (
        more.convert_tokens_to_ids(SPECIAL_TOKENS) == extended.convert_tokens_to_ids(SPECIAL_TOKENS)
        and more.vocab_size == extended.vocab_size + 1
    )
    assert more.backend.encode("a").ids == extended.backend.encode("a").ids
    assert more.eos_ids == {0, more.vocab_size - 1} and extended.eos_ids == {0}


def test_the_pad_token_is_neither_the_eos_nor_another_special_token(tmp_path, small_bpe):
    backend = small_bpe.backend
    for config in ({}, {"pad_token": EOS_TOKEN}, {"pad_token": {"content": PAD_TOKEN}}, {"pad_token": EXTRACT_TOKEN}):
        extended = Tokenizer(backend, {"eos_token": EOS_TOKEN, **config}).with_special_tokens(SPECIAL_TOKENS)
        extended.save(tmp_path)
        again = Tokenizer.open(tmp_path)
        assert again.pad_id == extended.pad_id == extended.convert_tokens_to_ids([PAD_TOKEN])[0]
        assert again.pad_id not in (again.eos_id, *again.convert_tokens_to_ids(SPECIAL_TOKENS))
    without = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    extended = Tokenizer(without, {}).with_special_tokens(SPECIAL_TOKENS)
    assert (extended.vocab_size, extended.pad_id) == (6, 5)


def test_a_vocabulary_with_gaps_cannot_be_extended():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 9}, unk_token="a"))
    with pytest.raises(NextwordError, match="gaps"):
        Tokenizer(backend, {}).with_special_tokens(SPECIAL_TOKENS)


@pytest.mark.parametrize("eos_token_id", [7, [7], [0, 7], None, [10**9, 7]])
def test_eos_ids_are_read_from_the_generation_config(bpe, eos_token_id, tmp_path):
    bpe.save(tmp_path)
    assert Tokenizer.open(tmp_path).eos_ids == {0}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id, "do_sample": True}))
    opened = Tokenizer.open(tmp_path)
    ids = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    assert opened.eos_ids == {0, *ids}
    assert opened.with_special_tokens([END_OF_TURN_TOKEN]).eos_ids == {*opened.eos_ids, bpe.vocab_size}


@pytest.mark.parametrize("content", ['"x"', "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "{"])
def test_a_malformed_generation_config_is_refused(bpe, content, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CorruptFileError, match="generation_config"):
        Tokenizer.open(tmp_path)


def test_a_foreign_tokenizer_keeps_its_configuration(tmp_path):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁ab</s>")]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "unk_token": "<unk>", "x": 1}')
    foreign = Tokenizer.open(tmp_path)
    assert (foreign.kind, foreign.eos_id, foreign.pad_id, foreign.unk_id) == ("foreign", 2, None, 0)
    assert len(foreign.encode("ab ab ab ab")) > 4  # the file's truncation is disabled
    assert foreign.decode(foreign.encode("ab ba")) == "ab ba"
    assert {1, 2}.isdisjoint(foreign.encode("a</s>b"))
    assert {1, 2}.isdisjoint(foreign.encode_batch(["a</s>b"])[0].tolist())
    foreign.save(tmp_path / ".." / tmp_path.name)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["x"] == 1


KNOWN = "<ab é▁"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def spelling(name: str) -> Tokenizer:
    """A tokenizer that knows the characters of `KNOWN`, a token each, and handles others by its own rule."""
    vocabulary = {token: id for id, token in enumerate(["<unk>", "</s>", *KNOWN])}
    unigram = [("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in KNOWN)]
    bytes_and_end = {token: id for id, token in enumerate(["</s>", *BYTE_CHARS])}
    model = {
        "word pieces": lambda: models.WordPiece(
            vocabulary | {f"##{c}": 20 + i for i, c in enumerate(KNOWN)}, unk_token="<unk>"
        ),
        "a unigram model": lambda: models.Unigram(unigram, unk_id=0, byte_fallback=False),
        "unknown tokens": lambda: models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True),
        "characters": lambda: models.WordLevel(vocabulary, unk_token="<unk>"),
    }.get(name, lambda: models.BPE(bytes_and_end if name.startswith("bytes") else vocabulary, []))()
    backend = tokenizers.Tokenizer(model)
    if name.startswith("bytes"):
        split = pre_tokenizers.Split(
            tokenizers.Regex("[^a-zé ]"), "removed" if name == "bytes, some removed" else "isolated"
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, BYTE_LEVEL])
        backend.decoder = decoders.ByteLevel()
    elif name == "spaces dropped":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def expected_loss(name: str, text: str) -> str:
    if name == "bytes":
        return ""
    known = set("abcdefghijklmnopqrstuvwxyzé " if name == "bytes, some removed" else KNOWN)
    is_known = [c in known and not (name == "spaces dropped" and c == " ") for c in text]
    # A decoder puts the space before a word back; a character tokenizer has none to put back.
    before_known = [
        c == " " and known and name != "characters" for c, known in zip(text, [*is_known, False][1:], strict=True)
    ]
    kept = [a or b for a, b in zip(is_known, before_known, strict=True)]
    return "".join(c for c, keep in zip(text, kept, strict=True) if not keep)


@pytest.mark.parametrize(
    "name",
    [
        "dropped",
        "unknown tokens",
        "a unigram model",
        "word pieces",
        "characters",
        "spaces dropped",
        "bytes",
        "bytes, some removed",
    ],
)
@settings(max_examples=60)
@given(texts=st.lists(st.text("ab é<\nxжз😀0 ", max_size=12), max_size=4))
def test_lost_text_is_what_no_token_stands_for(name, texts):
    tokenizer = SPELLINGS.setdefault(name, spelling(name))
    assert tokenizer.lost_text(texts) == [expected_loss(name, text) for text in texts]


SPELLINGS: dict[str, Tokenizer] = {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_our_own_bytes_lose_nothing(bpe, script):
    assert bpe.lost_text([SCRIPTS[script], "\ud800"]) == ["", ""]


def test_the_bos_token_of_a_stock_file_is_detected(tmp_path):
    backend = train_bpe(["abc"], 300).backend
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    begin = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    opened = Tokenizer.open(tmp_path)
    assert opened.bos_id == begin and begin not in opened.encode("<s>abc")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\xff"])
def test_a_malformed_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)


def test_unusable_tokenizers_are_refused(tmp_path):
    with pytest.raises(NextwordError, match="no such file"):
        Tokenizer.open(tmp_path)
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NextwordError, match="eos_token"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CorruptFileError, match="tokenizer_config"):
        Tokenizer.open(tmp_path)


def test_tokens_are_cut_at_characters(bpe):
    ids = bpe.encode("a\U0001f9a6")  # an emoji that no merge knows: a token for each byte
    assert len(ids) > 2 and bpe.whole_characters(ids) == ids
    for length in range(1, len(ids)):
        assert bpe.whole_characters(ids[:length]) == ids[:1]
    assert bpe.whole_characters([]) == [] and bpe.whole_characters(ids[1:2]) == []
