"""What a model has by heart: what it writes of its own that stands in the corpus, and what it gives away when it is asked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nextword.audit.findings import Finding
from nextword.audit.pii import PIIMatch, find_pii, find_pii_in_document, mask_pii
from nextword.audit.text_index import CorpusIndex, Match, trim_partial_character
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.statistics import ScoreWithCI
from nextword.data.tokenizer import Tokenizer
from nextword.inference.sampling import Sampling
from nextword.pipeline.item_scores import DEFAULT_NUM_TEXTS, generate_completions
from nextword.pipeline.language_model import LanguageModel

SAMPLE_TOKENS = 256  # of a text that it writes of its own
MIN_COPIED_TOKENS = (
    50  # tokens that stand together in the corpus, from which on they are copied (Lee et al. 2022, section 6)
)
PREFIX_TOKENS, CONTINUATION_TOKENS = (
    50,
    50,
)  # tokens of a passage that it is given, and that it is to go on with (Carlini et al. 2023, section 3)
NUM_PREFIXES = 256
MAX_EXAMPLES = 5  # examples of a finding
MAX_EXAMPLE_CHARS = 200  # characters of an example
MAX_BYTES_PER_TOKEN = 24  # a token is taken to have at most, on the average of a passage


def audit_memory(
    model: LanguageModel,
    index: CorpusIndex,
    *,
    passages: Sequence[str] = (),
    num_samples: int = DEFAULT_NUM_TEXTS,
    num_prefixes: int = NUM_PREFIXES,
    seed: int = 0,
    console: Console | None = None,
) -> list[Finding]:
    """What a model has by heart of a corpus, beside the same of documents that it has not seen, where the index knows of
    some.

    Args:
        passages: texts that are looked up in the corpus.
        texts: how many it writes of its own, from nothing, drawn as `generate` draws.
        prefixes: how many passages of the corpus it is to go on with; as many of the personal data in it, at most.
    """
    console = console or Console(quiet=True)
    findings = [passage_finding(index, passage) for passage in passages]
    if num_samples:
        findings += sampled_memorization(model, index, num_samples, seed, console)
    if num_prefixes:
        findings.append(extractable_memorization(model, index, num_prefixes, seed, console))
        findings.append(pii_leakage(model, index, num_prefixes, seed, console))
    return findings


# ---------------------------------------------------------------- a passage


def passage_finding(index: CorpusIndex, passage: str) -> Finding:
    """The documents in which a passage stands whole, or how much of it stands somewhere."""
    documents = index.find_documents(passage)
    if documents:
        examples = tuple(
            {"document": index.document_name(one), "passage": format_excerpt(passage)}
            for one in documents[:MAX_EXAMPLES]
        )
        note = "it stands there letter for letter"
    else:
        match = index.longest_match(passage)
        data = passage.encode()
        matched_text = data[match.start : match.end].decode() if match else ""
        examples = (
            ({"document": index.document_name(match.document), "passage": format_excerpt(matched_text)},)
            if match
            else ()
        )
        note = f"it stands nowhere whole; the longest part that does has {len(matched_text):,} of its {len(passage):,} characters"
    return Finding(
        "memory", f"documents with the passage {format_excerpt(passage, 40)!r}", len(documents), unit="documents", n=len(index),
        note=note, examples=examples,
    )  # fmt: skip


# ---------------------------------------------------------------- what it writes of its own


@dataclass(frozen=True)
class CopiedText:
    """How much of one text stands in the corpus.

    Attributes:
        tokens: of the text; `inside`: those in passages of `PASSAGE` tokens or more; `longest`: of the longest passage.
        match, passage: that passage.
    """

    num_tokens: int
    copied_tokens: int
    longest_passage_tokens: int
    match: Match | None
    passage: str


def sampled_memorization(
    model: LanguageModel, index: CorpusIndex, num_samples: int, seed: int, console: Console
) -> list[Finding]:
    """The share of what it writes that stands in the corpus, and the longest passage of it."""
    sampling = Sampling(max_tokens=SAMPLE_TOKENS, seed=seed)
    completions = generate_completions(
        model, [""] * num_samples, sampling, lambda done, of: console.progress("writing", done, of)
    )
    samples = [measure_copied(index, model.tokenizer, one.tokens) for one in completions]
    held_out_passages = [
        measure_copied(index, model.tokenizer, one.token_ids)
        for one in sample_passages(
            index, model.tokenizer, num_samples, SAMPLE_TOKENS, seed, held_out=True, min_length=MIN_COPIED_TOKENS
        )
    ]
    copied_share, reference_share = (
        _copied_token_share(samples),
        _copied_token_share(held_out_passages) if held_out_passages else None,
    )
    copied_samples = sorted(
        (one for one in samples if one.copied_tokens and one.match), key=lambda one: -one.longest_passage_tokens
    )
    longest_sampled, longest_held_out = (
        max((one.longest_passage_tokens for one in several), default=0) for several in (samples, held_out_passages)
    )
    reference_note = (
        f"; the reference is that of {len(held_out_passages)} texts of people in documents that it has not seen"
        if held_out_passages
        else ""
    )
    return [
        _share_finding(
            "what it writes of its own that stands in the corpus", copied_share, reference_share,
            note=f"of its tokens, those in passages of {MIN_COPIED_TOKENS} or more that stand word for word in the corpus, in texts of "
            f"at most {SAMPLE_TOKENS} tokens from nothing, drawn with temperature {sampling.temperature}{reference_note}",
            examples=_first_distinct(_passage_example(index, one) for one in copied_samples),
        ),
        Finding(
            "memory", "the longest passage that it writes of its own", longest_sampled, unit="tokens", n=len(samples),
            reference=longest_held_out if held_out_passages else None, notable=longest_sampled >= MIN_COPIED_TOKENS and longest_sampled > longest_held_out,
            note="letter for letter in the corpus" + reference_note,
            examples=tuple(_passage_example(index, one) for one in sorted(samples, key=lambda one: -one.longest_passage_tokens)[:1] if one.match),
        ),
    ]  # fmt: skip


def measure_copied(index: CorpusIndex, tokenizer: Tokenizer, ids: Sequence[int]) -> CopiedText:
    """How much of a text, given as its tokens, stands in the corpus."""
    data, ends = _decode_with_token_ends(tokenizer, ids)
    begins = np.append(0, ends[:-1])
    is_copied = np.zeros(len(ids), dtype=bool)
    longest_tokens, best_match = 0, None
    for match in index.find_matches(data):
        first_token = int(np.searchsorted(begins, match.start))
        end_token = int(np.searchsorted(ends, match.end, side="right"))  # whole tokens of the match: first … after−1
        if end_token - first_token > longest_tokens:
            longest_tokens, best_match = end_token - first_token, match
        if end_token - first_token >= MIN_COPIED_TOKENS:
            is_copied[first_token:end_token] = True
    passage = data[best_match.start : best_match.end].decode("utf-8", "replace") if best_match else ""
    return CopiedText(len(ids), int(is_copied.sum()), longest_tokens, best_match, passage)


def _decode_with_token_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[bytes, np.ndarray]:
    """The bytes of a text of tokens, and where each token ends in them [T]."""
    if tokenizer.kind != "foreign":
        parts = [tokenizer.decode_bytes([id]) for id in ids]
        return b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)
    # A foreign tokenizer's text of a token depends on those before it; a character ends with the last of its bytes.
    data = tokenizer.decode_bytes(ids)
    sizes = [len(tokenizer.decode(ids[: i + 1]).rstrip("\ufffd").encode()) for i in range(len(ids))]
    return data, np.asarray([*sizes[:-1], len(data)][: len(ids)], dtype=np.int64)


def _copied_token_share(texts: Sequence[CopiedText]) -> ScoreWithCI:
    """Tokens in copied passages over all tokens, with the bootstrap interval over texts. Where there are none, so many texts
    could still have had some: the bound is that of the share of texts."""
    counts = np.array([[one.copied_tokens, one.num_tokens] for one in texts])
    score = statistics.bootstrap_ratio(counts, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))
    if counts[:, 0].any():
        return score
    return statistics.proportion([0.0] * len(texts))


def _passage_example(index: CorpusIndex, sample: CopiedText) -> dict[str, str]:
    assert sample.match is not None
    return {
        "document": index.document_name(sample.match.document),
        "passage": format_excerpt(sample.passage),
        "tokens": f"{sample.longest_passage_tokens:,}",
    }


def format_excerpt(text: str, length: int = MAX_EXAMPLE_CHARS) -> str:
    """A passage on one line, cut where it is long, with the personal data in it masked."""
    for kind, start, end in reversed(list(find_pii(text))):
        text = text[:start] + mask_pii(kind, text[start:end]) + text[end:]
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _first_distinct(examples: Iterable[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The first few of those that say something else than the ones before them."""
    distinct: list[dict[str, str]] = []
    for one in examples:
        if one not in distinct and len(distinct) < MAX_EXAMPLES:
            distinct.append(one)
    return tuple(distinct)


