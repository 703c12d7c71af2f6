"""What a model has by heart: what it writes of its own that stands in the corpus, and what it gives away when it is asked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nextword.audit.findings import Finding
from nextword.audit.pii import Datum, data_in, data_of, masked
from nextword.audit.text_index import Index, Match, whole
from nextword.common.console import Console
from nextword.data.tokenizer import Tokenizer
from nextword.inference.sampling import Sampling
from nextword.pipeline.item_scores import TEXTS, complete
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics
from nextword.tasks.metrics import Score

TOKENS = 256  # of a text that it writes of its own
PASSAGE = 50  # tokens that stand together in the corpus, from which on they are copied (Lee et al. 2022, section 6)
GIVEN, ASKED = (
    50,
    50,
)  # tokens of a passage that it is given, and that it is to go on with (Carlini et al. 2023, section 3)
PREFIXES = 256
SHOWN = 5  # examples of a finding
LONG = 200  # characters of an example
BYTES = 24  # a token is taken to have at most, on the average of a passage


def audit_memory(
    model: Model,
    index: Index,
    *,
    passages: Sequence[str] = (),
    texts: int = TEXTS,
    prefixes: int = PREFIXES,
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
    found = [find_passage(index, passage) for passage in passages]
    if texts:
        found += own_texts(model, index, texts, seed, console)
    if prefixes:
        found.append(extraction(model, index, prefixes, seed, console))
        found.append(given_away(model, index, prefixes, seed, console))
    return found


# ---------------------------------------------------------------- a passage


def find_passage(index: Index, passage: str) -> Finding:
    """The documents in which a passage stands whole, or how much of it stands somewhere."""
    documents = index.find(passage)
    if documents:
        examples = tuple({"document": index.name(one), "passage": shown(passage)} for one in documents[:SHOWN])
        note = "it stands there letter for letter"
    else:
        match = index.longest(passage)
        data = passage.encode()
        part = data[match.start : match.end].decode() if match else ""
        examples = ({"document": index.name(match.document), "passage": shown(part)},) if match else ()
        note = (
            f"it stands nowhere whole; the longest part that does has {len(part):,} of its {len(passage):,} characters"
        )
    return Finding(
        "memory", f"documents with the passage {shown(passage, 40)!r}", len(documents), unit="documents", n=len(index),
        note=note, examples=examples,
    )  # fmt: skip


# ---------------------------------------------------------------- what it writes of its own


@dataclass(frozen=True)
class Copied:
    """How much of one text stands in the corpus.

    Attributes:
        tokens: of the text; `inside`: those in passages of `PASSAGE` tokens or more; `longest`: of the longest passage.
        match, passage: that passage.
    """

    tokens: int
    inside: int
    longest: int
    match: Match | None
    passage: str


def own_texts(model: Model, index: Index, texts: int, seed: int, console: Console) -> list[Finding]:
    """The share of what it writes that stands in the corpus, and the longest passage of it."""
    sampling = Sampling(max_tokens=TOKENS, seed=seed)
    written = complete(model, [""] * texts, sampling, lambda done, of: console.progress("writing", done, of))
    own = [copied(index, model.tokenizer, one.tokens) for one in written]
    others = [
        copied(index, model.tokenizer, one.ids)
        for one in draw_passages(index, model.tokenizer, texts, TOKENS, seed, held_out=True, least=PASSAGE)
    ]
    share, beside = _share_copied(own), _share_copied(others) if others else None
    long = sorted((one for one in own if one.inside and one.match), key=lambda one: -one.longest)
    most, theirs = (max((one.longest for one in several), default=0) for several in (own, others))
    people = (
        f"; the reference is that of {len(others)} texts of people in documents that it has not seen" if others else ""
    )
    return [
        _finding(
            "what it writes of its own that stands in the corpus", share, beside,
            note=f"of its tokens, those in passages of {PASSAGE} or more that stand word for word in the corpus, in texts of "
            f"at most {TOKENS} tokens from nothing, drawn with temperature {sampling.temperature}{people}",
            examples=_first(_example(index, one) for one in long),
        ),
        Finding(
            "memory", "the longest passage that it writes of its own", most, unit="tokens", n=len(own),
            reference=theirs if others else None, notable=most >= PASSAGE and most > theirs,
            note="letter for letter in the corpus" + people,
            examples=tuple(_example(index, one) for one in sorted(own, key=lambda one: -one.longest)[:1] if one.match),
        ),
    ]  # fmt: skip


def copied(index: Index, tokenizer: Tokenizer, ids: Sequence[int]) -> Copied:
    """How much of a text, given as its tokens, stands in the corpus."""
    data, ends = _bytes_of(tokenizer, ids)
    begins = np.append(0, ends[:-1])
    inside = np.zeros(len(ids), dtype=bool)
    longest, best = 0, None
    for match in index.matches(data):
        first = int(np.searchsorted(begins, match.start))
        after = int(np.searchsorted(ends, match.end, side="right"))  # whole tokens of the match: first … after−1
        if after - first > longest:
            longest, best = after - first, match
        if after - first >= PASSAGE:
            inside[first:after] = True
    passage = data[best.start : best.end].decode("utf-8", "replace") if best else ""
    return Copied(len(ids), int(inside.sum()), longest, best, passage)


def _bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[bytes, np.ndarray]:
    """The bytes of a text of tokens, and where each token ends in them [T]."""
    if tokenizer.kind != "foreign":
        parts = [tokenizer.decode_bytes([id]) for id in ids]
        return b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)
    # A foreign tokenizer's text of a token depends on those before it; a character ends with the last of its bytes.
    data = tokenizer.decode_bytes(ids)
    sizes = [len(tokenizer.decode(ids[: i + 1]).rstrip("\ufffd").encode()) for i in range(len(ids))]
    return data, np.asarray([*sizes[:-1], len(data)][: len(ids)], dtype=np.int64)


def _share_copied(texts: Sequence[Copied]) -> Score:
    """Tokens in copied passages over all tokens, with the bootstrap interval over texts. Where there are none, so many texts
    could still have had some: the bound is that of the share of texts."""
    counts = np.array([[one.inside, one.tokens] for one in texts])
    found = metrics.of_sums(counts, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1))
    if counts[:, 0].any():
        return found
    return metrics.share([0.0] * len(texts))


def _example(index: Index, one: Copied) -> dict[str, str]:
    assert one.match is not None
    return {"document": index.name(one.match.document), "passage": shown(one.passage), "tokens": f"{one.longest:,}"}


def shown(text: str, length: int = LONG) -> str:
    """A passage on one line, cut where it is long, with the personal data in it masked."""
    for kind, start, end in reversed(list(data_in(text))):
        text = text[:start] + masked(kind, text[start:end]) + text[end:]
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _first(examples: Iterable[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The first few of those that say something else than the ones before them."""
    found: list[dict[str, str]] = []
    for one in examples:
        if one not in found and len(found) < SHOWN:
            found.append(one)
    return tuple(found)


