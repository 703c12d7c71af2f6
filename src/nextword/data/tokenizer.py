"""Text to token ids and back: a byte-level BPE trained on the user's text, a character tokenizer, or any `tokenizer.json`.

A tokenizer is a `tokenizer.json` of the `tokenizers` library. Three properties go beyond the library. Text never
becomes a special token, whatever it looks like: special tokens are inserted by id. A BPE is lossless on every byte
string, valid UTF-8 or not. Training is a function of the texts alone.
"""

import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nextword.common import fs
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.limited_process import call_in_process
from nextword.data.dataset import TokenArray
from nextword.data.issues import name_source, replace_surrogates

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"  # of a character tokenizer only: a byte-level BPE knows every text
# The tokens of fine-tuning: start, delimiter and extract (<s>, $ and <e> in Radford et al. 2018, section 3.3), and the
# end of a turn.
START_TOKEN, DELIMITER_TOKEN, EXTRACT_TOKEN = "<|start|>", "<|delimiter|>", "<|extract|>"
END_OF_TURN_TOKEN = "<|end|>"

# A combining mark (\p{M}) stays with its letter, so that Indic, Arabic and Thai words are not split at their vowel
# signs; each digit is a token. llama.cpp knows this pattern as "qwen35".
PRETOKENIZE_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Words end at spaces and punctuation only: for a text whose words have signs that are not letters, such as tone letters,
# joiners and apostrophes. llama.cpp knows these patterns, which are applied one after the other, as "viking".
WHOLE_WORD_PATTERNS = (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")
CHARACTER_PATTERN = r"[\s\S]"

# Training takes about 125 bytes of memory for each byte of distinct words: little for a language that separates words
# by spaces, but the whole text for one that does not. Both the text (in characters) and its distinct words (in bytes)
# are bounded.
MAX_SAMPLE_CHARS = 2**26
MAX_SAMPLE_WORD_BYTES = 2**22
MEASURED_CHARACTERS = 2**20  # of the sample, on which tokenizers are compared
MAX_BROKEN_SHARE = 0.02  # of the tokens, from which on a BPE by characters is tried
MIN_SIGN_SHARE = 0.01  # of the characters, from which on whole words are tried
MIN_SAVED_SHARE = 0.02  # of the tokens, from which on whole words are taken
HASH_RANGE = 2**64

MAX_ID_GAPS = 2**16  # ids that a foreign vocabulary may leave out, besides as many as it has
MAX_FILE_BYTES = 2**27  # of a foreign tokenizer.json; those of the largest vocabularies have half of it
MAX_CONFIG_BYTES = 2**23  # of a tokenizer_config.json or generation_config.json
PROBE = Path(__file__).with_name("tokenizer_probe.py")
# Limits of trying out a foreign tokenizer.json. The largest vocabularies take a fifth of the processor time.
PROBE_LIMITS: dict[str, Any] = {"seconds": 20, "memory_bytes": 2**32, "timeout": 120}

# Entries of a tokenizer_config.json that contradict the tokenizer.json once special tokens are added to it.
STALE_CONFIG_KEYS = ("add_bos_token", "add_eos_token", "added_tokens_decoder")

Normalization = Literal["none", "nfc"]  # of the text before it is encoded
FORM_KEY = "text_normalization_form"  # in tokenizer_config.json: the form of the training text, if it has only one

COMMON_EOS_TOKENS = (EOS_TOKEN, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


def _bytes_to_unicode() -> list[str]:
    """The character of each byte in a byte-level vocabulary: itself if it is printable, else one from U+0100 on (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    replacements = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(replacements)) for byte in range(256)]


BYTE_CHARS = _bytes_to_unicode()

# `tokenizers` warns in a forked child unless this is set; its threads do not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """A tokenizer. Made by `train_bpe`, `train_char` or `Tokenizer.open`.

    Args:
        backend: the tokenizer of the `tokenizers` library.
        config: the content of `tokenizer_config.json`.
        eos_ids: ids that end a text, besides the end-of-text token.

    Attributes:
        kind: "bpe" (byte-level, lossless on bytes), "char" (a token for each character) or "foreign" (any other).
        vocab_size: the largest id + 1.
        eos_id: the id of the end-of-text token, which follows every document.
        pad_id, unk_id: ids, or None if the tokenizer has none.
        bos_id: the id that the tokenizer itself puts before a text, or None.
        bos_ids: the same as a sequence of one id or none, to be put before the ids of every text that begins a document.
        eos_ids: the ids at which generation stops: the end of a text, the end of a turn, those of
            `generation_config.json`.
        special_tokens: the ids of all special tokens by name. No text is encoded as one of them.
        normalization: the Unicode normalization that a text gets before it is encoded; "none" for a foreign tokenizer, too.

    Raises:
        NextwordError: there is no end-of-text token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], eos_ids: Iterable[int] = ()):
        backend.no_truncation()  # a foreign file may request both, and either would change the text silently
        backend.no_padding()
        self.backend, self.config = backend, config
        self._vocabulary = vocabulary = backend.get_vocab(with_added_tokens=True)
        # An empty text would not do: its first token may be the one that follows a text.
        bos_token, first_id = self._token_for_role("bos_token"), next(iter(backend.encode("a").ids), None)
        self.bos_id = first_id if bos_token is not None and vocabulary[bos_token] == first_id else None
        self.bos_ids = () if self.bos_id is None else (self.bos_id,)
        backend.encode_special_tokens = True  # encodes special tokens in text as text; the file does not store it
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary) + MAX_ID_GAPS:  # a table of this size is allocated
            raise CorruptFileError(f"an id of {self.vocab_size - 1:,} in a vocabulary of {len(vocabulary):,} tokens")
        eos_token = self._token_for_role("eos_token") or next((t for t in COMMON_EOS_TOKENS if t in vocabulary), None)
        if eos_token is None:
            raise NextwordError(
                "no end-of-text token is known, so documents cannot be separated: "
                'name one of the vocabulary in tokenizer_config.json, as in {"eos_token": "</s>"}'
            )
        pad_token = self._token_for_role("pad_token")
        unk_token = self._token_for_role("unk_token") or _unknown_token(backend)
        self.eos_id = vocabulary[eos_token]
        self.pad_id = None if pad_token is None else vocabulary[pad_token]
        self.unk_id = None if unk_token is None else vocabulary.get(unk_token)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {t.content: id for id, t in added.items() if t.special and id != self.unk_id}
        self.special_tokens[eos_token] = self.eos_id
        self._special_ids = frozenset(self.special_tokens.values())
        end_of_turn_id = self.special_tokens.get(END_OF_TURN_TOKEN, self.eos_id)
        self.eos_ids = frozenset({self.eos_id, end_of_turn_id, *eos_ids})
        self.kind, self._bytes_by_id = _detect_kind_and_bytes(backend, vocabulary)
        is_nfc = self.kind != "foreign" and _is_nfc(backend.normalizer)
        self.normalization: Normalization = "nfc" if is_nfc else "none"
        self._keeps_characters = self.kind != "foreign" and _keeps_all_characters(backend, self.kind)

    def _token_for_role(self, role: str) -> str | None:
        """The token that the configuration gives a role, if the vocabulary has it."""
        token = self.config.get(role)
        token = token.get("content") if fs.is_json_object(token) else token
        return token if isinstance(token, str) and token in self._vocabulary else None

    def with_special_tokens(
        self, tokens: Sequence[str], *, single: Sequence[str] | None = None, pair: Sequence[str] | None = None
    ) -> "Tokenizer":
        """A copy with special tokens at the end of its vocabulary. Tokens that exist keep their ids.

        A tokenizer without a pad token of its own is given one: if it has none, or pads with the end-of-text token or
        one of `tokens`.

        Args:
            tokens: the special tokens.
            single: the template that the transformers class applies to one text, with "A" for the text, as in
                `["<|start|>", "A", "<|extract|>"]`. Written to `tokenizer.json`; `encode` never applies it. Default:
                the text alone if `pair` is given, else the tokenizer's own template.
            pair: the template for two texts, "A" and "B". Default: likewise.

        Raises:
            NextwordError: the ids of a foreign vocabulary have gaps, so that a new token would get an id in between.
            UsageError: a template is malformed.
        """
        config = {key: value for key, value in self.config.items() if key not in STALE_CONFIG_KEYS}
        # The transformers classes of some families build a post-processor from their settings; this one uses the file's.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        tokens = list(dict.fromkeys(tokens))
        if self.pad_id is None or self.pad_id == self.eos_id or self._token_for_role("pad_token") in tokens:
            tokens.append(PAD_TOKEN)
            config["pad_token"] = PAD_TOKEN
        content = json.loads(self.backend.to_str())
        # An added token that is not special would be found in text, and one that strips absorbs the spaces around it.
        flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        content["added_tokens"] = [t | flags if t["content"] in tokens else t for t in content["added_tokens"]]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        new = [token for token in tokens if token not in self._vocabulary]
        backend.add_special_tokens(tokens)  # pyright: ignore[reportUnknownMemberType]  # typed as a bare list
        if [backend.token_to_id(token) for token in new] != list(range(self.vocab_size, self.vocab_size + len(new))):
            raise NextwordError(
                "the tokenizer's ids have gaps, so that no special token can be added: use another tokenizer"
            )
        if single is not None or pair is not None:
            backend.post_processor = _template_processor(backend, single or ["A"], pair or ["A", "B"])
        return Tokenizer(backend, config, self.eos_ids)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, without special tokens.

        In bytes, valid UTF-8 is encoded as text, and every other byte as its own token. A tokenizer that is not
        byte-level encodes such bytes, and lone surrogates of a `str`, as U+FFFD.
        """
        if isinstance(text, str):
            with _map_panics():
                # Other than `encode`, it lets other Python threads run; and it is faster.
                [encoding] = self.backend.encode_batch_fast([replace_surrogates(text)], add_special_tokens=False)
            return self._avoid_special_ids(text, encoding.ids)
        text = text.decode("utf-8", "surrogateescape")  # an invalid byte B becomes U+DC00 + B
        if self.kind != "bpe":
            return self.encode(text)
        ids = list[int]()
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", text)):  # odd parts are invalid bytes
            byte_chars = [BYTE_CHARS[ord(character) - 0xDC00] for character in part] if i % 2 else []
            ids += self.convert_tokens_to_ids(byte_chars) if i % 2 else self.encode(part)
        return ids

    @functools.cached_property
    def mid_text(self) -> "Tokenizer":
        """The tokenizer for a text that follows a special token in a longer one; nearly always this one.

        Some foreign files add a space before the first word of a whole text only, which is wrong there.
        """
        content: dict[str, Any] = json.loads(self.backend.to_str()) if self.kind == "foreign" else {}
        pre_tokenizer = json.dumps(content.get("pre_tokenizer"))
        first, never = '"prepend_scheme": "first"', '"prepend_scheme": "never"'
        if first not in pre_tokenizer:
            return self
        content["pre_tokenizer"] = json.loads(pre_tokenizer.replace(first, never))
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), self.config, self.eos_ids)

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of tokens given by name, special tokens included. Raises `NextwordError` if one does not exist."""
        try:
            return [self._vocabulary[token] for token in tokens]
        except KeyError as error:
            raise NextwordError(f"the tokenizer has no token {error.args[0]!r}") from error

    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        """The ids of many texts, encoded on all cores. The same as `encode`; a uint32 array [T] for each text."""
        with _map_panics():
            encodings = self.backend.encode_batch_fast([replace_surrogates(t) for t in texts], add_special_tokens=False)
        return [
            np.array(self._avoid_special_ids(text, encoding.ids), dtype=np.uint32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def normalize(self, text: str) -> str:
        """The text in the normalization that it gets before it is encoded."""
        return unicodedata.normalize("NFC", text) if self.normalization == "nfc" else text

    def form_message(self, texts: Sequence[str]) -> str:
        """Which Unicode normalization form a model expects, for the user, if some text is in another one; "" if none is."""
        expected = self.config.get(FORM_KEY)
        form = "NFC" if expected == "NFC" else "NFD"
        if expected != form or self.normalization != "none" or all(unicodedata.is_normalized(form, t) for t in texts):
            return ""
        return (
            f"the Unicode normalization form of the text is not that of the training text ({form}), so that characters that "
            f"look alike are different tokens: normalize the text to {form}"
        )

    @functools.cached_property
    def is_broken(self) -> np.ndarray:
        """Whether a token of a byte-level vocabulary is not a sequence of whole characters; a bool array [vocab_size]."""
        broken = np.zeros(self.vocab_size, dtype=bool)
        for id, data in enumerate(self._bytes_by_id or ()):
            try:
                data.decode()
            except UnicodeDecodeError:
                broken[id] = True
        return broken

    def incomplete_end(self, ids: Sequence[int]) -> bytes:
        """The first bytes of a character at the end of tokens of a byte-level vocabulary; b"" with another one."""
        return incomplete_character(self.decode_bytes(ids[-4:])) if self.kind == "bpe" else b""

    def continues_text(self, incomplete: bytes, id: int) -> bool:
        """Whether text goes on with a token of a byte-level vocabulary, after the first bytes of a character."""
        return begins_text(incomplete + self.token_bytes(id)) if self.is_broken[id] else not incomplete

    def continuations(self, incomplete: bytes) -> np.ndarray:
        """Which tokens `continues_text` holds for; a bool array [vocab_size]."""
        mask = np.full(self.vocab_size, not incomplete)
        broken = np.flatnonzero(self.is_broken).tolist()
        mask[broken] = [self.continues_text(incomplete, id) for id in broken]
        return mask

    def lost_text(self, texts: Sequence[str]) -> list[str]:
        """The characters of each text that are dropped when it is encoded, or become part of an unknown token.

        A space before a token counts with the token, since decoders put it back.
        """
        texts = [self.normalize(text) for text in texts]
        if self._keeps_characters:
            known = None if self.kind == "bpe" else self._vocabulary.keys()
            return ["" if known is None or known >= set(t) else "".join(c for c in t if c not in known) for t in texts]
        encodings = self._aligned_backend.encode_batch([replace_surrogates(t) for t in texts], add_special_tokens=False)
        return [self._uncovered_text(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    @functools.cached_property
    def _aligned_backend(self) -> tokenizers.Tokenizer:
        """The backend, with an unknown token: behind a character that a BPE without one drops, offsets are wrong."""
        if not isinstance(self.backend.model, models.BPE) or self.backend.model.unk_token is not None:
            return self.backend
        content = json.loads(self.backend.to_str())
        content["model"]["unk_token"] = name = f"<dropped {self.vocab_size}>"
        content["model"]["vocab"][name] = self.vocab_size
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    def _uncovered_text(self, text: str, encoding: tokenizers.Encoding) -> str:
        unknown = (self.unk_id, self.vocab_size)
        borders = np.zeros(len(text) + 1, dtype=np.int64)  # tokens that begin here, less those that end here
        spans = [span for span, id in zip(encoding.offsets, encoding.ids, strict=True) if id not in unknown]
        for column, change in zip(np.array(spans, dtype=np.int64).reshape(-1, 2).T, (1, -1), strict=True):
            np.add.at(borders, column, change)
        covered = borders.cumsum() > 0
        uncovered = np.flatnonzero(~covered[:-1]).tolist()
        return "".join(text[i] for i in uncovered if text[i] != " " or not covered[i + 1])

    def _avoid_special_ids(self, text: str, ids: list[int]) -> list[int]:
        """The ids, encoded again in parts if a foreign model (Unigram) has made a special token of text."""
        if self._special_ids.isdisjoint(ids):
            return ids
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, self.special_tokens)), text)]
        if len(text) < 2 or not cuts:
            raise NextwordError(
                f"the tokenizer can encode {text[:40]!r} only as a special token: use another tokenizer"
            )
        borders = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [id for start, end in borders for id in self.encode(text[start:end])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids [T], without special tokens. Bytes that are not valid UTF-8 become U+FFFD."""
        if self._bytes_by_id is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids [T], without special tokens; of a foreign tokenizer, its text in UTF-8."""
        if self._bytes_by_id is None:
            return self.decode(ids).encode()
        table, size = self._bytes_by_id, len(self._bytes_by_id)  # a model's vocabulary may be padded beyond it
        return b"".join(table[id] for id in ids if id < size)

    def whole_characters(self, ids: Sequence[int]) -> list[int]:
        """The longest beginning of some tokens that does not end inside a character; empty if none does."""
        for length in range(len(ids), 0, -1):
            if not incomplete_character(self.decode_bytes(ids[:length])):
                return list(ids[:length])
        return []

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token appends to a text; none for a special token."""
        if self._bytes_by_id is not None:
            return self.decode_bytes([id])
        name = self.backend.id_to_token(id) or ""
        if id in self._special_ids or not name:
            return b""
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # a byte token of SentencePiece
            return bytes.fromhex(name[3:5])
        # After a letter, since a decoder may drop the space of a first word.
        anchor = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        return self.decode([*anchor, id])[len(self.decode(anchor)) :].encode()

    def save(self, directory: Path, context_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for `transformers.AutoTokenizer`.

        Args:
            directory: where to.
            context_length: the model's context length, for `model_max_length`.
        """
        config = self.config | ({} if context_length is None else {"model_max_length": context_length})
        fs.atomic_write(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        fs.atomic_write(directory / "tokenizer_config.json", fs.to_json(config))

    @classmethod
    def open(cls, path: Path) -> "Tokenizer":
        """Open a `tokenizer.json`, or a directory that holds one.

        A `generation_config.json` beside it names further ids that end a text.

        Raises:
            NextwordError: there is no such file, or it names no end-of-text token.
            CorruptFileError: a file is malformed.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise NextwordError(f"{file}: no such file. Name a tokenizer.json, or a directory that holds one")
        config_file = file.with_name("tokenizer_config.json")
        config = fs.read_json_object(config_file, MAX_CONFIG_BYTES) if config_file.is_file() else {}
        try:
            text = fs.read_text(file, MAX_FILE_BYTES)
            _probe_foreign_steps(text)
            with _map_panics():
                backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise CorruptFileError(f"{file}: not a tokenizer that the tokenizers library can open ({error})") from error
        eos_ids = _read_eos_ids(file.with_name("generation_config.json"))
        with name_source(file), _map_panics():
            return cls(backend, config, eos_ids)


@contextlib.contextmanager
def _map_panics() -> Generator[None]:
    """Raise `CorruptFileError` for a panic of the `tokenizers` library, which is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CorruptFileError(f"the tokenizers library failed ({error})") from error


def _probe_foreign_steps(text: str) -> None:
    """Try out a tokenizer.json in a limited process if it has a regular expression or replacement that is not nextword's.

    A content that has passed is remembered in the cache directory.

    Raises:
        ValueError: It is not JSON, or it cannot be used.
    """
    content: dict[str, Any] = json.loads(text)
    steps = json.dumps([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    for pattern in (*PRETOKENIZE_PATTERNS, *WHOLE_WORD_PATTERNS, CHARACTER_PATTERN):
        steps = steps.replace(f'"Regex": {json.dumps(pattern)}', "")
    if not re.search('"(Regex|Replace|Precompiled)"', steps):
        return
    name = hashlib.sha256(text.encode()).hexdigest()
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
        if (fs.cache_dir() / "tokenizers" / name).exists():
            return
    try:
        fault: str | None = call_in_process(PROBE, {"text": text}, **PROBE_LIMITS)
    except subprocess.SubprocessError:
        fault = "it takes too much time or memory"
    if fault:
        raise ValueError(fault)
    with contextlib.suppress(OSError, RuntimeError):
        (fs.cache_dir() / "tokenizers").mkdir(parents=True, exist_ok=True, mode=0o700)
        (fs.cache_dir() / "tokenizers" / name).touch()


def _read_eos_ids(file: Path) -> list[int]:
    """The `eos_token_id` of a `generation_config.json`; none if there is no such file."""
    value = fs.read_json_object(file, MAX_CONFIG_BYTES).get("eos_token_id") if file.is_file() else None
    eos_ids = value if fs.is_json_array(value) else [] if value is None else [value]
    if not all(type(id) is int for id in eos_ids):
        raise CorruptFileError(f"{file}: eos_token_id is neither a token's id nor a list of them")
    return eos_ids


def _template_processor(
    backend: tokenizers.Tokenizer, single: Sequence[str], pair: Sequence[str]
) -> processors.TemplateProcessing:
    ids = {name: backend.token_to_id(name) for name in (*single, *pair) if name not in ("A", "B")}
    if missing := [token for token, id in ids.items() if id is None]:
        raise UsageError(f"the template names {missing[0]}, which the tokenizer does not have: add it to the tokens")
    slots = [sorted(name for name in names if name in ("A", "B")) for names in (single, pair)]
    if slots != [["A"], ["A", "B"]]:
        raise UsageError('a template has the text "A" once, and one of two texts "A" and "B" once each')
    single, pair = ([f"${name}" if name in ("A", "B") else name for name in names] for names in (single, pair))
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))


def _detect_kind_and_bytes(backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> tuple[str, list[bytes] | None]:
    """The kind of a tokenizer and, except for "foreign", the bytes of every id (special tokens: none)."""
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    regular = vocabulary.keys() - added.keys()
    is_bpe = isinstance(backend.decoder, decoders.ByteLevel) and regular >= set(BYTE_CHARS)
    if not is_bpe and not (isinstance(backend.model, models.WordLevel) and all(len(token) == 1 for token in regular)):
        return "foreign", None
    bytes_by_char = {character: bytes([byte]) for byte, character in enumerate(BYTE_CHARS)} if is_bpe else {}
    bytes_by_id = [b""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        if token == UNK_TOKEN and not is_bpe:
            bytes_by_id[id] = "\ufffd".encode()  # visible in the text
        elif token not in added and bytes_by_char.keys() >= set(token):
            bytes_by_id[id] = b"".join(bytes_by_char[character] for character in token)
        elif not added.get(token, False):
            bytes_by_id[id] = token.encode()
    return "bpe" if is_bpe else "char", bytes_by_id


def _is_nfc(normalizer: normalizers.Normalizer | None) -> bool:
    """Whether a normalizer does nothing but normalize to NFC."""
    steps = b"" if normalizer is None else normalizer.__getstate__()
    return set(re.findall(rb'"type":"(\w+)"', steps)) - {b"Sequence"} == {b"NFC"}


def _unknown_token(backend: tokenizers.Tokenizer) -> str | None:
    """The token that the model of a `tokenizer.json` has for what it does not know."""
    if isinstance(backend.model, models.Unigram):  # its state is the model in JSON
        unk_id = json.loads(backend.model.__getstate__())["unk_id"]
        return None if unk_id is None else backend.id_to_token(unk_id)
    return getattr(backend.model, "unk_token", None)


def _keeps_all_characters(backend: tokenizers.Tokenizer, kind: str) -> bool:
    """Whether every character reaches the vocabulary of a byte-level or character tokenizer: no other step may drop it."""
    steps = b"".join(step.__getstate__() for step in (backend.normalizer, backend.pre_tokenizer) if step is not None)
    types = set(re.findall(rb'"type":"(\w+)"', steps))
    splits_characters = rb"[\\s\\S]" in steps
    return types <= {b"Sequence", b"Split", b"ByteLevel", b"Digits", b"NFC"} and (
        b'"Removed"' not in steps and (kind == "bpe" or splits_characters)
    )


def begins_text(data: bytes) -> bool:
    """Whether bytes are UTF-8, or its beginning."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return data[-2:-1] != b"\xed" or data[-1] < 0xA0  # a surrogate, which Python does not refuse before its third byte


def incomplete_character(data: bytes) -> bytes:
    """The bytes at the end that are the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    incomplete = decoder.getstate()[0]
    return incomplete if begins_text(incomplete) else b""


def lost_text_message(lost_bytes: int, num_bytes: int) -> str:
    """How much of a text a tokenizer loses, for the user; "" if nothing."""
    return (
        f"{lost_bytes:,} of {num_bytes:,} bytes of the text ({lost_bytes / num_bytes:.1%}) are lost: the tokenizer cannot "
        "represent them, and bits per byte leave them out. The default tokenizer (bpe) represents every text"
        if lost_bytes
        else ""
    )


# ---------------------------------------------------------------- training


def vocab_size_for(corpus_bytes: int, sample: Iterable[str] = ()) -> int:
    """The default vocabulary size for a corpus: a power of two in [512, 65536], about twice the square root of its bytes.

    The number of distinct words grows about with the square root of a text's length (Heaps' law), and a token must
    occur often to be learned. 2 MB of text give 2,048 and 36 MB 8,192. Powers of two suit the hardware, and 65,536 is
    the most that two bytes per id hold. A script of many characters has room for each that occurs more than once, and for as
    many merges of them.

    Args:
        corpus_bytes: the length of the corpus in UTF-8.
        sample: texts of the corpus.
    """
    characters = Counter(itertools.chain.from_iterable(sample))
    frequent = sum(count > 1 and ord(character) > 127 for character, count in characters.items())
    size = max(2 * math.isqrt(corpus_bytes), 256 + 2 * frequent, 512)
    return min(65536, 2 ** int(math.log2(size)))


def check_vocab_size(vocab_size: int) -> None:
    """Raise `UsageError` for a size that cannot hold the 256 bytes and the two special tokens."""
    if vocab_size < 258:
        raise UsageError(
            f"a byte-level vocabulary has at least 258 tokens (256 bytes and 2 special tokens), not {vocab_size}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. The same texts give the same `tokenizer.json`, byte for byte.

    Args:
        texts: chunks of documents rather than whole ones, since a large text is sampled: at most `MAX_SAMPLE_CHARS`
            characters.
        vocab_size: the size of the vocabulary. A small text has fewer merges: see `Tokenizer.vocab_size`.

    Raises:
        UsageError: the size cannot hold the 256 bytes and the two special tokens.
    """
    check_vocab_size(vocab_size)
    sample, _ = hash_sample((sample_key(index), text) for index, text in enumerate(texts))
    return train_bpe_from_sample([text for _, text in sample], vocab_size)


def train_bpe_from_sample(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on all of some texts, in the way that gives the fewest tokens.

    In scripts whose characters have several bytes, merges can cross the borders of characters. If many tokens of the texts are
    broken characters, merging whole characters is tried. If the texts have many signs that may belong to words, such as tone
    letters, words that end at spaces and punctuation only are tried.
    """
    sample = list(_first_characters(texts, MEASURED_CHARACTERS))
    train, trained = train_byte_bpe, train_byte_bpe(texts, vocab_size)
    num_tokens, num_broken = count_broken_tokens(trained, sample)
    if num_broken > MAX_BROKEN_SHARE * num_tokens:
        by_character = train_character_bpe(texts, vocab_size)
        if (count := count_broken_tokens(by_character, sample)[0]) < num_tokens:
            train, trained, num_tokens = train_character_bpe, by_character, count
    characters = Counter(itertools.chain.from_iterable(sample))
    signs = {c: count for c, count in characters.items() if unicodedata.category(c) in ("Sk", "Cf") or c in "'’"}
    if sum(signs.values()) >= MIN_SIGN_SHARE * characters.total() > 0:
        by_word = train(texts, vocab_size, WHOLE_WORD_PATTERNS)
        if count_broken_tokens(by_word, sample)[0] <= (1 - MIN_SAVED_SHARE) * num_tokens:
            trained = by_word
    return trained


def count_broken_tokens(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int]:
    """The number of tokens of some texts, and how many of them are no whole characters."""
    encoded = tokenizer.encode_batch(texts)
    return sum(map(len, encoded)), sum(int(tokenizer.is_broken[ids].sum()) for ids in encoded)


def train_byte_bpe(texts: list[str], vocab_size: int, patterns: Sequence[str] = PRETOKENIZE_PATTERNS) -> Tokenizer:
    """Train a BPE that merges bytes, within the words that the patterns find."""
    backend = _bpe_backend(models.BPE(), patterns)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=BYTE_CHARS,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, _tokenizer_config())


def train_character_bpe(texts: list[str], vocab_size: int, patterns: Sequence[str] = PRETOKENIZE_PATTERNS) -> Tokenizer:
    """Train a BPE that first merges the bytes of each frequent character, and then characters, within words as above.

    The frequent characters occupy at most half of the vocabulary; the bytes of the others stay apart.
    """
    counts = Counter(itertools.chain.from_iterable(texts))
    vocabulary = {token: id for id, token in enumerate([EOS_TOKEN, PAD_TOKEN, *BYTE_CHARS])}
    merges: list[tuple[str, str]] = []

    def merge(first: str, second: str) -> None:
        if first + second not in vocabulary and len(vocabulary) < vocab_size:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))

    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < 2 or len(vocabulary) >= 256 + vocab_size // 2:
            break
        spelled = _spell_bytes(character)
        for length in range(1, len(spelled)):
            merge(spelled[:length], spelled[length])
    by_character = tokenizers.Tokenizer(models.BPE())
    by_character.pre_tokenizer = pre_tokenizers.Sequence(_word_splits(patterns))
    trainer = trainers.BpeTrainer(
        vocab_size=len(counts) + vocab_size, min_frequency=2, show_progress=False, initial_alphabet=sorted(counts)
    )
    by_character.train_from_iterator(texts, trainer)
    for pair in json.loads(by_character.to_str())["model"]["merges"]:
        first, second = map(_spell_bytes, pair)
        if first in vocabulary and second in vocabulary:
            merge(first, second)
    backend = _bpe_backend(models.BPE(vocab=vocabulary, merges=merges), patterns)
    backend.add_special_tokens([EOS_TOKEN, PAD_TOKEN])  # pyright: ignore[reportUnknownMemberType]  # typed as a bare list
    return Tokenizer(backend, _tokenizer_config())


def _word_splits(patterns: Sequence[str]) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _bpe_backend(model: models.BPE, patterns: Sequence[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_word_splits(patterns), byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _spell_bytes(text: str) -> str:
    """The UTF-8 bytes of a text in the alphabet of a byte-level BPE."""
    return "".join(BYTE_CHARS[byte] for byte in text.encode())


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The beginning of some texts, of `limit` characters together."""
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def train_char(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer with a token for each character of some texts, by code point. Any other character is `<|unk|>`."""
    characters = set(itertools.chain.from_iterable(map(replace_surrogates, texts)))
    special_tokens = [EOS_TOKEN, PAD_TOKEN, UNK_TOKEN]
    vocabulary = {token: id for id, token in enumerate([*special_tokens, *sorted(characters)])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(CHARACTER_PATTERN), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special_tokens)  # pyright: ignore[reportUnknownMemberType]  # typed as a bare list
    return Tokenizer(backend, _tokenizer_config(unk_token=UNK_TOKEN))


def _tokenizer_config(**tokens: str) -> dict[str, Any]:
    """The `tokenizer_config.json` of a new tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        **tokens,
        "clean_up_tokenization_spaces": False,
    }


def normalized(tokenizer: Tokenizer, to_nfc: bool) -> Tokenizer:
    """The tokenizer, with the normalization of every text to NFC before it is encoded if that is asked for."""
    if to_nfc:
        tokenizer.backend.normalizer = normalizers.NFC()
    return Tokenizer(tokenizer.backend, tokenizer.config, tokenizer.eos_ids)


def sample_key(*position: int) -> int:
    """The pseudo-random number in [0, `HASH_RANGE`) of a text, from its position in the corpus."""
    name = " ".join(map(str, position))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def hash_sample(texts: Iterable[tuple[int, str]], limit: int = HASH_RANGE) -> tuple[list[tuple[int, str]], int]:
    """Sample texts by key: those below a limit, which is halved until the sample is as small as the constants above allow.

    The limit depends on the texts only. So the sample of several parts of a corpus, taken again with the smallest of
    their limits, is the sample of the whole.

    Args:
        texts: texts with their `sample_key`.
        limit: the first limit.

    Returns:
        The sample, in order, and the limit.
    """
    sample: list[tuple[int, str]] = []
    num_characters, words, word_bytes = 0, set[str](), 0
    for key, text in texts:
        new = [(key, replace_surrogates(text))] if key < limit else []
        while new:
            sample += new
            for _, text in new:
                num_characters += len(text)
                new_words = set(text.split()) - words
                words |= new_words
                word_bytes += sum(len(word.encode()) for word in new_words)
            if num_characters <= MAX_SAMPLE_CHARS and word_bytes <= MAX_SAMPLE_WORD_BYTES:
                break
            limit //= 2
            new = [item for item in sample if item[0] < limit]
            sample, num_characters, words, word_bytes = [], 0, set[str](), 0
    return sample, limit
