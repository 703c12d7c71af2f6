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

from nextword.common.errors import CorruptFile, NextwordError, UsageError
from nextword.common.fs import read_json, to_json, write_durably
from nextword.data.decoding import without_surrogates

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<|unk|>"  # character level only: a BPE over bytes knows every text
# What a task adds: where its input begins, what parts two texts, where its answer is read off (Radford et al. 2018,
# section 3.3, their <s>, $ and <e>), and where a turn of a conversation ends.
START, DELIMITER, EXTRACT = "<|start|>", "<|delimiter|>", "<|extract|>"
END_OF_TURN = "<|end|>"

# What a word is. A combining mark stays with its letter (\p{M}), so that Indic, Arabic and Thai words are not cut at
# their vowel signs; a digit stands alone. llama.cpp knows this expression by the name of "qwen35".
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Training holds about 125 bytes for each byte of distinct words: little for a language that parts its words by spaces,
# but the whole text for one that does not. So both are bounded, the text (in characters) and its distinct words (in bytes).
SAMPLE = 2**26
SAMPLE_WORDS = 2**22
DRAWS = 2**64

# Ids that a foreign vocabulary may leave out, beside as many as it has.
GAPS = 2**16
MOST_BYTES = 2**28  # of a foreign tokenizer's file; those of the largest vocabularies have an eighth of it

# Of a tokenizer_config.json, what would be said twice or wrongly once markers are added to its tokenizer.json.
STALE = ("add_bos_token", "add_eos_token", "added_tokens_decoder")

KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")

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
        self.begin_of_text = self._begin()
        backend.encode_special_tokens = True  # text is text; the file does not remember this, so it is set here
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary) + GAPS:  # a table is made of it, and a file may name any number
            raise CorruptFile(f"an id of {self.vocab_size - 1:,} in a vocabulary of {len(vocabulary):,} tokens")
        end = self._named("eos_token") or next((name for name in KNOWN_ENDS if name in vocabulary), None)
        if end is None:
            raise NextwordError(
                "no end-of-text token is known, so documents cannot be told apart: "
                'name one of the vocabulary in tokenizer_config.json, as in {"eos_token": "</s>"}'
            )
        self.end_of_text = vocabulary[end]
        pad, unknown = self._named("pad_token"), self._named("unk_token")
        self.pad = None if pad is None else vocabulary[pad]
        self.unknown = None if unknown is None else vocabulary[unknown]
        added = backend.get_added_tokens_decoder()
        markers = {token.content: id for id, token in added.items() if token.special and id != self.unknown}
        markers[end] = self.end_of_text
        self.markers, self._marker_ids = markers, frozenset(markers.values())
        self.ends = frozenset({self.end_of_text, markers.get(END_OF_TURN, self.end_of_text), *ends})
        self.kind, self._content = _kind_and_content(backend, vocabulary, {t.content for t in added.values()})

    def _named(self, role: str) -> str | None:
        """The token that the configuration gives a role, where the vocabulary has it."""
        token = self.config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) and self.backend.token_to_id(token) is not None else None

    def _begin(self) -> int | None:
        # Before a letter rather than alone: what stands first of no text may be the token that is put after a text.
        begin, first = self._named("bos_token"), self.backend.encode("a").ids[:1]
        return first[0] if begin is not None and first == [self.backend.token_to_id(begin)] else None

    def with_markers(
        self, names: Sequence[str], *, single: Sequence[str] | None = None, pair: Sequence[str] | None = None
    ) -> "Tokenizer":
        """A copy with the special tokens `names` at the end of its vocabulary; those that are there keep their ids.

        `single` and `pair` are what the stock class makes of one text and of two, as names of markers with "A" and "B"
        for the texts: `["<|start|>", "A", "<|extract|>"]`. They go into `tokenizer.json` and take the place of what the
        tokenizer put around a text before; where only one is given, the other is the bare texts. `encode` leaves all of
        them out, as ever. A tokenizer without a pad token of its own (none, the end of text, or one of `names`) is
        given one. Where a foreign vocabulary has gaps that would take a marker's id, that is a `NextwordError`.
        """
        config = {key: value for key, value in self.config.items() if key not in STALE}
        # Stock classes of one family build their own processing from their own settings; this one takes the file's.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        wanted = list(dict.fromkeys(names))
        if self.pad is None or self.pad == self.end_of_text or self._named("pad_token") in wanted:
            wanted.append(PAD)
            config["pad_token"] = PAD
        backend = tokenizers.Tokenizer.from_str(_without_manners(self.backend.to_str(), wanted))
        new = [name for name in wanted if backend.token_to_id(name) is None]
        backend.add_special_tokens(wanted)
        if [backend.token_to_id(name) for name in new] != list(range(self.vocab_size, self.vocab_size + len(new))):
            raise NextwordError("the tokenizer's ids have gaps, so that no marker can be added: use another tokenizer")
        if single is not None or pair is not None:
            backend.post_processor = _around(backend, single or ["A"], pair or ["A", "B"])
        return Tokenizer(backend, config, self.ends)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text; never a special token's.

        Of bytes, the valid UTF-8 is encoded as text and every other byte as its own token; a tokenizer that is not
        byte-level takes such bytes, and half surrogates of a `str`, as U+FFFD.
        """
        if isinstance(text, str):
            return self._apart_from_markers(text, self._ids(without_surrogates(text)))
        parts = re.split("([\udc80-\udcff]+)", text.decode("utf-8", "surrogateescape"))
        if self.kind != "bpe":
            return self.encode("".join("\ufffd" * len(part) if i % 2 else part for i, part in enumerate(parts)))
        ids: list[int] = []
        for i, part in enumerate(parts):  # odd parts are the bytes that are no UTF-8
            raw = part.encode("utf-8", "surrogateescape") if i % 2 else b""
            ids += self.ids_of([BYTES[byte] for byte in raw]) if i % 2 else self.encode(part)
        return ids

    @functools.cached_property
    def after_marker(self) -> "Tokenizer":
        """The tokenizer to encode a text with that stands after a marker in a longer one; nearly always this one.

        Some stock files put a space before the first word of a whole text alone, and so not there.
        """
        content = json.loads(self.backend.to_str()) if self.kind == "foreign" else {}
        words = json.dumps(content.get("pre_tokenizer"))
        if '"prepend_scheme": "first"' not in words:
            return self
        content["pre_tokenizer"] = json.loads(words.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), self.config, self.ends)

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
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
        encodings = self.backend.encode_batch_fast([without_surrogates(t) for t in texts], add_special_tokens=False)
        return [
            np.array(self._apart_from_markers(text, encoding.ids), dtype=np.uint32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _apart_from_markers(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, or where a foreign model (Unigram) made a marker of plain text, those with the marker cut in two."""
        if self._marker_ids.isdisjoint(ids):
            return ids
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, self.markers)), text)]
        if len(text) < 2 or not cuts:
            raise NextwordError(f"the tokenizer can write {text[:40]!r} only as a special token: use another tokenizer")
        borders = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [id for start, end in borders for id in self.encode(text[start:end])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids [T], special tokens left out. Bytes that make no character come out as U+FFFD."""
        if self._content is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids [T], special tokens left out; of a foreign tokenizer, its text in UTF-8."""
        if self._content is None:
            return self.decode(ids).encode()
        content, size = self._content, len(self._content)  # a model's vocabulary may be padded past the tokenizer's
        return b"".join(content[id] for id in ids if id < size)

    def spelling(self, id: int) -> bytes:
        """The bytes that a token adds to a text that goes on with it; none for a special token."""
        if self._content is not None:
            return self.decode_bytes([id])
        name = self.backend.id_to_token(id) or ""
        if id in self._marker_ids or not name:
            return b""
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # a byte, as SentencePiece spells what it has no piece for
            return bytes.fromhex(name[3:5])
        # After a letter, since a decoder may drop the space of a first word.
        anchor = self._ids("a")[-1:]
        return self.decode([*anchor, id])[len(self.decode(anchor)) :].encode()

    def save(self, directory: Path, context_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers.AutoTokenizer` opens them."""
        config = dict(self.config)
        if context_length is not None:
            config["model_max_length"] = context_length
        write_durably(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        write_durably(directory / "tokenizer_config.json", to_json(config))

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
        if file.stat().st_size > MOST_BYTES:
            raise CorruptFile(f"{file}: {file.stat().st_size:,} bytes, where no file of this kind needs {MOST_BYTES:,}")
        config = read_json(config_file, MOST_BYTES) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise CorruptFile(f"{config_file}: not a JSON object")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise CorruptFile(f"{file}: not a tokenizer that the tokenizers library can open ({error})") from error
        ends = _ends(file.with_name("generation_config.json"))
        try:
            return cls(backend, config, ends)
        except NextwordError as error:
            raise type(error)(f"{file}: {error}") from error


def _ends(file: Path) -> list[int]:
    """The ids that a `generation_config.json` ends a text at; none where there is no such file."""
    config = read_json(file, MOST_BYTES) if file.is_file() else {}
    ends = config.get("eos_token_id") if isinstance(config, dict) else config
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not isinstance(config, dict) or not all(type(end) is int for end in ends):
        raise CorruptFile(f"{file}: eos_token_id is neither a token's id nor a list of them")
    return ends


def _without_manners(file: str, names: Sequence[str]) -> str:
    """A `tokenizer.json` in which those of its added tokens that are named are special and swallow no space around them.

    A token that is added and not special would be found in text.
    """
    content = json.loads(file)
    plain = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    content["added_tokens"] = [t | plain if t["content"] in names else t for t in content["added_tokens"]]
    return json.dumps(content, ensure_ascii=False)


def _around(backend: tokenizers.Tokenizer, single: Sequence[str], pair: Sequence[str]) -> processors.TemplateProcessing:
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


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it prints, else one past U+00FF."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


BYTES = _byte_characters()


def _kind_and_content(
    backend: tokenizers.Tokenizer, vocabulary: dict[str, int], added: set[str]
) -> tuple[str, list[bytes] | None]:
    """What kind of tokenizer this is and, for our two kinds, the bytes of every id (specials: none)."""
    plain = {token: id for token, id in vocabulary.items() if token not in added}
    specials = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    content = [b""] * (max(vocabulary.values()) + 1)
    for token in added - specials:
        content[vocabulary[token]] = token.encode()
    if isinstance(backend.decoder, decoders.ByteLevel) and plain.keys() >= set(BYTES):
        byte_of = {character: byte for byte, character in enumerate(BYTES)}
        for token, id in plain.items():
            content[id] = bytes(byte_of[c] for c in token) if set(token) <= byte_of.keys() else token.encode()
        return "bpe", content
    if isinstance(backend.model, models.WordLevel) and all(len(token) == 1 for token in plain):
        for token, id in plain.items():
            content[id] = token.encode()
        if UNKNOWN in vocabulary:
            content[vocabulary[UNKNOWN]] = "\ufffd".encode()  # seen, rather than left out
        return "char", content
    return "foreign", None


def _config(unknown: bool) -> dict[str, Any]:
    """`tokenizer_config.json` of a new tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        **({"unk_token": UNKNOWN} if unknown else {}),
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
    return train_bpe_on(_sample(texts, progress or (lambda done: None)), vocab_size)


def train_bpe_on(texts: list[str], vocab_size: int) -> Tokenizer:
    """The BPE of texts that are a sample already."""
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=BYTES,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, _config(unknown=False))


def _sample(texts: Iterable[str], progress: Callable[[int], None]) -> list[str]:
    """All texts, or as many as `SAMPLE` and `SAMPLE_WORDS` allow, spread over the whole."""
    done = 0

    def numbered() -> Iterator[tuple[int, str]]:
        nonlocal done
        for place, text in enumerate(texts):
            done += len(text)
            progress(done)
            yield number_of(place), text

    return [text for _, text in drawn(numbered(), DRAWS)[0]]


def number_of(place: int) -> int:
    """The number below `DRAWS` that a text draws by its place: a hash, so that nothing is left to chance."""
    return int.from_bytes(hashlib.blake2b(str(place).encode(), digest_size=8).digest(), "big")


def drawn(texts: Iterable[tuple[int, str]], limit: int) -> tuple[list[tuple[int, str]], int]:
    """Of texts with their numbers, those below a limit, which is halved until they are as few as `SAMPLE` and
    `SAMPLE_WORDS` allow; and that limit.

    The limit only depends on which texts there are. So what is drawn of several parts, from the least of their limits on,
    is what is drawn of the whole.
    """
    kept: list[tuple[int, str]] = []
    size, words, words_size = 0, set[str](), 0
    for number, text in texts:
        new = [(number, without_surrogates(text))] if number < limit else []
        while new:
            kept += new
            for _, text in new:
                size += len(text)
                fresh = set(text.split()) - words
                words |= fresh
                words_size += sum(len(word.encode()) for word in fresh)
            if size <= SAMPLE and words_size <= SAMPLE_WORDS:
                break
            limit //= 2
            new = [item for item in kept if item[0] < limit]
            kept, size, words, words_size = [], 0, set(), 0
    return kept, limit


def train_char(texts: Iterable[str]) -> Tokenizer:
    """One token for each character that the texts hold, in the order of their code points; any other is `<|unk|>`."""
    characters: set[str] = set()
    for text in texts:
        characters.update(without_surrogates(text))
    names = [END_OF_TEXT, PAD, UNKNOWN, *sorted(characters)]
    backend = tokenizers.Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT, PAD, UNKNOWN])
    return Tokenizer(backend, _config(unknown=True))
