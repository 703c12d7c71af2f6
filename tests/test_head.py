"""Adding a classification head and resizing the vocabulary: new weights follow from a seed, all others stay equal."""

import pytest
import torch

from nextword.model.config import PRESETS
from nextword.model.gpt import GPT, with_classification_head, with_resized_vocabulary
from tiny_models import random_model, small


def test_a_classification_head_is_one_matrix():
    torch.manual_seed(0)
    config = small("tutorial", n_labels=40, d_model=128)
    model = GPT(config)
    assert model.score is not None
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.05)
    hidden = torch.randn(3, 128)
    torch.testing.assert_close(model.classify(hidden), hidden @ model.score.weight.T)


def test_a_language_model_does_not_classify():
    with pytest.raises(ValueError, match="no classification head"):
        GPT(small("modern")).classify(torch.zeros(1, 32))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary_keeps_the_other_weights(preset, tied):
    model = random_model(small(preset, tied=tied)).double().eval()
    grown = with_resized_vocabulary(model, 61 + 200, seed=7)
    assert grown.config.vocab_size == 261
    assert not grown.training
    tokens = torch.randint(0, 61, (2, 24))
    assert torch.equal(grown(tokens), model(tokens))
    torch.testing.assert_close(grown.unembed(grown(tokens))[..., :61], model.unembed(model(tokens)))
    for old, new in (
        (model.token_embedding.weight, grown.token_embedding.weight),
        (model.unembedding, grown.unembedding),
    ):
        assert new.dtype == torch.float64
        assert torch.equal(new[:61], old)
        noise = new[61:] - old.mean(0)
        assert noise.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(noise.mean().item()) < 0.002
    again, other = with_resized_vocabulary(model, 261, seed=7), with_resized_vocabulary(model, 261, seed=8)
    assert torch.equal(again.unembedding, grown.unembedding)
    assert not torch.equal(other.unembedding, grown.unembedding)
    with torch.no_grad():
        grown.token_embedding.weight.zero_()
    assert model.token_embedding.weight.any(), "a copy, not a view"
    with pytest.raises(ValueError, match="cannot shrink from 61 to 60 tokens"):
        with_resized_vocabulary(model, 60, seed=7)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_head_keeps_the_other_weights(preset):
    model = random_model(small(preset, n_labels=2)).bfloat16()
    other = with_classification_head(model, 300, seed=3)
    assert other.config.n_labels == 300
    assert other.score is not None
    assert other.score.weight.dtype == torch.bfloat16
    assert other.score.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "score.weight")
    assert torch.equal(
        with_classification_head(model, 300, seed=3).state_dict()["score.weight"], theirs["score.weight"]
    )
    assert not torch.equal(
        with_classification_head(model, 300, seed=4).state_dict()["score.weight"], theirs["score.weight"]
    )
    assert with_classification_head(model, 0, seed=3).score is None
    tokens = torch.randint(0, 61, (1, 24))
    assert torch.equal(other(tokens), model(tokens))
    with torch.no_grad():
        other.token_embedding.weight.zero_()
    assert model.token_embedding.weight.any(), "a copy, not a view"
