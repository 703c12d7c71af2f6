"""How likely a model finds texts that follow others: many at once, each number as if it were alone.

What the texts of one question begin with alike is read once: its tokens, then the rest of each text, stand side by side, and no
text sees another's part. Such trees fill rows, and rows batches. Logits are made where a word is asked for and nowhere else.

Shapes: B rows in a batch, T tokens of a row, N = B · T, P positions whose logits are made, D model width, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import NextwordError, UsageError
from nextword.data.tokenizer import Tokenizer
from nextword.inference.perplexity import evaluation_mode
from nextword.model import fused
from nextword.model.fused import FusedGPT
from nextword.model.gpt import GPT

DEVICE_BATCH_TOKENS = {"cpu": 1024}  # that go through the model at once: on a CPU what its caches hold
DEFAULT_BATCH_TOKENS = 16384  # anywhere else
ROW_TOKENS = 128  # tokens that a row of several trees has
MAX_TREE_TOKENS = 512  # tokens of a tree, where its texts are short enough
LOGIT_TILE = (512, 2048)  # positions and words whose logits are made at once: 4 MB

ProgressCallback = Callable[[int, int], None]


class ScoredSequence(NamedTuple):
    """Token ids, and how many of them, the last ones, are to be predicted."""

    token_ids: list[int]
    num_targets: int


class ContinuationScore(NamedTuple):
    """log P of what was asked of a text in nats, its tokens, and whether each of them is the likeliest where it stands."""

    logprob: float
    num_tokens: int
    is_greedy: bool


class PrefixTree(NamedTuple):
    """Texts by what they begin with alike, and their own parts one after the other.

    tokens, positions [n]; begins [n], where the part that a token belongs to begins (0 for what is shared); shared, how many
    tokens they all begin with; and for each word that is asked for the token [m] it follows, its id [m], and which of the
    texts [m] it belongs to, counted over all.
    """

    tokens: np.ndarray
    positions: np.ndarray
    branch_starts: np.ndarray
    prefix_length: int
    predictor_positions: np.ndarray
    target_ids: np.ndarray
    sequence_ids: np.ndarray


class LoglikelihoodScorer:
    """Log-likelihoods of texts under a model.

    Args:
        greedy: also find out whether each text is what the model would write itself.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, check_greedy: bool = False):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "this is not the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer, self.check_greedy = model, tokenizer, check_greedy
        self.fused_model = FusedGPT(model) if fused.is_available(model) else None

    # ------------------------------------------------------------ text to tokens

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[ScoredSequence]:
        """Contexts and continuations as tokens, by lm-eval's rules (`TemplateLM._encode_pair`), so that scores are its own.

        Spaces at a context's end go to the continuation; the two are encoded together, cut at the length of the context
        encoded alone, and what is after the cut follows the context. Without a context the tokenizer's beginning of a text
        stands in its place, or its end. Of what is longer than the model's context the end is kept.
        """
        stripped_pairs = [(context_ids := one.rstrip(), one[len(context_ids) :] + two) for one, two in pairs]
        distinct = list(dict.fromkeys(text for one, two in stripped_pairs for text in (one, one + two)))
        ids = dict(zip(distinct, (found.tolist() for found in self.tokenizer.encode_batch(distinct)), strict=True))
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        found = []
        for one, two in stripped_pairs:
            context_ids, full_ids = [*begin, *ids[one]], [*begin, *ids[one + two]]
            if not one or not context_ids:
                context_ids, full_ids = [self.prefix_token_id], [self.prefix_token_id, *ids[one + two]]
            continuation_ids = (
                full_ids[len(context_ids) :] or full_ids[-1:]
            )  # what melts into the context altogether is one token with its end
            found.append(self.truncate([*context_ids, *continuation_ids], len(continuation_ids)))
        return found

    def truncate(self, ids: list[int], num_targets: int) -> ScoredSequence:
        """Tokens of which the last are asked, cut to what the model can see."""
        ids = ids[-(self.model.config.context_length + 1) :]
        return ScoredSequence(ids, min(num_targets, len(ids) - 1))

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows: that which begins a text, or where there is none ends one."""
        bos_token = self.tokenizer.config.get("bos_token")
        bos_token = bos_token.get("content") if isinstance(bos_token, dict) else bos_token
        return self.tokenizer.special_tokens.get(str(bos_token), self.tokenizer.eos_id)

    # ------------------------------------------------------------ through the model

    def score_pairs(
        self, pair_groups: Sequence[Sequence[tuple[str, str]]], progress: ProgressCallback | None = None
    ) -> list[list[ContinuationScore]]:
        """How likely each continuation is after its context, question by question."""
        texts = iter(self.encode_pairs([pair for question in pair_groups for pair in question]))
        return self.score_sequences([[next(texts) for _ in question] for question in pair_groups], progress)

    def score_sequences(
        self, sequence_groups: Sequence[Sequence[ScoredSequence]], progress: ProgressCallback | None = None
    ) -> list[list[ContinuationScore]]:
        """How likely what is asked of each text is; texts that begin alike should stand in one question.

        Raises:
            NextwordError: the model's logits are not finite numbers.
        """
        trees, count = self.build_trees(sequence_groups), sum(map(len, sequence_groups))
        nats, greedy = np.zeros(count), np.ones(count, dtype=bool)
        done = 0
        with evaluation_mode(self.model):
            max_tokens = DEVICE_BATCH_TOKENS.get(self.model.unembedding.device.type, DEFAULT_BATCH_TOKENS)
            for batch in pack_batches(trees, max_tokens):
                found, likeliest, texts = self.score_rows(batch)
                nats += np.bincount(texts, found, minlength=count)
                np.logical_and.at(greedy, texts, likeliest)
                done += sum(map(len, batch))
                if progress is not None:
                    progress(done, len(trees))
        if not np.isfinite(nats).all():
            raise NextwordError("a likelihood is not a finite number: the model's weights are damaged, or it diverged")
        flat = iter(zip(nats.tolist(), greedy.tolist(), strict=True))
        return [
            [ContinuationScore(n, text.num_targets, g) for text, (n, g) in zip(q, flat, strict=False)]
            for q in sequence_groups
        ]

    def build_trees(self, sequence_groups: Sequence[Sequence[ScoredSequence]]) -> list[PrefixTree]:
        """Trees of the texts of each question; texts are counted over all."""
        trees, first = [], 0
        for question in sequence_groups:
            for part in self._group_by_prefix(question):
                trees.append(build_tree([question[i] for i in part], [first + i for i in part]))
            first += len(question)
        return trees

    def _group_by_prefix(self, sequences: Sequence[ScoredSequence]) -> Iterator[list[int]]:
        """The texts of a question in groups that are worth a tree, and not too long for one. (A tree may be longer than the
        model's context: its texts are not.)

        A token that is shared is spared some 12 D² multiplications in each layer; for a place that a text passes over, being
        another's, each of its own tokens takes 2 D.
        """
        longest, min_saving = max(MAX_TREE_TOKENS, self.model.config.context_length), 6 * self.model.config.d_model
        shared, group, length = 0, [], 0
        for i, text in enumerate(sequences):
            inputs = text.token_ids[:-1]
            common = _common_prefix_length(sequences[group[0]].ids[:-1], inputs, shared) if group else len(inputs)
            # What is shared by fewer tokens now stands once more for each of those that were in the group.
            before = length + (shared - common) * (len(group) - 1) if group else common
            longer, own = before + len(inputs) - common, len(inputs) - common
            if group and (longer > longest or min_saving * common < own * (before - common)):
                yield group
                group, common, longer = [], len(inputs), len(inputs)
            group, shared, length = [*group, i], common, longer
        if group:
            yield group

    def score_rows(self, rows: Sequence[Sequence[PrefixTree]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log P of each word that is asked for, whether it is the likeliest, and the text it belongs to; all [words]."""
        width = max(sum(len(one.tokens) for one in row) for row in rows)
        tokens, positions = np.zeros((2, len(rows), width), dtype=np.int64)
        segments = np.full((len(rows), width), -1)
        attention_gaps = np.zeros((len(rows), width, 2), dtype=np.int64)
        after = []
        for r, row in enumerate(rows):
            start = 0
            for number, one in enumerate(row):
                part = slice(start, start + len(one.tokens))
                tokens[r, part], positions[r, part], segments[r, part] = one.tokens, one.positions, number
                attention_gaps[r, part, 0] = start + np.where(one.branch_starts > 0, one.prefix_length, 0)
                attention_gaps[r, part, 1] = start + one.branch_starts
                after.append(r * width + start + one.predictor_positions)
                start = part.stop
        flat = [one for row in rows for one in row]
        asked, which = np.unique(np.concatenate(after), return_inverse=True)  # [P], [words]
        hidden = self._hidden_states(tokens, positions, segments, attention_gaps, asked)  # [P, D]
        nats, likeliest = self._target_logprobs(hidden, which, np.concatenate([one.target_ids for one in flat]))
        return nats, likeliest, np.concatenate([one.sequence_ids for one in flat])

    def _hidden_states(self, *arrays: np.ndarray) -> Tensor:
        """Tokens, positions, segments [B, T] and holes [B, T, 2]; hidden states [P, D] at the places [P] among all tokens."""
        device = self.model.unembedding.device
        ids, at, of, without, asked = (torch.from_numpy(array).to(device) for array in arrays)
        if self.fused_model is not None:
            return self.fused_model(ids, positions=at, segments=of, attention_gaps=without, output_indices=asked)
        return self.model(ids, positions=at, cache=PrefixTreeMask(of, without)).flatten(0, 1)[asked]

    def _target_logprobs(
        self, hidden: Tensor, hidden_indices: np.ndarray, target_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """hidden [P, D]; log P of words [m] at those of the places that they follow [m], and which are the likeliest."""
        order = np.argsort(hidden_indices, kind="stable")
        nats, likeliest = np.empty(len(target_ids)), np.ones(len(target_ids), dtype=bool)
        pieces = max(1, round(len(hidden) / LOGIT_TILE[0]))
        ends = [len(hidden) * i // pieces for i in range(pieces + 1)]
        for start, end in pairwise(ends):
            some = order[slice(*np.searchsorted(hidden_indices[order], (start, end)))]
            at, wanted = (
                torch.from_numpy(one).to(hidden.device) for one in (hidden_indices[some] - start, target_ids[some])
            )
            chosen, most, total = self._tiled_logits(hidden[start:end], at, wanted)
            likeliest[some] = (chosen >= most).cpu().numpy()
            nats[some] = (chosen.double() - total.double()).cpu().numpy()
        return nats, likeliest

    def _tiled_logits(self, hidden: Tensor, row_indices: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of words [m] at rows [m] of hidden states [rows, D], the largest there where that is asked for, and
        log Σ exp of all there; [m] each. The vocabulary is gone through in parts, so that a part's logits are still in the
        cache when they are summed."""
        chosen, sums = hidden.new_empty(len(row_indices)), []
        most = torch.full_like(chosen, -torch.inf)
        for first in range(0, self.model.config.vocab_size, LOGIT_TILE[1]):
            logits = torch.mm(hidden, self.model.unembedding[first : first + LOGIT_TILE[1]].T)  # [rows, columns]
            place = target_ids - first
            inside = (place >= 0) & (place < logits.shape[1])
            chosen[inside] = logits[row_indices[inside], place[inside]]
            if self.check_greedy:
                most = torch.maximum(most, logits.amax(1)[row_indices])
            sums.append(fused.logsumexp(logits))
        return chosen, most, torch.logsumexp(torch.stack(sums), 0)[row_indices]


class PrefixTreeMask:
    """What a tree's tokens see, as a `Cache` of the model that keeps nothing: segments [B, T], holes [B, T, 2]."""

    def __init__(self, segments: Tensor, attention_gaps: Tensor):
        place = torch.arange(segments.shape[1], device=segments.device)
        same = (segments[:, :, None] == segments[:, None, :]) & (place[:, None] >= place)
        hidden = (place >= attention_gaps[:, :, :1]) & (place < attention_gaps[:, :, 1:])
        self.mask = (same & ~hidden)[:, None]  # [B, 1, T, T]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return keys, values, self.mask


# ---------------------------------------------------------------- trees and rows


def build_tree(sequences: Sequence[ScoredSequence], sequence_ids: Sequence[int]) -> PrefixTree:
    """The tree of some texts, which go by numbers."""
    inputs = [text.token_ids[:-1] for text in sequences]
    prefix_length = len(inputs[0])
    for other in inputs[1:]:
        prefix_length = _common_prefix_length(inputs[0], other, prefix_length)
    tokens, positions, branch_starts = (
        [inputs[0][:prefix_length]],
        [np.arange(prefix_length)],
        [np.zeros(prefix_length, dtype=np.int64)],
    )
    predictor_positions, target_ids, owner_ids = [], [], []
    begin = prefix_length
    for text, ids, number in zip(sequences, inputs, sequence_ids, strict=True):
        own = len(ids) - prefix_length
        tokens.append(ids[prefix_length:])
        positions.append(np.arange(prefix_length, len(ids)))
        branch_starts.append(np.full(own, begin))
        place = np.arange(len(ids) - text.num_targets, len(ids))  # in the text itself
        predictor_positions.append(np.where(place < prefix_length, place, place + begin - prefix_length))
        target_ids.append(text.token_ids[len(text.token_ids) - text.num_targets :])
        owner_ids.append(np.full(text.num_targets, number))
        begin += own
    return PrefixTree(
        np.concatenate(tokens).astype(np.int64), np.concatenate(positions), np.concatenate(branch_starts), prefix_length,
        np.concatenate(predictor_positions), np.concatenate(target_ids).astype(np.int64), np.concatenate(owner_ids),
    )  # fmt: skip


def _common_prefix_length(one: Sequence[int], other: Sequence[int], max_length: int) -> int:
    """How many of the first `most` tokens two texts have in common at their beginning."""
    max_length = min(max_length, len(other))
    if one[:max_length] == other[:max_length]:
        return max_length
    return next(i for i in range(max_length) if one[i] != other[i])


def pack_batches(trees: Sequence[PrefixTree], max_tokens: int) -> Iterator[list[list[PrefixTree]]]:
    """The trees in batches of at most so many tokens: in rows of several trees, as full as they get, the longest first."""
    batch: list[list[PrefixTree]] = []
    width = 0  # of the batch's widest row
    for row in pack_rows(trees):
        tokens = sum(len(one.tokens) for one in row)
        if batch and max(width, tokens) * (len(batch) + 1) > max_tokens:
            yield batch
            batch, width = [], 0
        batch.append(row)
        width = max(width, tokens)
    if batch:
        yield batch


def pack_rows(trees: Sequence[PrefixTree]) -> Iterator[list[PrefixTree]]:
    """The trees in rows: each the longest that is left, and then what fits beside it, the longest first (best fit)."""
    remaining: dict[int, list[PrefixTree]] = {}
    for one in trees:
        remaining.setdefault(len(one.tokens), []).append(one)
    lengths = sorted(remaining)
    while lengths:
        row, room = [], max(ROW_TOKENS, lengths[-1])
        while fits := bisect_right(lengths, room):
            length = lengths[fits - 1]
            row.append(remaining[length].pop())
            room -= length
            if not remaining[length]:
                del lengths[fits - 1]
        yield row
