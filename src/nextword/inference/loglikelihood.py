"""Log-likelihoods of continuations under a model, many at once, each equal to the one computed by itself.

The common prefix of the sequences of a group is computed once: its tokens and then the rest of each sequence stand in one row,
and no sequence attends to the rest of another (a prefix tree). Trees are packed into rows, and rows into batches. Logits are
made only for the positions that predict a target.

Shapes: B rows of a batch, T tokens of a row, P positions whose logits are made, M targets, D model width, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextword.common.errors import NextwordError
from nextword.common.fs import is_json_object
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import check_tokenizer
from nextword.inference.kv_cache import common_prefix_length
from nextword.inference.perplexity import evaluation_mode
from nextword.model import ops
from nextword.model.gpt import GPT

DEVICE_BATCH_TOKENS = {"cpu": 1024}  # tokens of a forward pass: on a CPU, what its caches hold
DEFAULT_BATCH_TOKENS = 16384  # on any other device
ROW_TOKENS = 128  # tokens of a row with several trees
MAX_TREE_TOKENS = 512  # tokens of a tree of short sequences
LOGIT_TILE = (512, 2048)  # positions and vocabulary entries whose logits are made at once: 4 MB

ProgressCallback = Callable[[int, int], None]


class ScoredSequence(NamedTuple):
    """A sequence of token ids, the last `num_targets` of which are predicted."""

    token_ids: list[int]
    num_targets: int


class ContinuationScore(NamedTuple):
    """The log-likelihood of a continuation.

    Attributes:
        logprob: Σ log P(x_t | x_<t) over its tokens, in nats.
        num_tokens: Number of its tokens.
        is_greedy: Whether each of them is the model's most likely token.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


class PrefixTree(NamedTuple):
    """Sequences with a common prefix: the prefix, then the rest of each sequence.

    Attributes:
        tokens: Token ids, [n].
        positions: The position of each token in its sequence, [n].
        branch_starts: Where in the tree the rest begins that a token belongs to, [n]; 0 for the prefix.
        prefix_length: Number of tokens of the prefix.
        predictor_positions: The place in the tree of the token before each target, [M].
        target_ids: [M].
        sequence_ids: The sequence of each target, [M].
    """

    tokens: np.ndarray
    positions: np.ndarray
    branch_starts: np.ndarray
    prefix_length: int
    predictor_positions: np.ndarray
    target_ids: np.ndarray
    sequence_ids: np.ndarray