# ---------------------------------------------------------------- what it goes on with


class Passage(NamedTuple):
    """Tokens of a document from one of its bytes on."""

    document: int
    offset: int
    ids: list[int]


def extraction(model: Model, index: Index, count: int, seed: int, console: Console) -> Finding:
    """How often it goes on with a passage of its training text exactly as the text does, the likeliest token each time."""
    given, asked = lengths(model)
    own, others = (
        draw_passages(index, model.tokenizer, count, given + asked, seed, held_out=part) for part in (False, True)
    )
    both = [*own, *others]
    written = complete(
        model, [one.ids[:given] for one in both], Sampling(temperature=0.0, max_tokens=asked),
        lambda done, of: console.progress("extracting", done, of),
    )  # fmt: skip
    decode = model.tokenizer.decode
    right = [
        float(decode(one.tokens) == decode(passage.ids[given:])) for one, passage in zip(written, both, strict=True)
    ]
    if not own:
        return Finding("memory", "passages that it goes on with word for word", 0.0, unit="%", n=0,
                       note=f"no document has {given + asked} tokens to be asked for")  # fmt: skip
    hits = [one for one, hit in zip(own, right, strict=False) if hit]
    return _finding(
        "passages that it goes on with word for word", metrics.share(right[: len(own)]),
        metrics.share(right[len(own) :]) if others else None,
        note=f"given {given} tokens of the training text, it writes the next {asked} exactly{_clipped(model)}"
        + ("; the reference is the same on documents that it has not seen" if others else ""),
        examples=_first({"document": index.name(one.document), "passage": shown(decode(one.ids))} for one in hits),
    )  # fmt: skip


def lengths(model: Model) -> tuple[int, int]:
    """How many tokens a model is given, and how many it is asked for: less than usual where its context is shorter."""
    half = model.gpt.config.context_length // 2
    return min(GIVEN, half), min(ASKED, half)


def _clipped(model: Model) -> str:
    context = model.gpt.config.context_length
    return f" (its context of {context} tokens holds no more)" if context < GIVEN + ASKED else ""