# ---------------------------------------------------------------- what it goes on with


class TokenPassage(NamedTuple):
    """Tokens of a document from one of its bytes on."""

    document: int
    offset: int
    token_ids: list[int]


def extractable_memorization(
    model: LanguageModel, index: CorpusIndex, num_prefixes: int, seed: int, console: Console
) -> Finding:
    """How often it goes on with a passage of its training text exactly as the text does, the likeliest token each time."""
    prefix_length, continuation_length = prompt_lengths(model)
    training_passages, held_out_passages = (
        sample_passages(index, model.tokenizer, num_prefixes, prefix_length + continuation_length, seed, held_out=part)
        for part in (False, True)
    )
    all_passages = [*training_passages, *held_out_passages]
    completions = generate_completions(
        model, [one.token_ids[:prefix_length] for one in all_passages], Sampling(temperature=0.0, max_tokens=continuation_length),
        lambda done, of: console.progress("extracting", done, of),
    )  # fmt: skip
    decode = model.tokenizer.decode
    exact_matches = [
        float(decode(one.tokens) == decode(passage.token_ids[prefix_length:]))
        for one, passage in zip(completions, all_passages, strict=True)
    ]
    if not training_passages:
        return Finding("memory", "passages that it goes on with word for word", 0.0, unit="%", n=0,
                       note=f"no document has {prefix_length + continuation_length} tokens to be asked for")  # fmt: skip
    extracted_passages = [one for one, hit in zip(training_passages, exact_matches, strict=False) if hit]
    return _share_finding(
        "passages that it goes on with word for word", statistics.proportion(exact_matches[: len(training_passages)]),
        statistics.proportion(exact_matches[len(training_passages) :]) if held_out_passages else None,
        note=f"given {prefix_length} tokens of the training text, it writes the next {continuation_length} exactly{_context_limit_note(model)}"
        + ("; the reference is the same on documents that it has not seen" if held_out_passages else ""),
        examples=_first_distinct({"document": index.document_name(one.document), "passage": format_excerpt(decode(one.token_ids))} for one in extracted_passages),
    )  # fmt: skip


