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
from nextword.inference.perplexity import evaluating
from nextword.model import fused
from nextword.model.fused import FusedGPT
from nextword.model.gpt import GPT

BATCH_TOKENS = {"cpu": 1024}  # that go through the model at once: on a CPU what its caches hold
MANY_TOKENS = 16384  # anywhere else
ROW = 128  # tokens that a row of several trees has
LONGEST = 512  # tokens of a tree, where its texts are short enough
TILE = (512, 2048)  # positions and words whose logits are made at once: 4 MB

Progress = Callable[[int, int], None]


class Text(NamedTuple):
    """Token ids, and how many of them, the last ones, are to be predicted."""

    ids: list[int]
    asked: int


class Likely(NamedTuple):
    """log P of what was asked of a text in nats, its tokens, and whether each of them is the likeliest where it stands."""

    nats: float
    tokens: int
    greedy: bool


class Tree(NamedTuple):
    """Texts by what they begin with alike, and their own parts one after the other.

    tokens, positions [n]; begins [n], where the part that a token belongs to begins (0 for what is shared); shared, how many
    tokens they all begin with; and for each word that is asked for the token [m] it follows, its id [m], and which of the
    texts [m] it belongs to, counted over all.
    """

    tokens: np.ndarray
    positions: np.ndarray
    begins: np.ndarray
    shared: int
    after: np.ndarray
    words: np.ndarray
    texts: np.ndarray


