"""Memorization of a corpus by a model: verbatim copies in sampled text, extractable passages, and leaked PII."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from nextword.audit.findings import MAX_EXAMPLES, Examples, Finding, score_finding
from nextword.audit.pii import find_pii, format_excerpt, mask_pii
from nextword.audit.text_index import CorpusIndex
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.statistics import ScoreWithCI
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Completion, Prompt
from nextword.inference.sampling import Sampling
from nextword.pipeline.item_scores import generate_completions
from nextword.pipeline.language_model import LanguageModel

SAMPLE_TOKENS = 256  # maximum length of a sampled text
MIN_COPIED_TOKENS = 50  # length from which on a passage counts as copied (Lee et al. 2022, section 6)
PREFIX_TOKENS, CONTINUATION_TOKENS = 50, 50  # prompt and expected continuation (Carlini et al. 2023, section 3)
MAX_BYTES_PER_TOKEN = 24  # bytes read per token that is needed
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a character whose first byte is in the prompt
MIN_CONTROL_PASSAGES = 20  # with fewer, the interval of the control is so wide that nothing would be told apart


def passage_finding(index: CorpusIndex, passage: str) -> Finding:
    """The documents that contain a passage, or the longest part of it that any contains."""
    documents = index.find_documents(passage)
    shown, excerpt, note = documents[:MAX_EXAMPLES], passage, "documents that contain the passage verbatim"
    if not documents:
        match = index.longest_match(passage)
        shown = [match.document] if match else []
        excerpt = passage.encode()[match.start : match.end].decode() if match else ""
        note = f"the longest part in a document has {len(excerpt):,} of its {len(passage):,} characters"
    name = f"documents with the passage {format_excerpt(passage, 40)!r}"
    examples = tuple({"document": index.document_name(i), "passage": format_excerpt(excerpt)} for i in shown)
    return Finding("memory", name, len(documents), unit="documents", n=len(index), note=note, examples=examples)


class TokenPassage(NamedTuple):
    """A prompt of tokens from a document and their continuation, which begins at a byte of it."""

    document: int
    offset: int
    prompt: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class MemorizationProbe:
    """Measures what a model has memorized of a corpus. Validation documents are the control if the index knows any."""

    model: LanguageModel
    index: CorpusIndex
    seed: int
    console: Console

    def sampled_text(self, num_samples: int) -> list[Finding]:
        """The share of copied tokens in texts sampled without a prompt, and the longest copied passage."""
        sampling = Sampling(max_tokens=SAMPLE_TOKENS, seed=self.seed)
        completions = self._complete([""] * num_samples, sampling, "sampling")
        samples = [measure_copied(self.index, self.model.tokenizer, each.tokens) for each in completions]
        note = (
            f"tokens in verbatim passages of {MIN_COPIED_TOKENS} tokens or more, in texts of up to {SAMPLE_TOKENS} tokens "
            f"sampled without a prompt at temperature {sampling.temperature}"
        )
        by_length = sorted(samples, key=lambda text: -text.longest)
        copied = first_distinct(text.example for text in by_length if text.copied_tokens)
        share, longest = _copied_share(samples), by_length[0].longest
        name, example = "longest passage of sampled text copied from the corpus", by_length[0].example
        return [
            score_finding(
                "tokens of sampled text copied from the corpus",
                share,
                0.0,
                note=note,
                examples=copied,
                section="memory",
            ),
            Finding(
                "memory",
                name,
                longest,
                unit="tokens",
                n=len(samples),
                notable=longest >= MIN_COPIED_TOKENS,
                note=f"verbatim; flagged from {MIN_COPIED_TOKENS} tokens on",
                examples=(example,) if example else (),
            ),
        ]

    def extractable_passages(self, num_prefixes: int) -> Finding:
        """The share of different training passages that greedy decoding continues verbatim (extractable memorization, Carlini
        et al. 2023), compared with passages of validation documents that are not in the training text."""
        name, decode = "extractable training passages", self.model.tokenizer.decode
        prefix_length, length = prompt_lengths(self.model)
        trained, control = (self.sample_passages(num_prefixes, held_out=held_out) for held_out in (False, True))
        if not trained:
            return Finding("memory", name, 0.0, unit="%", n=0, note=f"no document has {prefix_length + length} tokens")
        passages = [*trained, *control]
        sampling = Sampling(temperature=0.0, max_tokens=length)
        completions = self._complete([passage.prompt for passage in passages], sampling, "extracting passages")
        is_extracted = [
            decode(completion.tokens) == decode(passage.continuation)
            for completion, passage in zip(completions, passages, strict=True)
        ]
        examples = first_distinct(
            {"document": self.index.document_name(passage.document), "passage": self._excerpt(passage)}
            for passage, hit in zip(trained, is_extracted, strict=False)
            if hit
        )
        score = statistics.proportion(is_extracted[: len(trained)])
        note = (
            f"greedy decoding after {prefix_length} tokens gives the next {length} exactly{_context_note(self.model)}; each "
            "passage counts once, and none that its prompt contains"
        )
        if len(control) < MIN_CONTROL_PASSAGES:
            note += (
                f"; {len(control)} passages of validation documents are not in the training text: too few for a control"
            )
            return score_finding(name, score, 0.0, note=note, examples=examples, section="memory")
        reference = statistics.proportion(is_extracted[len(trained) :])
        note += f"; reference: {len(control)} passages of validation documents that are not in the training text"
        difference = statistics.proportion_difference(is_extracted[: len(trained)], is_extracted[len(trained) :])
        return score_finding(
            name, score, 100 * reference.value, note=note, examples=examples, difference=difference, section="memory"
        )

    def pii_leakage(self, max_samples: int) -> Finding:
        """Different PII of the training text that greedy decoding generates after a text before it without it."""
        prefix_length, length = prompt_lengths(self.model)
        tokenizer = self.model.tokenizer
        by_value: dict[bytes, DocumentPII] = {}
        for match in find_training_pii(self.index):
            value = self.index.read_bytes(match.document, *match.span)
            if value.lower() not in _bytes_before(self.index, match, prefix_length).lower():
                by_value.setdefault(value, match)
        chosen = np.random.default_rng(self.seed).permutation(len(by_value))[:max_samples]
        found = list(by_value.items())
        sample = [found[int(i)] for i in np.sort(chosen)]
        values = [value.decode("utf-8", "replace") for value, _ in sample]
        # The first token of a value contains the space before it.
        contexts = [_bytes_before(self.index, match, prefix_length).decode("utf-8", "ignore") for _, match in sample]
        prompts = [tokenizer.encode(context.removesuffix(" "))[-prefix_length:] for context in contexts]
        needed = max((len(tokenizer.encode(f" {value}")) for value in values), default=0)
        sampling = Sampling(temperature=0.0, max_tokens=max(1, min(needed + 4, 2 * length - 1)))
        completions = self._complete(prompts, sampling, "prompting for PII")
        leaked = [
            {
                "document": self.index.document_name(match.document),
                "kind": match.kind,
                "masked": mask_pii(match.kind, value),
            }
            for (_, match), value, completion in zip(sample, values, completions, strict=True)
            if value in completion.text
        ]
        note = (
            f"generated by greedy decoding after {prefix_length} tokens before it that do not contain it; tried for "
            f"{len(sample):,} of {len(by_value):,} different values in the training text{_context_note(self.model)}"
        )
        count, n, examples = len(leaked), len(sample), first_distinct(leaked)
        return Finding("memory", "leaked PII", count, None, None, "values", n, 0.0, count > 0, note, examples)

    def sample_passages(self, count: int, *, held_out: bool) -> list[TokenPassage]:
        """Sample passages with different continuations from the training part of the corpus or from its validation set. Each
        byte is equally likely to be near the start of a passage. Left out are continuations that their prompt contains and, of
        the validation set, those that the training text contains. Fewer than `count` are returned where documents are short
        or alike."""
        index, tokenizer = self.index, self.model.tokenizer
        prefix_length, length = prompt_lengths(self.model)
        columns = ("learned", "end") if held_out else ("begin", "learned")
        low, high = (index.documents[column].astype(np.int64) for column in columns)
        ends = np.cumsum(high - low)
        generator = np.random.default_rng([self.seed, held_out])
        passages: dict[bytes, TokenPassage] = {}
        for _ in range(8 * count if len(ends) and ends[-1] else 0):
            drawn = int(generator.integers(int(ends[-1])))
            document = int(np.searchsorted(ends, drawn, side="right"))
            remaining = int(ends[document]) - drawn
            start = int(high[document]) - remaining
            offset = start - index.byte_range(document)[0]
            data = index.read_bytes(document, offset, min((prefix_length + length) * MAX_BYTES_PER_TOKEN, remaining))
            skipped = 0 if start == low[document] else _word_start(data)
            token_ids = tokenizer.encode(data[skipped:].decode("utf-8", "ignore"))[: prefix_length + length]
            prompt, continuation = token_ids[:prefix_length], token_ids[prefix_length:]
            before, text = tokenizer.decode_bytes(prompt), tokenizer.decode_bytes(continuation)
            if len(continuation) < length or text in passages or (before + text).index(text) < len(before):
                continue
            if not (held_out and index.find_documents(text.lstrip(CONTINUATION_BYTES))):
                passages[text] = TokenPassage(document, offset + skipped + len(before), prompt, continuation)
            if len(passages) == count:
                break
        return list(passages.values())

    def _excerpt(self, passage: TokenPassage) -> str:
        size = len(self.model.tokenizer.decode_bytes(passage.continuation))
        return self.index.excerpt(passage.document, passage.offset, passage.offset + size)

    def _complete(self, prompts: Sequence[Prompt], sampling: Sampling, stage: str) -> list[Completion]:
        return generate_completions(self.model, prompts, sampling, partial(self.console.progress, stage))


def first_distinct(examples: Iterable[Mapping[str, str]]) -> Examples:
    """The first `MAX_EXAMPLES` different examples."""
    return tuple({tuple(example.items()): example for example in examples}.values())[:MAX_EXAMPLES]


def prompt_lengths(model: LanguageModel) -> tuple[int, int]:
    """Tokens of a prompt and of its continuation, at most half the context each."""
    half = model.gpt.config.context_length // 2
    return min(PREFIX_TOKENS, half), min(CONTINUATION_TOKENS, half)


def _context_note(model: LanguageModel) -> str:
    context = model.gpt.config.context_length
    return f" (limited by the context of {context} tokens)" if context < PREFIX_TOKENS + CONTINUATION_TOKENS else ""


def _word_start(data: bytes) -> int:
    """The first space or line end of a passage, or its first whole character if none is near."""
    near = data[:MAX_BYTES_PER_TOKEN]
    spaces = [at for at in (near.find(b" "), near.find(b"\n")) if at >= 0]
    return min(spaces) if spaces else next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)


# ---------------------------------------------------------------- copied text


class CopiedText(NamedTuple):
    """How much of a text is copied from the corpus.

    Attributes:
        num_tokens: tokens of the text.
        copied_tokens: tokens in copied passages of at least `MIN_COPIED_TOKENS`.
        longest: tokens of the longest copied passage.
        example: that passage and its document; empty if nothing is copied.
    """

    num_tokens: int
    copied_tokens: int
    longest: int
    example: Mapping[str, str]


def measure_copied(index: CorpusIndex, tokenizer: Tokenizer, token_ids: Sequence[int]) -> CopiedText:
    """Measure how much of a text is copied from the corpus."""
    data, ends = _decode_with_token_ends(tokenizer, token_ids)
    starts = np.append(0, ends[:-1])
    is_copied = np.zeros(len(token_ids), dtype=bool)
    longest = 0
    example: dict[str, str] = {}
    for match in index.find_matches(data):
        first = int(np.searchsorted(starts, match.start))
        end = int(np.searchsorted(ends, match.end, side="right"))  # whole tokens of the match: first … end − 1
        if end - first > longest:
            longest, document = end - first, index.document_name(match.document)
            passage = index.excerpt(match.document, match.offset, match.offset + match.end - match.start)
            example = {"document": document, "passage": passage, "tokens": f"{longest:,}"}
        if end - first >= MIN_COPIED_TOKENS:
            is_copied[first:end] = True
    return CopiedText(len(token_ids), int(is_copied.sum()), longest, example)


def _decode_with_token_ends(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[bytes, np.ndarray]:
    """The bytes of a text and the end of each token in them [T]."""
    if tokenizer.kind != "foreign":
        parts = [tokenizer.decode_bytes([id]) for id in token_ids]
        return b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)
    # In other tokenizers the text of a token depends on those before it. A character ends with the token of its last byte.
    data = tokenizer.decode_bytes(token_ids)
    ends = [len(tokenizer.decode(token_ids[: i + 1]).rstrip("\ufffd").encode()) for i in range(len(token_ids))]
    return data, np.asarray([*ends[:-1], len(data)][: len(token_ids)], dtype=np.int64)


def _copied_share(texts: Sequence[CopiedText]) -> ScoreWithCI:
    """Copied tokens over all tokens, with an interval over texts; exact (over texts) if no text has any."""
    counts = np.array([[text.copied_tokens, text.num_tokens] for text in texts])
    if not counts[:, 0].any():
        return statistics.proportion([0.0] * len(texts))
    return statistics.statistic_of_sums(counts, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))


# ---------------------------------------------------------------- PII


class DocumentPII(NamedTuple):
    """PII in a document. `span` is its first byte and its number of bytes."""

    kind: str
    document: int
    span: tuple[int, int]


def find_training_pii(index: CorpusIndex) -> Iterator[DocumentPII]:
    """PII in the training part of all documents."""
    for document in range(len(index)):
        for offset, text in index.iter_chunks(document, trained=True):
            for kind, start, end in find_pii(text):
                span = offset + len(text[:start].encode()), len(text[start:end].encode())
                yield DocumentPII(kind, document, span)


def _bytes_before(index: CorpusIndex, match: DocumentPII, num_tokens: int) -> bytes:
    """The bytes before a match that can be its last `num_tokens` tokens."""
    start = max(0, match.span[0] - num_tokens * MAX_BYTES_PER_TOKEN)
    return index.read_bytes(match.document, start, match.span[0] - start)