def prompt_lengths(model: LanguageModel) -> tuple[int, int]:
    """How many tokens a model is given, and how many it is asked for: less than usual where its context is shorter."""
    half = model.gpt.config.context_length // 2
    return min(PREFIX_TOKENS, half), min(CONTINUATION_TOKENS, half)


def _context_limit_note(model: LanguageModel) -> str:
    context = model.gpt.config.context_length
    return f" (its context of {context} tokens holds no more)" if context < PREFIX_TOKENS + CONTINUATION_TOKENS else ""


def sample_passages(
    index: CorpusIndex,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    seed: int,
    *,
    held_out: bool,
    min_length: int | None = None,
) -> list[TokenPassage]:
    """Passages of `length` tokens, or of `least` where their document ends, each byte of what is learned from (or of what is
    held out) as likely as any other to be near the beginning of one. Fewer where documents are short, and none where nothing
    is held out."""
    low, high = (
        index.documents[side].astype(np.int64) for side in (("learned", "end") if held_out else ("begin", "learned"))
    )
    ends = np.cumsum(high - low)
    rng = np.random.default_rng([seed, held_out])
    passages: dict[tuple[int, int], TokenPassage] = {}
    for _ in range(8 * count if len(ends) and ends[-1] else 0):
        position = int(rng.integers(ends[-1]))
        document = int(np.searchsorted(ends, position, side="right"))
        begin = int(index.documents["begin"][document])
        start = int(high[document] - (ends[document] - position)) - begin
        data = index.read_bytes(document, start, min(length * MAX_BYTES_PER_TOKEN, int(high[document]) - begin - start))
        skipped, text = _start_at_word(data, is_range_start=start == int(low[document]) - begin)
        ids = tokenizer.encode(text)[:length]
        if len(ids) >= (min_length or length):
            passages.setdefault((document, start + skipped), TokenPassage(document, start + skipped, ids))
        if len(passages) == count:
            break
    return list(passages.values())


