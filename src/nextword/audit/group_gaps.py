"""What a language model makes of a person's own groups: how well it predicts sentences about each, and what it expects of them.

For groups a and b, sentences s, the text s_a with the words of a, and a continuation c:

    bits per byte     Σ_s −log₂ P(s_a) / Σ_s bytes(s_a), and its difference between a and b
    sentences         mean over s of ln P(s_a) − ln P(s_b)
    continuation c    mean over s of ln P(c | s_a) − ln P(c | s_b)

What the resamples of the intervals draw are templates, of all groups the same ones; and where slots have lists of words, places
of the lists: of the two intervals the wider one is told.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from nextword.audit.bias import FEWEST, scored
from nextword.audit.findings import Finding
from nextword.audit.group_templates import Groups, Sentence
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.inference.loglikelihood import Scorer
from nextword.pipeline.language_model import Model
from nextword.tasks import metrics
from nextword.tasks.metrics import Score

SHOWN = 3  # sentences that are shown for a gap, the widest ones
SMALL = (
    0.1  # nats, a tenth likelier: any two words of a model differ by something, and by less than this nobody need care
)


def audit_gaps(model: Model, groups: Groups, console: Console | None = None) -> list[Finding]:
    """Bits per byte of each group, and of each pair of groups the difference, the log ratio of their sentences, and that of
    every continuation.

    Raises:
        UsageError: a sentence is longer than what the model sees at once.
    """
    console = console or Console(quiet=True)
    room = model.gpt.config.context_length
    for text in (text for sentence in groups.sentences for text in sentence.texts.values()):
        if (count := len(model.tokenizer.encode(text))) > room:
            raise UsageError(f"{groups.path}: {text!r} has {count} tokens and the model sees {room}: shorten it")
    scorer = Scorer(model.weights, model.tokenizer)
    return [*_sentences(scorer, groups, console), *_continuations(scorer, groups, console)]


def _sentences(scorer: Scorer, groups: Groups, console: Console) -> list[Finding]:
    texts = [[sentence.texts[name] for name in groups.names] for sentence in groups.sentences]
    likely = scorer.ask(
        [[("", text) for text in row] for row in texts], lambda i, n: console.progress("sentences about groups", i, n)
    )
    nats = {name: np.array([row[i].nats for row in likely]) for i, name in enumerate(groups.names)}  # [S] each
    sizes = {name: np.array([len(row[i].encode()) for row in texts]) for i, name in enumerate(groups.names)}

    def per_byte(*names: str) -> Score:
        """Bits per byte of a group, or by how much it has more of them than another."""
        columns = np.stack([column for name in names for column in (-nats[name] / math.log(2), sizes[name])], 1)
        return _spread(groups.sentences, columns, lambda sums: _per_byte(sums[:, :2]) - _per_byte(sums[:, 2:]))

    found = []
    for name in groups.names:
        note = "of the sentences with their words"
        found.append(scored(f"{name}: bits per byte", per_byte(name), unit="bits/byte", note=note))
    for one, other in groups.pairs:
        note = "the same sentences; words that are rare, or short, take more"
        found.append(scored(f"{one} less {other}: bits per byte", per_byte(one, other), unit="bits/byte", note=note))
        what, more = f"sentences with {one}'s words", "; common words are likelier"
        gaps = nats[one] - nats[other]
        found.append(_gap(f"{one}, {other}: sentences", what, gaps, groups.sentences, one, other, more))
    return found


def _per_byte(sums: np.ndarray) -> np.ndarray:
    """Bits by bytes [R] of sums [R, 2]; 0 of none [R, 0]."""
    return sums[:, 0] / sums[:, 1] if sums.shape[1] else np.zeros(len(sums))


def _continuations(scorer: Scorer, groups: Groups, console: Console) -> list[Finding]:
    asked = [
        (sentence, name, continuation)
        for sentence in groups.sentences for name in groups.names for continuation in sentence.continuations
    ]  # fmt: skip
    if not asked:
        return []
    questions: dict[tuple[int, str], list[tuple[str, str]]] = {}  # what follows one text stands in one question
    for sentence, name, continuation in asked:
        pair = (sentence.texts[name], groups.delimiter + sentence.continuations[continuation][name])
        questions.setdefault((id(sentence), name), []).append(pair)
    likely = scorer.ask(list(questions.values()), lambda i, n: console.progress("continuations after groups", i, n))
    flat = (one.nats for row in likely for one in row)
    nats = dict(zip(((id(s), name, c) for s, name, c in asked), flat, strict=True))
    found = []
    for one, other in groups.pairs:
        for continuation in dict.fromkeys(c for sentence in groups.sentences for c in sentence.continuations):
            having = [sentence for sentence in groups.sentences if continuation in sentence.continuations]
            gaps = np.array([nats[id(s), one, continuation] - nats[id(s), other, continuation] for s in having])
            what = f"“{continuation}” after {one}'s words"
            found.append(_gap(f"{one}, {other}: “{continuation}”", what, gaps, having, one, other))
    return found


def _gap(
    name: str, what: str, gaps: np.ndarray, sentences: Sequence[Sentence], one: str, other: str, more: str = ""
) -> Finding:
    """The mean of log ratios [S] between two groups, and the sentences in which they are widest."""
    columns = np.stack([gaps, np.ones(len(gaps))], 1)
    score = _spread(sentences, columns, lambda sums: sums[:, 0] / sums[:, 1])
    widest = sorted(zip(sentences, gaps.tolist(), strict=True), key=lambda row: -abs(row[1]))[:SHOWN]
    examples = [{one: s.texts[one], other: s.texts[other], "gap": f"{gap:+.2f} nats"} for s, gap in widest]
    times = f"{math.exp(min(score.value, 700.0)):.2g} times"
    note = f"ln P of {what} less {other}'s: {times} as likely{more}"
    return scored(name, score, 0.0, unit="nats", note=note, small=SMALL, examples=examples)


def _spread(sentences: Sequence[Sentence], columns: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> Score:
    """A score from sums of columns [S, k], with the wider of the intervals over templates and over places in lists of words,
    as far as there are enough of either."""
    found = []
    for keys in ([sentence.template for sentence in sentences], [sentence.place for sentence in sentences]):
        which = np.unique(np.asarray(keys), return_inverse=True)[1]  # [S]
        sums = np.stack([np.bincount(which, column) for column in columns.T], 1)  # [templates or places, k]
        found.append(metrics.of_sums(sums, score))
    enough = [one for one in found if one.n >= FEWEST]
    return max(enough or found, key=lambda one: (one.high - one.low, one.n))
