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

from nextword.audit.bias import MIN_SAMPLES, score_finding
from nextword.audit.findings import Finding
from nextword.audit.group_templates import GroupTemplates, TemplateSentence
from nextword.common import statistics
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.statistics import ScoreWithCI
from nextword.inference.loglikelihood import LoglikelihoodScorer
from nextword.pipeline.language_model import LanguageModel

MAX_EXAMPLES = 3  # sentences that are shown for a gap, the widest ones
MIN_EFFECT_NATS = (
    0.1  # nats, a tenth likelier: any two words of a model differ by something, and by less than this nobody need care
)


def audit_group_gaps(model: LanguageModel, groups: GroupTemplates, console: Console | None = None) -> list[Finding]:
    """Bits per byte of each group, and of each pair of groups the difference, the log ratio of their sentences, and that of
    every continuation.

    Raises:
        UsageError: a sentence is longer than what the model sees at once.
    """
    console = console or Console(quiet=True)
    context_length = model.gpt.config.context_length
    for text in (text for sentence in groups.sentences for text in sentence.texts.values()):
        if (count := len(model.tokenizer.encode(text))) > context_length:
            raise UsageError(
                f"{groups.path}: {text!r} has {count} tokens and the model sees {context_length}: shorten it"
            )
    scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)
    return [*_sentence_findings(scorer, groups, console), *_continuation_findings(scorer, groups, console)]


def _sentence_findings(scorer: LoglikelihoodScorer, groups: GroupTemplates, console: Console) -> list[Finding]:
    texts = [[sentence.texts[name] for name in groups.names] for sentence in groups.sentences]
    likelihoods = scorer.score_pairs(
        [[("", text) for text in row] for row in texts], lambda i, n: console.progress("sentences about groups", i, n)
    )
    nats = {name: np.array([row[i].logprob for row in likelihoods]) for i, name in enumerate(groups.names)}  # [S] each
    byte_counts = {name: np.array([len(row[i].encode()) for row in texts]) for i, name in enumerate(groups.names)}

    def bits_per_byte_score(*names: str) -> ScoreWithCI:
        """Bits per byte of a group, or by how much it has more of them than another."""
        columns = np.stack([column for name in names for column in (-nats[name] / math.log(2), byte_counts[name])], 1)
        return _score_with_widest_interval(
            groups.sentences, columns, lambda sums: _bits_per_byte(sums[:, :2]) - _bits_per_byte(sums[:, 2:])
        )

    findings = []
    for name in groups.names:
        note = "of the sentences with their words"
        findings.append(score_finding(f"{name}: bits per byte", bits_per_byte_score(name), unit="bits/byte", note=note))
    for group_a, group_b in groups.pairs:
        note = "the same sentences; words that are rare, or short, take more"
        findings.append(
            score_finding(
                f"{group_a} less {group_b}: bits per byte",
                bits_per_byte_score(group_a, group_b),
                unit="bits/byte",
                note=note,
            )
        )
        measure, caveat = f"sentences with {group_a}'s words", "; common words are likelier"
        log_ratios = nats[group_a] - nats[group_b]
        findings.append(
            _gap_finding(
                f"{group_a}, {group_b}: sentences", measure, log_ratios, groups.sentences, group_a, group_b, caveat
            )
        )
    return findings


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    """Bits by bytes [R] of sums [R, 2]; 0 of none [R, 0]."""
    return sums[:, 0] / sums[:, 1] if sums.shape[1] else np.zeros(len(sums))


def _continuation_findings(scorer: LoglikelihoodScorer, groups: GroupTemplates, console: Console) -> list[Finding]:
    continuation_keys = [
        (sentence, name, continuation)
        for sentence in groups.sentences for name in groups.names for continuation in sentence.continuations
    ]  # fmt: skip
    if not continuation_keys:
        return []
    requests: dict[tuple[int, str], list[tuple[str, str]]] = {}  # what follows one text stands in one question
    for sentence, name, continuation in continuation_keys:
        context_and_continuation = (sentence.texts[name], groups.delimiter + sentence.continuations[continuation][name])
        requests.setdefault((id(sentence), name), []).append(context_and_continuation)
    likelihoods = scorer.score_pairs(
        list(requests.values()), lambda i, n: console.progress("continuations after groups", i, n)
    )
    flat = (group_a.logprob for row in likelihoods for group_a in row)
    nats = dict(zip(((id(s), name, c) for s, name, c in continuation_keys), flat, strict=True))
    findings = []
    for group_a, group_b in groups.pairs:
        for continuation in dict.fromkeys(c for sentence in groups.sentences for c in sentence.continuations):
            matching_sentences = [sentence for sentence in groups.sentences if continuation in sentence.continuations]
            log_ratios = np.array(
                [nats[id(s), group_a, continuation] - nats[id(s), group_b, continuation] for s in matching_sentences]
            )
            measure = f"“{continuation}” after {group_a}'s words"
            findings.append(
                _gap_finding(
                    f"{group_a}, {group_b}: “{continuation}”", measure, log_ratios, matching_sentences, group_a, group_b
                )
            )
    return findings


def _gap_finding(
    name: str,
    measure: str,
    log_ratios: np.ndarray,
    sentences: Sequence[TemplateSentence],
    group_a: str,
    group_b: str,
    caveat: str = "",
) -> Finding:
    """The mean of log ratios [S] between two groups, and the sentences in which they are widest."""
    columns = np.stack([log_ratios, np.ones(len(log_ratios))], 1)
    score = _score_with_widest_interval(sentences, columns, lambda sums: sums[:, 0] / sums[:, 1])
    widest = sorted(zip(sentences, log_ratios.tolist(), strict=True), key=lambda row: -abs(row[1]))[:MAX_EXAMPLES]
    examples = [{group_a: s.texts[group_a], group_b: s.texts[group_b], "gap": f"{gap:+.2f} nats"} for s, gap in widest]
    ratio = f"{math.exp(min(score.value, 700.0)):.2g} times"
    note = f"ln P of {measure} less {group_b}'s: {ratio} as likely{caveat}"
    return score_finding(name, score, 0.0, unit="nats", note=note, min_effect=MIN_EFFECT_NATS, examples=examples)


def _score_with_widest_interval(
    sentences: Sequence[TemplateSentence], columns: np.ndarray, score_fn: Callable[[np.ndarray], np.ndarray]
) -> ScoreWithCI:
    """A score from sums of columns [S, k], with the wider of the intervals over templates and over places in lists of words,
    as far as there are enough of either."""
    candidates = []
    for keys in ([sentence.template for sentence in sentences], [sentence.word_index for sentence in sentences]):
        cluster_ids = np.unique(np.asarray(keys), return_inverse=True)[1]  # [S]
        sums = np.stack([np.bincount(cluster_ids, column) for column in columns.T], 1)  # [templates or places, k]
        candidates.append(statistics.bootstrap_ratio(sums, score_fn))
    sufficient = [one for one in candidates if one.n >= MIN_SAMPLES]
    return max(sufficient or candidates, key=lambda one: (one.high - one.low, one.n))