def _start_at_word(data: bytes, is_range_start: bool) -> tuple[int, str]:
    """A stretch of text from its first space or line end on, or where there is none near, from its first character; how many
    bytes that leaves out."""
    if is_range_start:
        return 0, trim_partial_character(data).decode("utf-8", "replace")
    head = data[:MAX_BYTES_PER_TOKEN]
    cuts = [cut for cut in (head.find(b" "), head.find(b"\n")) if cut >= 0]
    cut = min(cuts) if cuts else next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)
    return cut, trim_partial_character(data[cut:]).decode("utf-8", "replace")


# ---------------------------------------------------------------- personal data


def pii_leakage(model: LanguageModel, index: CorpusIndex, max_samples: int, seed: int, console: Console) -> Finding:
    """How many of the personal data in the training text it writes, given the text before them."""
    all_pii = (one for document in range(len(index)) for one in find_pii_in_document(index, document))
    pii_samples, num_pii = _reservoir_sample(
        (one for one in all_pii if one.end <= trained_bytes(index, one.document)), max_samples, seed
    )
    prefix_length, continuation_length = prompt_lengths(model)
    texts = [
        index.read_bytes(one.document, one.start, one.end - one.start).decode("utf-8", "replace") for one in pii_samples
    ]
    prompts = [_tokens_before(index, model.tokenizer, one, prefix_length) for one in pii_samples]
    longest_pii_tokens = max([len(model.tokenizer.encode(" " + text)) for text in texts], default=0)
    completions = generate_completions(
        model, prompts, Sampling(temperature=0.0, max_tokens=max(1, min(longest_pii_tokens + 4, 2 * continuation_length - 1))),
        lambda done, of: console.progress("asking for personal data", done, of),
    )  # fmt: skip
    leaked = [
        (one, text) for one, text, answer in zip(pii_samples, texts, completions, strict=True) if text in answer.text
    ]
    return Finding(
        "memory", "personal data that it gives away", len(leaked), unit="data", n=len(pii_samples), reference=0.0, notable=bool(leaked),
        note=f"of {len(pii_samples):,} of the {of:,} in the training text, those that it writes after the {prefix_length} tokens before them"
        + _context_limit_note(model),
        examples=_first_distinct(
            {"document": index.document_name(one.document), "kind": one.kind, "masked": mask_pii(one.kind, text)} for one, text in leaked
        ),
    )  # fmt: skip


def trained_bytes(index: CorpusIndex, document: int) -> int:
    """How many bytes of a document the model was trained on."""
    row = index.documents[document]
    return int(row["learned"] - row["begin"])


def _reservoir_sample(items: Iterable[PIIMatch], sample_size: int, seed: int) -> tuple[list[PIIMatch], int]:
    """So many of them, each as likely as any other, and of how many (Vitter 1985, algorithm R)."""
    rng = np.random.default_rng(seed)
    reservoir: list[PIIMatch] = []
    seen = 0
    for seen, one in enumerate(items, start=1):
        if len(reservoir) < sample_size:
            reservoir.append(one)
        elif (slot := int(rng.integers(seen))) < sample_size:
            reservoir[slot] = one
    return sorted(reservoir, key=lambda one: (one.document, one.start)), seen


def _tokens_before(index: CorpusIndex, tokenizer: Tokenizer, pii_match: PIIMatch, prefix_length: int) -> list[int]:
    """The tokens before a datum; without a last space, which its own first token holds."""
    start = max(0, pii_match.start - prefix_length * MAX_BYTES_PER_TOKEN)
    data = index.read_bytes(pii_match.document, start, pii_match.start - start)
    cut = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    return tokenizer.encode(data[cut:].decode("utf-8", "replace").removesuffix(" "))[-prefix_length:]


def _share_finding(
    name: str, score: ScoreWithCI, reference_score: ScoreWithCI | None, *, note: str, examples: tuple[dict[str, str], ...]
) -> Finding:
    """A share in per cent, notable where its interval leaves out that of documents which were not seen, or nothing."""
    reference = None if reference_score is None else 100 * reference_score.value
    return Finding(
        "memory", name, 100 * score.value, 100 * score.low, 100 * score.high, "%", score.n, reference,
        100 * score.low > (reference or 0.0) and score.value > 0, note, examples,
    )  # fmt: skip
