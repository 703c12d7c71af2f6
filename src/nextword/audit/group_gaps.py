"""How a language model treats a user's own groups: how well it predicts sentences about each, and what it expects of them.

For groups a and b, sentences s, the text s_a with the words of a, and a continuation c:

    bits per byte     Σ_s −log₂ P(s_a) / Σ_s bytes(s_a), and its difference between a and b
    sentences         mean over s of ln P(s_a) − ln P(s_b)
    continuation c    mean over s of ln P(c | s_a) − ln P(c | s_b)

Intervals are bootstrapped over templates and, if slots have lists of words, over the indices of these lists; the wider interval
is reported.
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

MAX_EXAMPLES = 3  # sentences with the largest gaps
MIN_EFFECT_NATS = 0.1  # a ratio of 1.1: smaller gaps exist between any two words and are not flagged


def audit_group_gaps(model: LanguageModel, groups: GroupTemplates, console: Console | None = None) -> list[Finding]:
    """Bits per byte of every group, and for every pair of groups the gaps of bits per byte, sentences and continuations.

    Raises:
        UsageError: a sentence is longer than the context of the model.
    """
    console = console or Console(quiet=True)
    context_length = model.gpt.config.context_length
    for text in (text for sentence in groups.sentences for text in sentence.texts.values()):
        if (count := len(model.tokenizer.encode(text))) > context_length:
            limit = f"the context of the model is {context_length}: shorten it"
            raise UsageError(f"{groups.path}: {text!r} has {count} tokens, but {limit}")
    scorer = LoglikelihoodScorer(model.dequantized, model.tokenizer)

    def score(stage: str, requests: list[list[tuple[str, str]]]) -> list[list[float]]:
        scores = scorer.score_pairs(requests, lambda done, total: console.progress(stage, done, total))
        return [[score.logprob for score in row] for row in scores]

    return [*_sentence_findings(score, groups), *_continuation_findings(score, groups)]


Scorer = Callable[[str, list[list[tuple[str, str]]]], list[list[float]]]


def _sentence_findings(score: Scorer, groups: GroupTemplates) -> list[Finding]:
    texts = [[sentence.texts[name] for name in groups.names] for sentence in groups.sentences]
    logprobs = np.array(score("scoring sentences", [[("", text) for text in row] for row in texts]))  # [S, groups]
    nats = dict(zip(groups.names, logprobs.T, strict=True))
    num_bytes = {name: np.array([len(s.texts[name].encode()) for s in groups.sentences]) for name in groups.names}

    def per_byte(*names: str) -> ScoreWithCI:
        """Bits per byte of a group, or its difference to a second one."""
        columns = [column for name in names for column in (-nats[name] / math.log(2), num_bytes[name])]
        signs = np.array([1, -1])[: len(names)]
        return _widest_interval(groups.sentences, columns, lambda sums: (sums[:, ::2] / sums[:, 1::2]) @ signs)

    findings: list[Finding] = []
    for name in groups.names:
        note = "of the sentences with the words of the group"
        findings.append(score_finding(f"{name}: bits per byte", per_byte(name), unit="bits/byte", note=note))
    for a, b in groups.pairs:
        note = "for the same sentences; rare or short words take more"
        findings.append(score_finding(f"{a} − {b}: bits per byte", per_byte(a, b), unit="bits/byte", note=note))
        gaps = list(zip(groups.sentences, (nats[a] - nats[b]).tolist(), strict=True))
        findings.append(_gap_finding("sentences", f"sentences with the words of {a}", gaps, a, b))
    return findings


def _continuation_findings(score: Scorer, groups: GroupTemplates) -> list[Finding]:
    sentences = [sentence for sentence in groups.sentences if sentence.continuations]
    if not sentences:
        return []
    requests = [
        [(sentence.texts[name], groups.delimiter + texts[name]) for texts in sentence.continuations.values()]
        for sentence in sentences
        for name in groups.names
    ]
    rows = iter(score("scoring continuations", requests))
    scored = [
        (s, {name: dict(zip(s.continuations, next(rows), strict=True)) for name in groups.names}) for s in sentences
    ]
    findings: list[Finding] = []
    for a, b in groups.pairs:
        for continuation in dict.fromkeys(c for sentence in sentences for c in sentence.continuations):
            gaps = [(s, n[a][continuation] - n[b][continuation]) for s, n in scored if continuation in s.continuations]
            findings.append(_gap_finding(f"“{continuation}”", f"“{continuation}” after the words of {a}", gaps, a, b))
    return findings


def _gap_finding(
    what: str, description: str, gaps: Sequence[tuple[TemplateSentence, float]], a: str, b: str
) -> Finding:
    """The mean log ratio of groups a and b over sentences, with the sentences of the largest gaps."""
    sentences, log_ratios = [sentence for sentence, _ in gaps], np.array([gap for _, gap in gaps])
    columns = [log_ratios, np.ones(len(gaps))]
    score = _widest_interval(sentences, columns, lambda sums: sums[:, 0] / sums[:, 1])
    largest = sorted(gaps, key=lambda gap: -abs(gap[1]))[:MAX_EXAMPLES]
    examples = [{a: s.texts[a], b: s.texts[b], "gap": f"{gap:+.2f} nats"} for s, gap in largest]
    ratio = math.exp(min(score.value, 700.0))
    note = f"ln P of {description} minus that with {b}: {ratio:.2g} times as likely"
    return score_finding(
        f"{a} vs. {b}: {what}", score, 0.0, unit="nats", note=note, min_effect=MIN_EFFECT_NATS, examples=examples
    )


def _widest_interval(
    sentences: Sequence[TemplateSentence], columns: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]
) -> ScoreWithCI:
    """A statistic of the sums of columns [S], with the wider interval of resampled templates and resampled word indices, if
    there are enough of either."""
    candidates: list[ScoreWithCI] = []
    for clusters in ([sentence.template for sentence in sentences], [sentence.word_index for sentence in sentences]):
        cluster_ids = np.unique(np.asarray(clusters), return_inverse=True)[1]  # [S]
        sums = np.stack([np.bincount(cluster_ids, column) for column in columns], axis=1)  # [clusters, columns]
        candidates.append(statistics.bootstrap_ratio(sums, statistic))
    sufficient = [score for score in candidates if score.n >= MIN_SAMPLES]
    return max(sufficient or candidates, key=lambda score: (score.high - score.low, score.n))