class LoglikelihoodScorer:
    """Scores continuations under a model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        check_greedy: Find out whether greedy decoding would generate each continuation.

    Raises:
        UsageError: The tokenizer has more tokens than the model.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, check_greedy: bool = False):
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer, self.check_greedy = model, tokenizer, check_greedy

    # ------------------------------------------------------------ text to tokens

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[ScoredSequence]:
        """Tokenize contexts and continuations by the rules of lm-eval's `TemplateLM._encode_pair`.

        Spaces at the end of a context move to the continuation. Both are encoded together and split at the length of the
        encoded context. An empty context is replaced by the beginning-of-text token, or by the end-of-text token. Sequences
        longer than the model's context lose their beginning.
        """
        stripped = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
        distinct = list(dict.fromkeys(text for context, rest in stripped for text in (context, context + rest)))
        ids = dict(zip(distinct, (array.tolist() for array in self.tokenizer.encode_batch(distinct)), strict=True))
        begin = self.tokenizer.bos_ids
        sequences: list[ScoredSequence] = []
        for context, rest in stripped:
            context_ids, all_ids = [*begin, *ids[context]], [*begin, *ids[context + rest]]
            if not context or not context_ids:
                context_ids, all_ids = [self.prefix_token_id], [self.prefix_token_id, *ids[context + rest]]
            # A continuation that merges into the last token of its context is scored as that token.
            continuation_ids = all_ids[len(context_ids) :] or all_ids[-1:]
            sequences.append(self.truncate([*context_ids, *continuation_ids], len(continuation_ids)))
        return sequences

    def truncate(self, token_ids: list[int], num_targets: int) -> ScoredSequence:
        """The end of a sequence that fits the model's context."""
        token_ids = token_ids[-(self.model.config.context_length + 1) :]
        return ScoredSequence(token_ids, min(num_targets, len(token_ids) - 1))

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context: beginning of text, or end of text without one."""
        bos = self.tokenizer.config.get("bos_token")
        bos = bos.get("content") if is_json_object(bos) else bos
        return self.tokenizer.special_tokens.get(str(bos), self.tokenizer.eos_id)

    # ------------------------------------------------------------ scoring

    def score_pairs(
        self, pair_groups: Sequence[Sequence[tuple[str, str]]], progress: ProgressCallback | None = None
    ) -> list[list[ContinuationScore]]:
        """Score (context, continuation) pairs, grouped by question. Raises as `score_sequences`."""
        sequences = iter(self.encode_pairs([pair for group in pair_groups for pair in group]))
        return self.score_sequences([[next(sequences) for _ in group] for group in pair_groups], progress)

    def score_sequences(
        self, sequence_groups: Sequence[Sequence[ScoredSequence]], progress: ProgressCallback | None = None
    ) -> list[list[ContinuationScore]]:
        """Score sequences. Those with a common prefix should be in one group.

        Args:
            sequence_groups: The sequences.
            progress: Called with the number of finished trees and of all trees.

        Returns:
            The scores in the order of the sequences.

        Raises:
            NextwordError: A log-likelihood is not finite.
        """
        trees, count = self.build_trees(sequence_groups), sum(map(len, sequence_groups))
        logprobs, is_greedy = np.zeros(count), np.ones(count, dtype=bool)
        num_done = 0
        with evaluation_mode(self.model):
            max_tokens = DEVICE_BATCH_TOKENS.get(self.model.unembedding.device.type, DEFAULT_BATCH_TOKENS)
            for batch in pack_batches(trees, max_tokens):
                target_logprobs, is_top, sequence_ids = self.score_rows(batch)
                logprobs += np.bincount(sequence_ids, target_logprobs, minlength=count)
                np.logical_and.at(is_greedy, sequence_ids, is_top)
                num_done += sum(map(len, batch))
                if progress is not None:
                    progress(num_done, len(trees))
        if not np.isfinite(logprobs).all():
            raise NextwordError(
                "a log-likelihood is not finite: the model's weights are damaged, or its training diverged"
            )
        scores = iter(zip(logprobs.tolist(), is_greedy.tolist(), strict=True))
        return [
            [ContinuationScore(n, s.num_targets, greedy) for s, (n, greedy) in zip(group, scores, strict=False)]
            for group in sequence_groups
        ]

    def build_trees(self, sequence_groups: Sequence[Sequence[ScoredSequence]]) -> list[PrefixTree]:
        """Prefix trees of each group; sequences are numbered over all groups."""
        trees: list[PrefixTree] = []
        first = 0
        for sequences in sequence_groups:
            for members in self._group_by_prefix(sequences):
                trees.append(build_tree([sequences[i] for i in members], [first + i for i in members]))
            first += len(sequences)
        return trees

    def _group_by_prefix(self, sequences: Sequence[ScoredSequence]) -> Iterator[list[int]]:
        """Neighboring sequences whose common prefix is worth a tree, as long as the tree is not too long.

        A token of the prefix saves some 12 D² multiplications a layer. Each position of another sequence that a token skips
        costs 2 D. A tree may be longer than the model's context; its sequences are not.
        """
        max_tokens = max(MAX_TREE_TOKENS, self.model.config.context_length)
        skipped_per_saved = 6 * self.model.config.d_model
        members: list[int] = []
        prefix = length = 0
        for i, sequence in enumerate(sequences):
            inputs = sequence.token_ids[:-1]
            common = common_prefix_length(sequences[members[0]].token_ids[:prefix], inputs) if members else len(inputs)
            # A shorter prefix is repeated in each of the sequences that are in the tree already.
            old_length = length + (prefix - common) * (len(members) - 1) if members else common
            branch = len(inputs) - common
            new_length = old_length + branch
            worthwhile = skipped_per_saved * common >= branch * (old_length - common)
            if members and (new_length > max_tokens or not worthwhile):
                yield members
                members, common, new_length = [], len(inputs), len(inputs)
            members, prefix, length = [*members, i], common, new_length
        if members:
            yield members

    def score_rows(self, rows: Sequence[Sequence[PrefixTree]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Score a batch of rows of trees.

        Returns:
            For each target [M]: its log-probability, whether it is the most likely token, and the id of its sequence.
        """
        width = max(sum(len(tree.tokens) for tree in row) for row in rows)
        tokens, positions = np.zeros((2, len(rows), width), dtype=np.int64)
        segments = np.full((len(rows), width), -1)
        attention_gaps = np.zeros((len(rows), width, 2), dtype=np.int64)
        predictors: list[np.ndarray] = []
        for r, row in enumerate(rows):
            start = 0
            for segment, tree in enumerate(row):
                part = slice(start, start + len(tree.tokens))
                tokens[r, part], positions[r, part], segments[r, part] = tree.tokens, tree.positions, segment
                attention_gaps[r, part, 0] = start + np.where(tree.branch_starts > 0, tree.prefix_length, 0)
                attention_gaps[r, part, 1] = start + tree.branch_starts
                predictors.append(r * width + start + tree.predictor_positions)
                start = part.stop
        trees = [tree for row in rows for tree in row]
        output_indices, hidden_indices = np.unique(np.concatenate(predictors), return_inverse=True)  # [P], [M]
        device = self.model.unembedding.device
        ids, at, of, gaps, outputs = (
            torch.as_tensor(array).to(device) for array in (tokens, positions, segments, attention_gaps, output_indices)
        )
        hidden = self.model(
            ids,
            positions=at,
            segments=of,
            attention_gaps=gaps,
            output_indices=outputs,
            kernels=self.model.supports_kernels(),
        )  # [P, D]
        target_ids = np.concatenate([tree.target_ids for tree in trees])
        logprobs, is_top = self._target_logprobs(hidden, hidden_indices, target_ids)
        return logprobs, is_top, np.concatenate([tree.sequence_ids for tree in trees])

    def _target_logprobs(
        self, hidden: Tensor, hidden_indices: np.ndarray, target_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each target and whether it is the most likely token, [M], from hidden states [P, D]."""
        indices, ids = (torch.as_tensor(array).to(hidden.device) for array in (hidden_indices, target_ids))
        logprobs, is_top = torch.zeros(len(ids), dtype=torch.float64), torch.ones(len(ids), dtype=torch.bool)
        num_tiles = max(1, round(len(hidden) / LOGIT_TILE[0]))
        bounds = [len(hidden) * i // num_tiles for i in range(num_tiles + 1)]
        for start, end in pairwise(bounds):
            selected = ((indices >= start) & (indices < end)).nonzero()[:, 0]
            target_logits, max_logits, logsumexp = self._tiled_logits(
                hidden[start:end], indices[selected] - start, ids[selected]
            )
            is_top[selected.cpu()] = (target_logits >= max_logits).cpu()
            logprobs[selected.cpu()] = (target_logits.double() - logsumexp.double()).cpu()
        return logprobs.numpy(), is_top.numpy()

    def _tiled_logits(self, hidden: Tensor, rows: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of targets at rows of hidden states [n, D], the rows' maxima (−∞ unless checked) and log-sum-exps; [M] each.

        The vocabulary is split into tiles, so that the logits of one are still in the cache when they are summed.
        """
        target_logits, sums = hidden.new_empty(len(rows)), list[Tensor]()
        max_logits = torch.full_like(target_logits, -torch.inf)
        for first in range(0, self.model.config.vocab_size, LOGIT_TILE[1]):
            logits = torch.mm(hidden, self.model.unembedding[first : first + LOGIT_TILE[1]].T)  # [n, tile]
            column = target_ids - first
            inside = (column >= 0) & (column < logits.shape[1])
            target_logits[inside] = logits[rows[inside], column[inside]]
            if self.check_greedy:
                max_logits = torch.maximum(max_logits, logits.amax(1)[rows])
            sums.append(ops.logsumexp(logits))
        return target_logits, max_logits, torch.logsumexp(torch.stack(sums), 0)[rows]


# ---------------------------------------------------------------- trees and rows


def build_tree(sequences: Sequence[ScoredSequence], sequence_ids: Sequence[int]) -> PrefixTree:
    """The prefix tree of some sequences."""
    inputs = [sequence.token_ids[:-1] for sequence in sequences]
    prefix = min(common_prefix_length(inputs[0], ids) for ids in inputs)
    branch_lengths = [len(ids) - prefix for ids in inputs]
    starts = list(accumulate(branch_lengths, initial=prefix))[:-1]  # where in the tree each branch begins
    num_targets = [sequence.num_targets for sequence in sequences]
    predictors = [
        np.where(place < prefix, place, place + start - prefix)
        for ids, n, start in zip(inputs, num_targets, starts, strict=True)
        for place in [np.arange(len(ids) - n, len(ids))]  # in the sequence
    ]
    targets = [id for sequence in sequences for id in sequence.token_ids[-sequence.num_targets :]]
    return PrefixTree(
        tokens=np.array(inputs[0][:prefix] + [id for ids in inputs for id in ids[prefix:]], dtype=np.int64),
        positions=np.concatenate([np.arange(prefix), *(np.arange(prefix, len(ids)) for ids in inputs)]),
        branch_starts=np.repeat([0, *starts], [prefix, *branch_lengths]),
        prefix_length=prefix,
        predictor_positions=np.concatenate(predictors),
        target_ids=np.array(targets, dtype=np.int64),
        sequence_ids=np.repeat(sequence_ids, num_targets),
    )


def pack_batches(trees: Sequence[PrefixTree], max_tokens: int) -> Iterator[list[list[PrefixTree]]]:
    """Batches of rows of trees, of at most `max_tokens` tokens with padding, the longest rows first."""
    batch: list[list[PrefixTree]] = []
    width = 0
    for row in pack_rows(trees):
        tokens = sum(len(tree.tokens) for tree in row)
        if batch and max(width, tokens) * (len(batch) + 1) > max_tokens:
            yield batch
            batch, width = [], 0
        batch.append(row)
        width = max(width, tokens)
    if batch:
        yield batch


def pack_rows(trees: Sequence[PrefixTree]) -> Iterator[list[PrefixTree]]:
    """Rows of trees: the longest tree that is left, then the longest ones that fit (best fit)."""
    trees_by_length: dict[int, list[PrefixTree]] = {}
    for tree in trees:
        trees_by_length.setdefault(len(tree.tokens), []).append(tree)
    lengths = sorted(trees_by_length)
    while lengths:
        row: list[PrefixTree] = []
        free = max(ROW_TOKENS, lengths[-1])
        while num_fitting := bisect_right(lengths, free):
            length = lengths[num_fitting - 1]
            row.append(trees_by_length[length].pop())
            free -= length
            if not trees_by_length[length]:
                del lengths[num_fitting - 1]
        yield row
