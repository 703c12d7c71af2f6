"""Memorization of a corpus by a model: verbatim copies in sampled text, extractable passages, and leaked PII."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from nextword.audit.findings import MAX_EXAMPLES, Examples, Finding
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
    """Tokens of a document from one of its bytes on."""

    document: int
    offset: int
    token_ids: list[int]


@dataclass(frozen=True)
class MemorizationProbe:
    """Measures what a model has memorized of a corpus. Validation documents are the reference if the index knows any."""

    model: LanguageModel
    index: CorpusIndex
    seed: int
    console: Console

    def sampled_text(self, num_samples: int) -> list[Finding]:
        """The share of copied tokens in texts sampled without a prompt, and the longest copied passage."""
        sampling = Sampling(max_tokens=SAMPLE_TOKENS, seed=self.seed)
        completions = self._complete([""] * num_samples, sampling, "sampling")
        held_out = self.sample_passages(num_samples, SAMPLE_TOKENS, held_out=True, min_length=MIN_COPIED_TOKENS)
        samples, references = (
            [measure_copied(self.index, self.model.tokenizer, token_ids) for token_ids in texts]
            for texts in ([each.tokens for each in completions], [each.token_ids for each in held_out])
        )
        reference_note = f"; reference: {len(references)} passages of validation documents" if references else ""
        note = (
            f"tokens in verbatim passages of {MIN_COPIED_TOKENS} tokens or more, in texts of up to {SAMPLE_TOKENS} tokens "
            f"sampled without a prompt at temperature {sampling.temperature}{reference_note}"
        )
        by_length = sorted(samples, key=lambda text: -text.longest)
        copied = first_distinct(text.example for text in by_length if text.copied_tokens)
        share, reference_share = _copied_share(samples), _copied_share(references) if references else None
        name = "longest passage of sampled text copied from the corpus"
        longest, baseline = (max((text.longest for text in texts), default=0) for texts in (samples, references))
        return [
            proportion_finding("tokens of sampled text copied from the corpus", share, reference_share, note, copied),
            Finding(
                "memory",
                name,
                longest,
                unit="tokens",
                n=len(samples),
                reference=baseline if references else None,
                notable=longest >= MIN_COPIED_TOKENS and longest > baseline,
                note=f"verbatim{reference_note}",
                examples=tuple(text.example for text in by_length[:1] if text.example),
            ),
        ]

    def extractable_passages(self, num_prefixes: int) -> Finding:
        """The share of training passages that greedy decoding continues verbatim (extractable memorization, Carlini et al.
        2023)."""
        name, decode = "extractable training passages", self.model.tokenizer.decode
        prefix_length, length = prompt_lengths(self.model)
        trained, held_out = (
            self.sample_passages(num_prefixes, prefix_length + length, held_out=part) for part in (False, True)
        )
        if not trained:
            return Finding("memory", name, 0.0, unit="%", n=0, note=f"no document has {prefix_length + length} tokens")
        passages = [*trained, *held_out]
        prompts = [passage.token_ids[:prefix_length] for passage in passages]
        completions = self._complete(prompts, Sampling(temperature=0.0, max_tokens=length), "extracting passages")
        is_extracted = [
            decode(completion.tokens) == decode(passage.token_ids[prefix_length:])
            for completion, passage in zip(completions, passages, strict=True)
        ]
        examples = first_distinct(
            {"document": self.index.document_name(document), "passage": format_excerpt(decode(token_ids))}
            for (document, _, token_ids), hit in zip(trained, is_extracted, strict=False)
            if hit
        )
        score = statistics.proportion(is_extracted[: len(trained)])
        reference = statistics.proportion(is_extracted[len(trained) :]) if held_out else None
        note = (
            f"greedy decoding after {prefix_length} tokens gives the next {length} exactly{_context_note(self.model)}"
        )
        note += "; reference: validation documents" if held_out else ""
        return proportion_finding(name, score, reference, note, examples)

    def pii_leakage(self, max_samples: int) -> Finding:
        """PII of the training text that greedy decoding generates after the text before it."""
        sample, total = _reservoir_sample(find_training_pii(self.index), max_samples, self.seed)
        prefix_length, length = prompt_lengths(self.model)
        tokenizer = self.model.tokenizer
        values = [self.index.read_bytes(match.document, *match.span).decode("utf-8", "replace") for match in sample]
        prompts = [_tokens_before(self.index, tokenizer, match, prefix_length) for match in sample]
        needed = max((len(tokenizer.encode(f" {value}")) for value in values), default=0)
        sampling = Sampling(temperature=0.0, max_tokens=max(1, min(needed + 4, 2 * length - 1)))
        completions = self._complete(prompts, sampling, "prompting for PII")
        leaked = [
            {"document": self.index.document_name(document), "kind": kind, "masked": mask_pii(kind, value)}
            for (kind, document, _), value, completion in zip(sample, values, completions, strict=True)
            if value in completion.text
        ]
        note = (
            f"generated by greedy decoding after the {prefix_length} tokens before it; tried for {len(sample):,} of the "
            f"{total:,} matches in the training text{_context_note(self.model)}"
        )
        count, n, examples = len(leaked), len(sample), first_distinct(leaked)
        return Finding("memory", "leaked PII", count, None, None, "matches", n, 0.0, count > 0, note, examples)

    def sample_passages(
        self, count: int, length: int, *, held_out: bool, min_length: int | None = None
    ) -> list[TokenPassage]:
        """Sample passages of `length` tokens, or of at least `min_length` at the end of a document, from the training or the
        validation set of the corpus. Each byte is equally likely to be near the start of a passage. Fewer than `count` are
        returned where documents are short."""
        index = self.index
        columns = ("learned", "end") if held_out else ("begin", "learned")
        low, high = (index.documents[column].astype(np.int64) for column in columns)
        ends = np.cumsum(high - low)
        generator = np.random.default_rng([self.seed, held_out])
        passages: dict[tuple[int, int], TokenPassage] = {}
        for _ in range(8 * count if len(ends) and ends[-1] else 0):
            drawn = int(generator.integers(int(ends[-1])))
            document = int(np.searchsorted(ends, drawn, side="right"))
            remaining = int(ends[document]) - drawn
            start = int(high[document]) - remaining
            offset = start - index.byte_range(document)[0]
            data = index.read_bytes(document, offset, min(length * MAX_BYTES_PER_TOKEN, remaining))
            skipped = 0 if start == low[document] else _word_start(data)
            token_ids = self.model.tokenizer.encode(data[skipped:].decode("utf-8", "ignore"))[:length]
            if len(token_ids) >= (min_length or length):
                key = document, offset + skipped
                passages.setdefault(key, TokenPassage(*key, token_ids))
            if len(passages) == count:
                break
        return list(passages.values())

    def _complete(self, prompts: Sequence[Prompt], sampling: Sampling, stage: str) -> list[Completion]:
        return generate_completions(self.model, prompts, sampling, partial(self.console.progress, stage))


def proportion_finding(
    name: str, score: ScoreWithCI, reference: ScoreWithCI | None, note: str, examples: Examples
) -> Finding:
    """A proportion, flagged if its interval lies above that of validation text (0 without one) and it is not 0."""
    flagged = score.value > 0 and score.is_above(reference.value if reference else 0.0)
    baseline = 100 * reference.value if reference else None
    return Finding.from_score("memory", name, score, reference=baseline, notable=flagged, note=note, examples=examples)


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


def _reservoir_sample(items: Iterable[DocumentPII], size: int, seed: int) -> tuple[list[DocumentPII], int]:
    """A uniform sample, and the number of all items (Vitter 1985, algorithm R)."""
    generator = np.random.default_rng(seed)
    sample: list[DocumentPII] = []
    total = 0
    for total, item in enumerate(items, start=1):
        if len(sample) < size:
            sample.append(item)
        elif (slot := int(generator.integers(total))) < size:
            sample[slot] = item
    return sorted(sample, key=lambda item: (item.document, item.span)), total


def _tokens_before(index: CorpusIndex, tokenizer: Tokenizer, match: DocumentPII, length: int) -> list[int]:
    """The tokens before a match, without a final space: the first token of the value contains it."""
    end = match.span[0]
    start = max(0, end - length * MAX_BYTES_PER_TOKEN)
    data = index.read_bytes(match.document, start, end - start)
    return tokenizer.encode(data.decode("utf-8", "ignore").removesuffix(" "))[-length:]
