"""Text to token ids and back: a byte-level BPE trained on the reader's own text, one token a character, or a stock
file.

A tokenizer is one `tokenizer.json` of the `tokenizers` library, so that whatever opens stock directories opens ours.
Three promises go beyond it. Text never becomes a special token, whatever it looks like: markers are put in by id, by
the code that means them. A BPE is lossless on every byte string, valid UTF-8 or not. And training is a function of
the texts alone.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import atomic_write, read_json, to_json
from nextword.data.decoding import replace_surrogates

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"  # character level only: a BPE over bytes knows every text
# What a task adds: where its input begins, what parts two texts, where its answer is read off (Radford et al. 2018,
# section 3.3, their <s>, $ and <e>), and where a turn of a conversation ends.
START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN = "<|start|>", "<|delimiter|>", "<|extract|>"
END_OF_TURN_TOKEN = "<|end|>"

# What a word is. A combining mark stays with its letter (\p{M}), so that Indic, Arabic and Thai words are not cut at
# their vowel signs; a digit stands alone. llama.cpp knows this expression by the name of "qwen35".
PRETOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Training holds about 125 bytes for each byte of distinct words: little for a language that parts its words by spaces,
# but the whole text for one that does not. So both are bounded, the text (in characters) and its distinct words (in bytes).
MAX_SAMPLE_CHARS = 2**26
MAX_SAMPLE_WORD_BYTES = 2**22
HASH_RANGE = 2**64

# Ids that a foreign vocabulary may leave out, beside as many as it has.
MAX_ID_GAPS = 2**16
MAX_FILE_BYTES = 2**28  # of a foreign tokenizer's file; those of the largest vocabularies have an eighth of it

# Of a tokenizer_config.json, what would be said twice or wrongly once markers are added to its tokenizer.json.
STALE_CONFIG_KEYS = ("add_bos_token", "add_eos_token", "added_tokens_decoder")

COMMON_EOS_TOKENS = (EOS_TOKEN, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")

# `tokenizers` warns on standard error in a forked child unless this is set, and threads do not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """A tokenizer that is ready to use. Made by `train_bpe`, `train_char` or `Tokenizer.open`.

    `kind` is "bpe" (byte-level, lossless on bytes), "char" (one token a character) or "foreign" (anything else that a
    stock `tokenizer.json` can be). `end_of_text` is the id that follows a document; `pad`, `unknown` and
    `begin_of_text` are ids, or None where the tokenizer has none (`begin_of_text` is what the tokenizer itself would
    put before a text). `markers` gives the id of every special token by its name; no text is encoded as one. `ends`
    are the ids at which a text that is being written is finished: the end of a text and that of a turn, and what
    `generation_config.json` names besides.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], ends: Iterable[int] = ()):
        """`backend` is the library's object, `config` what `tokenizer_config.json` holds, `ends` ids that end a text
        besides the end-of-text token; raises `NextwordError` where neither names an end-of-text token."""
        backend.no_truncation()  # a stock file may ask for both, and either would change the text in silence
        backend.no_padding()
        self.backend, self.config = backend, config
        self.bos_id = self._detect_bos_id()
        backend.encode_special_tokens = True  # text is text; the file does not remember this, so it is set here
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary) + MAX_ID_GAPS:  # a table is made of it, and a file may name any number
            raise CorruptFileError(f"an id of {self.vocab_size - 1:,} in a vocabulary of {len(vocabulary):,} tokens")
        eos_token = self._token_for_role("eos_token") or next(
            (name for name in COMMON_EOS_TOKENS if name in vocabulary), None
        )
        if eos_token is None:
            raise NextwordError(
                "no end-of-text token is known, so documents cannot be told apart: "
                'name one of the vocabulary in tokenizer_config.json, as in {"eos_token": "</s>"}'
            )
        self.eos_id = vocabulary[eos_token]
        pad, unknown = self._token_for_role("pad_token"), self._token_for_role("unk_token")
        self.pad_id = None if pad is None else vocabulary[pad]
        self.unk_id = None if unknown is None else vocabulary[unknown]
        added = backend.get_added_tokens_decoder()
        markers = {token.content: id for id, token in added.items() if token.special and id != self.unk_id}
        markers[eos_token] = self.eos_id
        self.special_tokens, self._special_ids = markers, frozenset(markers.values())
        self.eos_ids = frozenset({self.eos_id, markers.get(END_OF_TURN_TOKEN, self.eos_id), *ends})
        self.kind, self._bytes_by_id = _detect_kind_and_bytes(backend, vocabulary, {t.content for t in added.values()})

    def _token_for_role(self, role: str) -> str | None:
        """The token that the configuration gives a role, where the vocabulary has it."""
        token = self.config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) and self.backend.token_to_id(token) is not None else None

    def _detect_bos_id(self) -> int | None:
        # Before a letter rather than alone: what stands first of no text may be the token that is put after a text.
        begin, first = self._token_for_role("bos_token"), self.backend.encode("a").ids[:1]
        return first[0] if begin is not None and first == [self.backend.token_to_id(begin)] else None

    def with_special_tokens(
        self, names: Sequence[str], *, single: Sequence[str] | None = None, pair: Sequence[str] | None = None
    ) -> "Tokenizer":
        """A copy with the special tokens `names` at the end of its vocabulary; those that are there keep their ids.

        `single` and `pair` are what the stock class makes of one text and of two, as names of markers with "A" and "B"
        for the texts: `["<|start|>", "A", "<|extract|>"]`. They go into `tokenizer.json` and take the place of what the
        tokenizer put around a text before; where only one is given, the other is the bare texts. `encode` leaves all of
        them out, as ever. A tokenizer without a pad token of its own (none, the end of text, or one of `names`) is
        given one. Where a foreign vocabulary has gaps that would take a marker's id, that is a `NextwordError`.
        """
        config = {key: value for key, value in self.config.items() if key not in STALE_CONFIG_KEYS}
        # Stock classes of one family build their own processing from their own settings; this one takes the file's.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        wanted = list(dict.fromkeys(names))
        if self.pad_id is None or self.pad_id == self.eos_id or self._token_for_role("pad_token") in wanted:
            wanted.append(PAD_TOKEN)
            config["pad_token"] = PAD_TOKEN
        backend = tokenizers.Tokenizer.from_str(_normalize_added_tokens(self.backend.to_str(), wanted))
        new = [name for name in wanted if backend.token_to_id(name) is None]
        backend.add_special_tokens(wanted)
        if [backend.token_to_id(name) for name in new] != list(range(self.vocab_size, self.vocab_size + len(new))):
            raise NextwordError("the tokenizer's ids have gaps, so that no marker can be added: use another tokenizer")
        if single is not None or pair is not None:
            backend.post_processor = _template_processor(backend, single or ["A"], pair or ["A", "B"])
        return Tokenizer(backend, config, self.eos_ids)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text; never a special token's.

        Of bytes, the valid UTF-8 is encoded as text and every other byte as its own token; a tokenizer that is not
        byte-level takes such bytes, and half surrogates of a `str`, as U+FFFD.
        """
        if isinstance(text, str):
            return self._avoid_special_ids(text, self._encode_text(replace_surrogates(text)))
        parts = re.split("([\udc80-\udcff]+)", text.decode("utf-8", "surrogateescape"))
        if self.kind != "bpe":
            return self.encode("".join("\ufffd" * len(part) if i % 2 else part for i, part in enumerate(parts)))
        ids: list[int] = []
        for i, part in enumerate(parts):  # odd parts are the bytes that are no UTF-8
            raw = part.encode("utf-8", "surrogateescape") if i % 2 else b""
            ids += self.convert_tokens_to_ids([BYTE_CHARS[byte] for byte in raw]) if i % 2 else self.encode(part)
        return ids

    @functools.cached_property
    def mid_text(self) -> "Tokenizer":
        """The tokenizer to encode a text with that stands after a marker in a longer one; nearly always this one.

        Some stock files put a space before the first word of a whole text alone, and so not there.
        """
        content = json.loads(self.backend.to_str()) if self.kind == "foreign" else {}
        words = json.dumps(content.get("pre_tokenizer"))
        if '"prepend_scheme": "first"' not in words:
            return self
        content["pre_tokenizer"] = json.loads(words.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), self.config, self.eos_ids)

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of tokens given by name, markers included. Raises `NextwordError` naming one that there is not."""
        ids: list[int] = []
        for token in tokens:
            id = self.backend.token_to_id(token)
            if id is None:
                raise NextwordError(f"the tokenizer has no token {token!r}")
            ids.append(id)
        return ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The same ids as `encode` gives, for many texts at once on all cores; one uint32 array [T] a text."""
        encodings = self.backend.encode_batch_fast([replace_surrogates(t) for t in texts], add_special_tokens=False)
        return [
            np.array(self._avoid_special_ids(text, encoding.ids), dtype=np.uint32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _encode_text(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _avoid_special_ids(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, or where a foreign model (Unigram) made a marker of plain text, those with the marker cut in two."""
        if self._special_ids.isdisjoint(ids):
            return ids
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, self.special_tokens)), text)]
        if len(text) < 2 or not cuts:
            raise NextwordError(f"the tokenizer can write {text[:40]!r} only as a special token: use another tokenizer")
        borders = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [id for start, end in borders for id in self.encode(text[start:end])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids [T], special tokens left out. Bytes that make no character come out as U+FFFD."""
        if self._bytes_by_id is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids [T], special tokens left out; of a foreign tokenizer, its text in UTF-8."""
        if self._bytes_by_id is None:
            return self.decode(ids).encode()
        content, size = (
            self._bytes_by_id,
            len(self._bytes_by_id),
        )  # a model's vocabulary may be padded past the tokenizer's
        return b"".join(content[id] for id in ids if id < size)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text that goes on with it; none for a special token."""
        if self._bytes_by_id is not None:
            return self.decode_bytes([id])
        name = self.backend.id_to_token(id) or ""
        if id in self._special_ids or not name:
            return b""
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # a byte, as SentencePiece spells what it has no piece for
            return bytes.fromhex(name[3:5])
        # After a letter, since a decoder may drop the space of a first word.
        anchor = self._encode_text("a")[-1:]
        return self.decode([*anchor, id])[len(self.decode(anchor)) :].encode()

    def save(self, directory: Path, context_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers.AutoTokenizer` opens them."""
        config = dict(self.config)
        if context_length is not None:
            config["model_max_length"] = context_length
        atomic_write(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        atomic_write(directory / "tokenizer_config.json", to_json(config))

    @classmethod
    def open(cls, path: Path) -> "Tokenizer":
        """Open a `tokenizer.json`, or the directory that holds one.

        A `generation_config.json` beside it says which ids end a text. Raises `NextwordError` where there is no
        tokenizer or it names no end-of-text token, `CorruptFile` where a file is malformed.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise NextwordError(f"{file}: no such file. Name a tokenizer.json, or a directory that holds one")
        config_file = file.with_name("tokenizer_config.json")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise CorruptFileError(
                f"{file}: {file.stat().st_size:,} bytes, where no file of this kind needs {MAX_FILE_BYTES:,}"
            )
        config = read_json(config_file, MAX_FILE_BYTES) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise CorruptFileError(f"{config_file}: not a JSON object")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise CorruptFileError(f"{file}: not a tokenizer that the tokenizers library can open ({error})") from error
        ends = _read_eos_ids(file.with_name("generation_config.json"))
        try:
            return cls(backend, config, ends)
        except NextwordError as error:
            raise type(error)(f"{file}: {error}") from error


def _read_eos_ids(file: Path) -> list[int]:
    """The ids that a `generation_config.json` ends a text at; none where there is no such file."""
    config = read_json(file, MAX_FILE_BYTES) if file.is_file() else {}
    ends = config.get("eos_token_id") if isinstance(config, dict) else config
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not isinstance(config, dict) or not all(type(end) is int for end in ends):
        raise CorruptFileError(f"{file}: eos_token_id is neither a token's id nor a list of them")
    return ends


def _normalize_added_tokens(tokenizer_json: str, names: Sequence[str]) -> str:
    """A `tokenizer.json` in which those of its added tokens that are named are special and swallow no space around them.

    A token that is added and not special would be found in text.
    """
    content = json.loads(tokenizer_json)
    flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    content["added_tokens"] = [t | flags if t["content"] in names else t for t in content["added_tokens"]]
    return json.dumps(content, ensure_ascii=False)


def _template_processor(
    backend: tokenizers.Tokenizer, single: Sequence[str], pair: Sequence[str]
) -> processors.TemplateProcessing:
    """The post-processor that puts tokens around one text and around two."""
    names = [name for name in dict.fromkeys([*single, *pair]) if name not in ("A", "B")]
    ids = {name: backend.token_to_id(name) for name in names}
    if missing := [name for name, id in ids.items() if id is None]:
        raise UsageError(f"the template names {missing[0]}, which the tokenizer does not have: add it as a marker")
    if list(single).count("A") != 1 or "B" in single or sorted(n for n in pair if n in ("A", "B")) != ["A", "B"]:
        raise UsageError('a template has the text "A" once, and one of two texts "A" and "B" once each')
    return processors.TemplateProcessing(
        single=[f"${name}" if name == "A" else name for name in single],
        pair=[f"${name}" if name in ("A", "B") else name for name in pair],
        special_tokens=list(ids.items()),
    )


def _bytes_to_unicode() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it prints, else one past U+00FF."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


BYTE_CHARS = _bytes_to_unicode()


def _detect_kind_and_bytes(
    backend: tokenizers.Tokenizer, vocabulary: dict[str, int], added: set[str]
) -> tuple[str, list[bytes] | None]:
    """What kind of tokenizer this is and, for our two kinds, the bytes of every id (specials: none)."""
    regular = {token: id for token, id in vocabulary.items() if token not in added}
    specials = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    bytes_by_id = [b""] * (max(vocabulary.values()) + 1)
    for token in added - specials:
        bytes_by_id[vocabulary[token]] = token.encode()
    if isinstance(backend.decoder, decoders.ByteLevel) and regular.keys() >= set(BYTE_CHARS):
        byte_of = {character: byte for byte, character in enumerate(BYTE_CHARS)}
        for token, id in regular.items():
            bytes_by_id[id] = bytes(byte_of[c] for c in token) if set(token) <= byte_of.keys() else token.encode()
        return "bpe", bytes_by_id
    if isinstance(backend.model, models.WordLevel) and all(len(token) == 1 for token in regular):
        for token, id in regular.items():
            bytes_by_id[id] = token.encode()
        if UNK_TOKEN in vocabulary:
            bytes_by_id[vocabulary[UNK_TOKEN]] = "\ufffd".encode()  # seen, rather than left out
        return "char", bytes_by_id
    return "foreign", None


def _tokenizer_config(has_unk: bool) -> dict[str, Any]:
    """`tokenizer_config.json` of a new tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        **({"unk_token": UNK_TOKEN} if has_unk else {}),
        "clean_up_tokenization_spaces": False,
    }


def vocab_size_for(corpus_bytes: int) -> int:
    """The vocabulary that suits so many bytes of text: a power of two in [512, 65536].

    The number of distinct words grows about with the square root of a text (Heaps' law), and a token must be seen
    often to be learned; twice the square root, rounded down, gives 2,048 for 1 MB and 8,192 for 36 MB. Powers of two
    suit the hardware, and 65,536 is the most that two bytes an id can hold.
    """
    return min(65536, max(512, 2 ** int(math.log2(max(1, 2 * math.isqrt(corpus_bytes))))))


def check_vocab_size(vocab_size: int) -> None:
    """Raises `UsageError` for a size that cannot hold the 256 bytes and the two markers."""
    if vocab_size < 258:
        raise UsageError(f"a byte-level vocabulary has at least 258 tokens (256 bytes and 2 markers), not {vocab_size}")


def train_bpe(texts: Iterable[str], vocab_size: int, progress: Callable[[int], None] | None = None) -> Tokenizer:
    """Train a byte-level BPE. The same texts give the same `tokenizer.json`, byte for byte.

    Of more text than `SAMPLE` allows, pieces spread over the whole are used; each of `texts` should be one piece of a
    document, not all of it. A small text has fewer merges to give than were asked for: `Tokenizer.vocab_size` is the real
    size. `progress` is called with the characters read so far. Raises `UsageError` for a size that cannot hold the 256
    bytes and the two markers.
    """
    check_vocab_size(vocab_size)
    return train_bpe_from_sample(_sample_texts(texts, progress or (lambda done: None)), vocab_size)


def train_bpe_from_sample(texts: list[str], vocab_size: int) -> Tokenizer:
    """The BPE of texts that are a sample already."""
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=BYTE_CHARS,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, _tokenizer_config(has_unk=False))