class Scorer:
    """Log-likelihoods of texts under a model.

    Args:
        greedy: also find out whether each text is what the model would write itself.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, greedy: bool = False):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "this is not the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer, self.greedy = model, tokenizer, greedy
        self.fused = FusedGPT(model) if fused.available(model) else None

    # ------------------------------------------------------------ text to tokens

    def texts(self, pairs: Sequence[tuple[str, str]]) -> list[Text]:
        """Contexts and continuations as tokens, by lm-eval's rules (`TemplateLM._encode_pair`), so that scores are its own.

        Spaces at a context's end go to the continuation; the two are encoded together, cut at the length of the context
        encoded alone, and what is after the cut follows the context. Without a context the tokenizer's beginning of a text
        stands in its place, or its end. Of what is longer than the model's context the end is kept.
        """
        cut = [(before := one.rstrip(), one[len(before) :] + two) for one, two in pairs]
        distinct = list(dict.fromkeys(text for one, two in cut for text in (one, one + two)))
        ids = dict(zip(distinct, (found.tolist() for found in self.tokenizer.encode_batch(distinct)), strict=True))
        begin = [] if self.tokenizer.begin_of_text is None else [self.tokenizer.begin_of_text]
        found = []
        for one, two in cut:
            before, whole = [*begin, *ids[one]], [*begin, *ids[one + two]]
            if not one or not before:
                before, whole = [self.prefix], [self.prefix, *ids[one + two]]
            after = (
                whole[len(before) :] or whole[-1:]
            )  # what melts into the context altogether is one token with its end
            found.append(self.fitted([*before, *after], len(after)))
        return found

    def fitted(self, ids: list[int], asked: int) -> Text:
        """Tokens of which the last are asked, cut to what the model can see."""
        ids = ids[-(self.model.config.context_length + 1) :]
        return Text(ids, min(asked, len(ids) - 1))

    @property
    def prefix(self) -> int:
        """The token that a text without a context follows: that which begins a text, or where there is none ends one."""
        named = self.tokenizer.config.get("bos_token")
        named = named.get("content") if isinstance(named, dict) else named
        return self.tokenizer.markers.get(str(named), self.tokenizer.end_of_text)

    # ------------------------------------------------------------ through the model

    def ask(
        self, questions: Sequence[Sequence[tuple[str, str]]], progress: Progress | None = None
    ) -> list[list[Likely]]:
        """How likely each continuation is after its context, question by question."""
        texts = iter(self.texts([pair for question in questions for pair in question]))
        return self.score([[next(texts) for _ in question] for question in questions], progress)

    def score(self, questions: Sequence[Sequence[Text]], progress: Progress | None = None) -> list[list[Likely]]:
        """How likely what is asked of each text is; texts that begin alike should stand in one question.

        Raises:
            NextwordError: the model's logits are not finite numbers.
        """
        trees, count = self.trees(questions), sum(map(len, questions))
        nats, greedy = np.zeros(count), np.ones(count, dtype=bool)
        done = 0
        with evaluating(self.model):
            most = BATCH_TOKENS.get(self.model.unembedding.device.type, MANY_TOKENS)
            for batch in batches(trees, most):
                found, likeliest, texts = self.likelihoods(batch)
                nats += np.bincount(texts, found, minlength=count)
                np.logical_and.at(greedy, texts, likeliest)
                done += sum(map(len, batch))
                if progress is not None:
                    progress(done, len(trees))
        if not np.isfinite(nats).all():
            raise NextwordError("a likelihood is not a finite number: the model's weights are damaged, or it diverged")
        flat = iter(zip(nats.tolist(), greedy.tolist(), strict=True))
        return [[Likely(n, text.asked, g) for text, (n, g) in zip(q, flat, strict=False)] for q in questions]

    def trees(self, questions: Sequence[Sequence[Text]]) -> list[Tree]:
        """Trees of the texts of each question; texts are counted over all."""
        found, first = [], 0
        for question in questions:
            for part in self._that_fit(question):
                found.append(tree([question[i] for i in part], [first + i for i in part]))
            first += len(question)
        return found

    def _that_fit(self, question: Sequence[Text]) -> Iterator[list[int]]:
        """The texts of a question in groups that are worth a tree, and not too long for one. (A tree may be longer than the
        model's context: its texts are not.)

        A token that is shared is spared some 12 D² multiplications in each layer; for a place that a text passes over, being
        another's, each of its own tokens takes 2 D.
        """
        longest, worth = max(LONGEST, self.model.config.context_length), 6 * self.model.config.d_model
        shared, group, length = 0, [], 0
        for i, text in enumerate(question):
            inputs = text.ids[:-1]
            common = _common(question[group[0]].ids[:-1], inputs, shared) if group else len(inputs)
            # What is shared by fewer tokens now stands once more for each of those that were in the group.
            before = length + (shared - common) * (len(group) - 1) if group else common
            longer, own = before + len(inputs) - common, len(inputs) - common
            if group and (longer > longest or worth * common < own * (before - common)):
                yield group
                group, common, longer = [], len(inputs), len(inputs)
            group, shared, length = [*group, i], common, longer
        if group:
            yield group

    def likelihoods(self, rows: Sequence[Sequence[Tree]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log P of each word that is asked for, whether it is the likeliest, and the text it belongs to; all [words]."""
        width = max(sum(len(one.tokens) for one in row) for row in rows)
        tokens, positions = np.zeros((2, len(rows), width), dtype=np.int64)
        segments = np.full((len(rows), width), -1)
        holes = np.zeros((len(rows), width, 2), dtype=np.int64)
        after = []
        for r, row in enumerate(rows):
            start = 0
            for number, one in enumerate(row):
                part = slice(start, start + len(one.tokens))
                tokens[r, part], positions[r, part], segments[r, part] = one.tokens, one.positions, number
                holes[r, part, 0] = start + np.where(one.begins > 0, one.shared, 0)
                holes[r, part, 1] = start + one.begins
                after.append(r * width + start + one.after)
                start = part.stop
        flat = [one for row in rows for one in row]
        asked, which = np.unique(np.concatenate(after), return_inverse=True)  # [P], [words]
        hidden = self._hidden(tokens, positions, segments, holes, asked)  # [P, D]
        nats, likeliest = self._words(hidden, which, np.concatenate([one.words for one in flat]))
        return nats, likeliest, np.concatenate([one.texts for one in flat])

    def _hidden(self, *arrays: np.ndarray) -> Tensor:
        """Tokens, positions, segments [B, T] and holes [B, T, 2]; hidden states [P, D] at the places [P] among all tokens."""
        device = self.model.unembedding.device
        ids, at, of, without, asked = (torch.from_numpy(array).to(device) for array in arrays)
        if self.fused is not None:
            return self.fused(ids, positions=at, segments=of, holes=without, only=asked)
        return self.model(ids, positions=at, cache=Seen(of, without)).flatten(0, 1)[asked]

    def _words(self, hidden: Tensor, which: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """hidden [P, D]; log P of words [m] at those of the places that they follow [m], and which are the likeliest."""
        order = np.argsort(which, kind="stable")
        nats, likeliest = np.empty(len(words)), np.ones(len(words), dtype=bool)
        pieces = max(1, round(len(hidden) / TILE[0]))
        ends = [len(hidden) * i // pieces for i in range(pieces + 1)]
        for start, end in pairwise(ends):
            some = order[slice(*np.searchsorted(which[order], (start, end)))]
            at, wanted = (torch.from_numpy(one).to(hidden.device) for one in (which[some] - start, words[some]))
            chosen, most, total = self._logits(hidden[start:end], at, wanted)
            likeliest[some] = (chosen >= most).cpu().numpy()
            nats[some] = (chosen.double() - total.double()).cpu().numpy()
        return nats, likeliest

    def _logits(self, piece: Tensor, at: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of words [m] at rows [m] of hidden states [rows, D], the largest there where that is asked for, and
        log Σ exp of all there; [m] each. The vocabulary is gone through in parts, so that a part's logits are still in the
        cache when they are summed."""
        chosen, sums = piece.new_empty(len(at)), []
        most = torch.full_like(chosen, -torch.inf)
        for first in range(0, self.model.config.vocab_size, TILE[1]):
            logits = torch.mm(piece, self.model.unembedding[first : first + TILE[1]].T)  # [rows, columns]
            place = words - first
            inside = (place >= 0) & (place < logits.shape[1])
            chosen[inside] = logits[at[inside], place[inside]]
            if self.greedy:
                most = torch.maximum(most, logits.amax(1)[at])
            sums.append(fused.log_sums(logits))
        return chosen, most, torch.logsumexp(torch.stack(sums), 0)[at]


class Seen:
    """What a tree's tokens see, as a `Cache` of the model that keeps nothing: segments [B, T], holes [B, T, 2]."""

    def __init__(self, segments: Tensor, holes: Tensor):
        place = torch.arange(segments.shape[1], device=segments.device)
        same = (segments[:, :, None] == segments[:, None, :]) & (place[:, None] >= place)
        hidden = (place >= holes[:, :, :1]) & (place < holes[:, :, 1:])
        self.mask = (same & ~hidden)[:, None]  # [B, 1, T, T]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return keys, values, self.mask


# ---------------------------------------------------------------- trees and rows


def tree(texts: Sequence[Text], numbers: Sequence[int]) -> Tree:
    """The tree of some texts, which go by numbers."""
    inputs = [text.ids[:-1] for text in texts]
    shared = len(inputs[0])
    for other in inputs[1:]:
        shared = _common(inputs[0], other, shared)
    tokens, positions, begins = [inputs[0][:shared]], [np.arange(shared)], [np.zeros(shared, dtype=np.int64)]
    after, words, whose = [], [], []
    begin = shared
    for text, ids, number in zip(texts, inputs, numbers, strict=True):
        own = len(ids) - shared
        tokens.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        begins.append(np.full(own, begin))
        place = np.arange(len(ids) - text.asked, len(ids))  # in the text itself
        after.append(np.where(place < shared, place, place + begin - shared))
        words.append(text.ids[len(text.ids) - text.asked :])
        whose.append(np.full(text.asked, number))
        begin += own
    return Tree(
        np.concatenate(tokens).astype(np.int64), np.concatenate(positions), np.concatenate(begins), shared,
        np.concatenate(after), np.concatenate(words).astype(np.int64), np.concatenate(whose),
    )  # fmt: skip


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many of the first `most` tokens two texts have in common at their beginning."""
    most = min(most, len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])


def batches(trees: Sequence[Tree], most: int) -> Iterator[list[list[Tree]]]:
    """The trees in batches of at most so many tokens: in rows of several trees, as full as they get, the longest first."""
    batch: list[list[Tree]] = []
    width = 0  # of the batch's widest row
    for row in rows_of(trees):
        tokens = sum(len(one.tokens) for one in row)
        if batch and max(width, tokens) * (len(batch) + 1) > most:
            yield batch
            batch, width = [], 0
        batch.append(row)
        width = max(width, tokens)
    if batch:
        yield batch


def rows_of(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """The trees in rows: each the longest that is left, and then what fits beside it, the longest first (best fit)."""
    left: dict[int, list[Tree]] = {}
    for one in trees:
        left.setdefault(len(one.tokens), []).append(one)
    lengths = sorted(left)
    while lengths:
        row, room = [], max(ROW, lengths[-1])
        while fits := bisect_right(lengths, room):
            length = lengths[fits - 1]
            row.append(left[length].pop())
            room -= length
            if not left[length]:
                del lengths[fits - 1]
        yield row
