"""Memorization of a corpus by a model: verbatim copies in sampled text, extractable passages, and leaked PII."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nextword.audit.findings import MAX_EXAMPLES, Finding, count_finding, first_distinct, proportion_finding
from nextword.audit.pii import find_pii, mask_pii
from nextword.audit.text_index import CorpusIndex, Match, trim_partial_character
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
MAX_EXAMPLE_CHARS = 200
MAX_BYTES_PER_TOKEN = 24  # bytes read per token that is needed


def passage_finding(index: CorpusIndex, passage: str) -> Finding:
    """The documents that contain a passage, or the longest part of it that any contains."""
    documents = index.find_documents(passage)
    matches, excerpt, note = documents[:MAX_EXAMPLES], passage, "documents that contain the passage verbatim"
    if not documents:
        match = index.longest_match(passage)
        matches = [match.document] if match else []
        excerpt = passage.encode()[match.start : match.end].decode() if match else ""
        note = f"the longest part in a document has {len(excerpt):,} of its {len(passage):,} characters"
    name = f"documents with the passage {format_excerpt(passage, 40)!r}"
    examples = [{"document": index.document_name(i), "passage": format_excerpt(excerpt)} for i in matches]
    n = len(index)
    return Finding("memory", name, len(documents), unit="documents", n=n, note=note, examples=tuple(examples))


def format_excerpt(text: str, length: int = MAX_EXAMPLE_CHARS) -> str:
    """A passage on one line, truncated, with its PII masked."""
    for kind, start, end in reversed(list(find_pii(text))):
        text = text[:start] + mask_pii(kind, text[start:end]) + text[end:]
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


class TokenPassage(NamedTuple):
    """Tokens of a document from one of its bytes on."""

    document: int
    offset: int
    token_ids: list[int]


@dataclass(frozen=True)
class MemorizationProbe:
    """Measures what a model has memorized of a corpus. Held-out documents are the reference if the index knows any."""

    model: LanguageModel
    index: CorpusIndex
    seed: int = 0
    console: Console = field(default_factory=lambda: Console(quiet=True))

    def sampled_text(self, num_samples: int) -> list[Finding]:
        """The share of copied tokens in texts sampled without a prompt, and the longest copied passage."""
        sampling = Sampling(max_tokens=SAMPLE_TOKENS, seed=self.seed)
        completions = self._complete([""] * num_samples, sampling, "sampling")
        held_out = self.sample_passages(num_samples, SAMPLE_TOKENS, held_out=True, min_length=MIN_COPIED_TOKENS)
        tokenizer = self.model.tokenizer
        samples = [measure_copied(self.index, tokenizer, completion.tokens) for completion in completions]
        references = [measure_copied(self.index, tokenizer, passage.token_ids) for passage in held_out]
        note = f"; reference: {len(references)} passages of held-out documents" if references else ""
        share_note = (
            f"tokens in verbatim passages of {MIN_COPIED_TOKENS} tokens or more, in texts of up to {SAMPLE_TOKENS} tokens "
            f"sampled without a prompt at temperature {sampling.temperature}{note}"
        )
        by_length = sorted(samples, key=lambda sample: -sample.longest_passage_tokens)
        longest, reference = (
            max((text.longest_passage_tokens for text in texts), default=0) for texts in (samples, references)
        )
        share, reference_share = _copied_share(samples), _copied_share(references) if references else None
        return [
            proportion_finding(
                "memory",
                "tokens of sampled text copied from the corpus",
                share,
                reference_share,
                share_note,
                first_distinct(self._example(sample) for sample in by_length if sample.copied_tokens),
            ),
            Finding(
                "memory",
                "longest passage of sampled text copied from the corpus",
                longest,
                unit="tokens",
                n=len(samples),
                reference=reference if references else None,
                notable=longest >= MIN_COPIED_TOKENS and longest > reference,
                note=f"verbatim{note}",
                examples=tuple(self._example(sample) for sample in by_length[:1] if sample.match),
            ),
        ]

    def extractable_passages(self, num_prefixes: int) -> Finding:
        """The share of training passages that greedy decoding continues verbatim (extractable memorization, Carlini et al.
        2023)."""
        prefix_length, length = prompt_lengths(self.model)
        trained, held_out = (
            self.sample_passages(num_prefixes, prefix_length + length, held_out=part) for part in (False, True)
        )
        if not trained:
            note = f"no document has {prefix_length + length} tokens"
            return Finding("memory", "extractable training passages", 0.0, unit="%", n=0, note=note)
        passages = [*trained, *held_out]
        sampling = Sampling(temperature=0.0, max_tokens=length)
        prompts = [passage.token_ids[:prefix_length] for passage in passages]
        completions = self._complete(prompts, sampling, "extracting passages")
        texts = [self.model.tokenizer.decode(passage.token_ids[prefix_length:]) for passage in passages]
        extracted = [
            float(self.model.tokenizer.decode(completion.tokens) == text)
            for completion, text in zip(completions, texts, strict=True)
        ]
        examples = first_distinct(
            {
                "document": self.index.document_name(passage.document),
                "passage": format_excerpt(self.model.tokenizer.decode(passage.token_ids)),
            }
            for passage, is_extracted in zip(trained, extracted, strict=False)
            if is_extracted
        )
        score = statistics.proportion(extracted[: len(trained)])
        reference = statistics.proportion(extracted[len(trained) :]) if held_out else None
        note = (
            f"greedy decoding after {prefix_length} tokens gives the next {length} exactly{_context_note(self.model)}"
        )
        note += "; reference: held-out documents" if held_out else ""
        return proportion_finding("memory", "extractable training passages", score, reference, note, examples)

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
            {
                "document": self.index.document_name(match.document),
                "kind": match.kind,
                "masked": mask_pii(match.kind, value),
            }
            for match, value, completion in zip(sample, values, completions, strict=True)
            if value in completion.text
        ]
        note = (
            f"generated by greedy decoding after the {prefix_length} tokens before it; tried for {len(sample):,} of the "
            f"{total:,} matches in the training text{_context_note(self.model)}"
        )
        return count_finding("memory", "leaked PII", len(leaked), "matches", len(sample), note, first_distinct(leaked))

    def sample_passages(
        self, count: int, length: int, *, held_out: bool, min_length: int | None = None
    ) -> list[TokenPassage]:
        """Sample passages of `length` tokens, or of at least `min_length` at the end of a document, from the training or the
        held-out part of the corpus. Each byte is equally likely to be near the start of a passage. Fewer than `count` are
        returned where documents are short."""
        index = self.index
        columns = ("learned", "end") if held_out else ("begin", "learned")
        low, high = (index.documents[column].astype(np.int64) for column in columns)
        ends = np.cumsum(high - low)
        generator = np.random.default_rng([self.seed, held_out])
        passages: dict[tuple[int, int], TokenPassage] = {}
        for _ in range(8 * count if len(ends) and ends[-1] else 0):
            drawn = int(generator.integers(ends[-1]))
            document = int(np.searchsorted(ends, drawn, side="right"))
            start, remaining = int(high[document] - (ends[document] - drawn)), int(ends[document] - drawn)
            offset = start - index.byte_range(document)[0]
            data = index.read_bytes(document, offset, min(length * MAX_BYTES_PER_TOKEN, remaining))
            skipped = 0 if start == low[document] else _word_start(data)
            text = trim_partial_character(data[skipped:]).decode("utf-8", "replace")
            token_ids = self.model.tokenizer.encode(text)[:length]
            if len(token_ids) >= (min_length or length):
                key = document, offset + skipped
                passages.setdefault(key, TokenPassage(*key, token_ids))
            if len(passages) == count:
                break
        return list(passages.values())

    def _complete(self, prompts: Sequence[Prompt], sampling: Sampling, stage: str) -> list[Completion]:
        return generate_completions(
            self.model, prompts, sampling, lambda done, total: self.console.progress(stage, done, total)
        )

    def _example(self, sample: "CopiedText") -> dict[str, str]:
        assert sample.match is not None
        document, passage = self.index.document_name(sample.match.document), format_excerpt(sample.passage)
        return {"document": document, "passage": passage, "tokens": f"{sample.longest_passage_tokens:,}"}


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


@dataclass(frozen=True)
class CopiedText:
    """How much of a text is copied from the corpus.

    Attributes:
        num_tokens: tokens of the text.
        copied_tokens: tokens in copied passages of at least `MIN_COPIED_TOKENS`.
        longest_passage_tokens: tokens of the longest copied passage.
        match, passage: that passage.
    """

    num_tokens: int
    copied_tokens: int
    longest_passage_tokens: int
    match: Match | None
    passage: str


def measure_copied(index: CorpusIndex, tokenizer: Tokenizer, token_ids: Sequence[int]) -> CopiedText:
    """Measure how much of a text is copied from the corpus."""
    data, ends = _decode_with_token_ends(tokenizer, token_ids)
    starts = np.append(0, ends[:-1])
    is_copied = np.zeros(len(token_ids), dtype=bool)
    longest, longest_match = 0, None
    for match in index.find_matches(data):
        first = int(np.searchsorted(starts, match.start))
        end = int(np.searchsorted(ends, match.end, side="right"))  # whole tokens of the match: first … end − 1
        if end - first > longest:
            longest, longest_match = end - first, match
        if end - first >= MIN_COPIED_TOKENS:
            is_copied[first:end] = True
    passage = data[longest_match.start : longest_match.end].decode("utf-8", "replace") if longest_match else ""
    return CopiedText(len(token_ids), int(is_copied.sum()), longest, longest_match, passage)


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
    """Copied tokens over all tokens, with a bootstrap interval over texts; exact (over texts) if no text has any."""
    counts = np.array([[text.copied_tokens, text.num_tokens] for text in texts])
    if not counts[:, 0].any():
        return statistics.proportion([0.0] * len(texts))
    return statistics.bootstrap_ratio(counts, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))


# ---------------------------------------------------------------- PII


class DocumentPII(NamedTuple):
    """PII in a document. `span` is its first byte and its number of bytes."""

    kind: str
    document: int
    span: tuple[int, int]


def find_training_pii(index: CorpusIndex) -> Iterator[DocumentPII]:
    """PII in the training part of all documents."""
    for document, num_bytes in enumerate(index.documents["learned"] - index.documents["begin"]):
        for offset, text in index.iter_chunks(document):
            for kind, start, end in find_pii(text):
                span = offset + len(text[:start].encode()), len(text[start:end].encode())
                if sum(span) <= num_bytes:
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
    first = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    return tokenizer.encode(data[first:].decode("utf-8", "replace").removesuffix(" "))[-length:]