def _sample_texts(texts: Iterable[str], progress: Callable[[int], None]) -> list[str]:
    """All texts, or as many as `SAMPLE` and `SAMPLE_WORDS` allow, spread over the whole."""
    done = 0

    def numbered() -> Iterator[tuple[int, str]]:
        nonlocal done
        for place, text in enumerate(texts):
            done += len(text)
            progress(done)
            yield sample_key(place), text

    return [text for _, text in hash_sample(numbered(), HASH_RANGE)[0]]


def sample_key(index: int) -> int:
    """The number below `DRAWS` that a text draws by its place: a hash, so that nothing is left to chance."""
    return int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=8).digest(), "big")


def hash_sample(texts: Iterable[tuple[int, str]], limit: int) -> tuple[list[tuple[int, str]], int]:
    """Of texts with their numbers, those below a limit, which is halved until they are as few as `SAMPLE` and
    `SAMPLE_WORDS` allow; and that limit.

    The limit only depends on which texts there are. So what is drawn of several parts, from the least of their limits on,
    is what is drawn of the whole.
    """
    sampled: list[tuple[int, str]] = []
    size, words, words_size = 0, set[str](), 0
    for number, text in texts:
        new = [(number, replace_surrogates(text))] if number < limit else []
        while new:
            sampled += new
            for _, text in new:
                size += len(text)
                new_words = set(text.split()) - words
                words |= new_words
                words_size += sum(len(word.encode()) for word in new_words)
            if size <= MAX_SAMPLE_CHARS and words_size <= MAX_SAMPLE_WORD_BYTES:
                break
            limit //= 2
            new = [item for item in sampled if item[0] < limit]
            sampled, size, words, words_size = [], 0, set(), 0
    return sampled, limit


def train_char(texts: Iterable[str]) -> Tokenizer:
    """One token for each character that the texts hold, in the order of their code points; any other is `<|unk|>`."""
    characters: set[str] = set()
    for text in texts:
        characters.update(replace_surrogates(text))
    names = [EOS_TOKEN, PAD_TOKEN, UNK_TOKEN, *sorted(characters)]
    backend = tokenizers.Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS_TOKEN, PAD_TOKEN, UNK_TOKEN])
    return Tokenizer(backend, _tokenizer_config(has_unk=True))