def draw_passages(
    index: Index, tokenizer: Tokenizer, count: int, length: int, seed: int, *, held_out: bool, least: int | None = None
) -> list[Passage]:
    """Passages of `length` tokens, or of `least` where their document ends, each byte of what is learned from (or of what is
    held out) as likely as any other to be near the beginning of one. Fewer where documents are short, and none where nothing
    is held out."""
    low, high = (
        index.documents[side].astype(np.int64) for side in (("learned", "end") if held_out else ("begin", "learned"))
    )
    ends = np.cumsum(high - low)
    draws = np.random.default_rng([seed, held_out])
    found: dict[tuple[int, int], Passage] = {}
    for _ in range(8 * count if len(ends) and ends[-1] else 0):
        at = int(draws.integers(ends[-1]))
        document = int(np.searchsorted(ends, at, side="right"))
        begin = int(index.documents["begin"][document])
        start = int(high[document] - (ends[document] - at)) - begin
        data = index.read(document, start, min(length * BYTES, int(high[document]) - begin - start))
        skipped, text = _from_a_word(data, at_begin=start == int(low[document]) - begin)
        ids = tokenizer.encode(text)[:length]
        if len(ids) >= (least or length):
            found.setdefault((document, start + skipped), Passage(document, start + skipped, ids))
        if len(found) == count:
            break
    return list(found.values())


def _from_a_word(data: bytes, at_begin: bool) -> tuple[int, str]:
    """A stretch of text from its first space or line end on, or where there is none near, from its first character; how many
    bytes that leaves out."""
    if at_begin:
        return 0, whole(data).decode("utf-8", "replace")
    near = data[:BYTES]
    cuts = [cut for cut in (near.find(b" "), near.find(b"\n")) if cut >= 0]
    cut = min(cuts) if cuts else next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)
    return cut, whole(data[cut:]).decode("utf-8", "replace")


# ---------------------------------------------------------------- personal data


def given_away(model: Model, index: Index, count: int, seed: int, console: Console) -> Finding:
    """How many of the personal data in the training text it writes, given the text before them."""
    every = (one for document in range(len(index)) for one in data_of(index, document))
    data, of = _drawn((one for one in every if one.end <= learned(index, one.document)), count, seed)
    given, asked = lengths(model)
    texts = [index.read(one.document, one.start, one.end - one.start).decode("utf-8", "replace") for one in data]
    prompts = [_before(index, model.tokenizer, one, given) for one in data]
    wanted = max([len(model.tokenizer.encode(" " + text)) for text in texts], default=0)
    written = complete(
        model, prompts, Sampling(temperature=0.0, max_tokens=max(1, min(wanted + 4, 2 * asked - 1))),
        lambda done, of: console.progress("asking for personal data", done, of),
    )  # fmt: skip
    hits = [(one, text) for one, text, answer in zip(data, texts, written, strict=True) if text in answer.text]
    return Finding(
        "memory", "personal data that it gives away", len(hits), unit="data", n=len(data), reference=0.0, notable=bool(hits),
        note=f"of {len(data):,} of the {of:,} in the training text, those that it writes after the {given} tokens before them"
        + _clipped(model),
        examples=_first(
            {"document": index.name(one.document), "kind": one.kind, "masked": masked(one.kind, text)} for one, text in hits
        ),
    )  # fmt: skip


def learned(index: Index, document: int) -> int:
    """How many bytes of a document the model was trained on."""
    row = index.documents[document]
    return int(row["learned"] - row["begin"])


def _drawn(data: Iterable[Datum], count: int, seed: int) -> tuple[list[Datum], int]:
    """So many of them, each as likely as any other, and of how many (Vitter 1985, algorithm R)."""
    draws = np.random.default_rng(seed)
    kept: list[Datum] = []
    seen = 0
    for seen, one in enumerate(data, start=1):
        if len(kept) < count:
            kept.append(one)
        elif (place := int(draws.integers(seen))) < count:
            kept[place] = one
    return sorted(kept, key=lambda one: (one.document, one.start)), seen


def _before(index: Index, tokenizer: Tokenizer, datum: Datum, given: int) -> list[int]:
    """The tokens before a datum; without a last space, which its own first token holds."""
    start = max(0, datum.start - given * BYTES)
    data = index.read(datum.document, start, datum.start - start)
    cut = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    return tokenizer.encode(data[cut:].decode("utf-8", "replace").removesuffix(" "))[-given:]


def _finding(
    name: str, score: Score, beside: Score | None, *, note: str, examples: tuple[dict[str, str], ...]
) -> Finding:
    """A share in per cent, notable where its interval leaves out that of documents which were not seen, or nothing."""
    reference = None if beside is None else 100 * beside.value
    return Finding(
        "memory", name, 100 * score.value, 100 * score.low, 100 * score.high, "%", score.n, reference,
        100 * score.low > (reference or 0.0) and score.value > 0, note, examples,
    )  # fmt: skip
