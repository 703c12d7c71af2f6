"""The losses of fine-tuning against their formulas."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nextword.data.dataset import IGNORE_INDEX
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.tasks.dataset import EncodedExample, TaskDataset, TokenSequence
from nextword.training.config import TrainingConfig
from nextword.training.losses import LossModule, classification_loss, completion_loss, dpo_loss
from nextword.training.optimizer import Optimizer
from nextword.training.step import StepSettings, TrainState, normalize_loss, to_device, train_step


def model(n_labels=0, dropout=0.0):
    torch.manual_seed(1)
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 32, "dropout": dropout}
    return GPT(build_config("gpt2", "tiny", vocab_size=50, n_labels=n_labels, **sizes))


def dataset(kind, golds, texts: int | list[int] = 1, seed=0, sample_weights=None, reference=None):
    rng = np.random.default_rng(seed)

    def text():
        n = int(rng.integers(4, 12))
        return TokenSequence(rng.integers(2, 50, n), rng.random(n) > 0.3)

    counts = [texts] * len(golds) if isinstance(texts, int) else texts
    examples = [EncodedExample(tuple(text() for _ in range(n)), target=g) for n, g in zip(counts, golds, strict=True)]
    return examples, TaskDataset(
        examples, len(golds), 0, pad_token_id=1, kind=kind, sample_weights=sample_weights, reference_logprobs=reference
    )


def hidden_at_end(gpt, text):
    return gpt(torch.from_numpy(text.ids)[None])[0, -1]


def next_word_nats(gpt, text):
    logits = gpt.unembed(gpt(torch.from_numpy(text.ids)[None]))[0, :-1].log_softmax(-1)
    nats = -logits[torch.arange(len(text.ids) - 1), torch.from_numpy(text.ids[1:])]
    return nats[torch.from_numpy(text.loss_mask[1:])]


@pytest.mark.parametrize("auxiliary", [0.0, 0.5])
def test_classification_loss_equals_its_formula(auxiliary):
    gpt, golds = model(3), [0, 2, 1, 2]
    weights = np.array([1.0, 0.5, 2.0, 0.5], dtype=np.float32)
    examples, data = dataset("label", golds, sample_weights=weights)
    batch = data.batch(0)
    losses = classification_loss("label", auxiliary)(gpt, to_device(batch, gpt, 0), False)
    losses_of_examples = [
        F.cross_entropy(gpt.classify(hidden_at_end(gpt, e.sequences[0])[None]), torch.tensor([e.target]))
        for e in examples
    ]
    expected = (torch.from_numpy(weights) * torch.stack(losses_of_examples)).sum() / weights.sum()
    if auxiliary:
        nats = torch.cat([next_word_nats(gpt, e.sequences[0]) for e in examples])
        expected = expected + auxiliary * nats.mean()
    assert normalize_loss(losses, batch.loss_denominators).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_sequences_of_an_example_are_summed():
    gpt = model(1)
    examples, data = dataset("score", [1.5, 4.0, 0.0], texts=2)
    batch = data.batch(0)
    loss = normalize_loss(classification_loss("score")(gpt, to_device(batch, gpt, 0), False), batch.loss_denominators)
    outputs = [sum(gpt.classify(hidden_at_end(gpt, t)[None])[0, 0] for t in e.sequences) for e in examples]
    expected = torch.stack([(o - e.target) ** 2 for o, e in zip(outputs, examples, strict=True)]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_multilabel_loss_equals_its_formula():
    gpt = model(3)
    examples, data = dataset("labels", [np.array([1, 0, 1], dtype=bool), np.array([0, 0, 0], dtype=bool)])
    batch = data.batch(0)
    loss = normalize_loss(classification_loss("labels")(gpt, to_device(batch, gpt, 0), False), batch.loss_denominators)
    losses_of_examples = [
        F.binary_cross_entropy_with_logits(
            gpt.classify(hidden_at_end(gpt, e.sequences[0])[None])[0], torch.tensor(e.target).float()
        )
        for e in examples
    ]
    assert loss.item() == pytest.approx(torch.stack(losses_of_examples).mean().item(), rel=1e-5)


def test_multiple_choice_loss_equals_its_formula():
    gpt, counts = model(1), [2, 4, 3]
    examples, data = dataset("choice", [1, 3, 0], texts=counts)
    batch = data.batch(0)
    loss = normalize_loss(classification_loss("choice")(gpt, to_device(batch, gpt, 0), False), batch.loss_denominators)
    losses_of_examples = []
    for e in examples:
        logits = torch.stack([gpt.classify(hidden_at_end(gpt, t)[None])[0, 0] for t in e.sequences])
        losses_of_examples.append(-logits.log_softmax(0)[e.target])
    assert loss.item() == pytest.approx(torch.stack(losses_of_examples).mean().item(), rel=1e-5)


def test_completion_loss_counts_only_the_answer():
    gpt = model()
    examples, data = dataset("answer", [0, 0, 0])
    batch = data.batch(0)
    loss = normalize_loss(completion_loss(gpt, to_device(batch, gpt, 0)), batch.loss_denominators)
    nats = torch.cat([next_word_nats(gpt, e.sequences[0]) for e in examples])
    assert loss.item() == pytest.approx(nats.mean().item(), rel=1e-5)
    assert batch.loss_denominators["next_word"] == len(nats) == (batch.targets != IGNORE_INDEX).sum()


def test_dpo_loss_equals_its_formula():
    gpt = model()
    reference = np.random.default_rng(3).normal(-20, 2, (3, 2)).astype(np.float32)
    examples, data = dataset("preference", [0, 0, 0], texts=2, reference=reference)
    batch = data.batch(0)
    loss = normalize_loss(dpo_loss(0.3)(gpt, to_device(batch, gpt, 0), False), batch.loss_denominators)
    losses_of_examples = []
    for e, (chosen, rejected) in zip(examples, reference, strict=True):
        plus, minus = (-next_word_nats(gpt, t).sum() for t in e.sequences)
        losses_of_examples.append(-F.logsigmoid(0.3 * ((plus - chosen) - (minus - rejected))))
    assert loss.item() == pytest.approx(torch.stack(losses_of_examples).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("kind", "texts", "n_labels"), [("label", 1, 3), ("score", 2, 1), ("choice", 3, 1)])
def test_the_loss_does_not_depend_on_the_micro_batch(kind, texts, n_labels):
    """Nor does dropout, whose masks go with the row."""
    results = []
    for rows in (1, 5, 100):
        gpt = model(n_labels, dropout=0.2)
        _, data = dataset(kind, [0, 1, 0, 1, 0, 1, 0] if kind != "score" else [0.5] * 7, texts=texts)
        config = TrainingConfig(optimizer="adamw", lr=1e-3)
        state, step = TrainState(gpt, Optimizer(gpt, config)), LossModule(gpt, classification_loss(kind, 0.5))
        metrics = train_step(state, step, data.batch(0), StepSettings(config, micro_batch_rows=rows), 0.5)
        results.append((metrics.loss, metrics.gradient_norm))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[2] == pytest.approx(results[0], rel=1e-4)
