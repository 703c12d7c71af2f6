"""Members that are distilled into one model: the loss, the run, its resume and its options."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import nextword
from nextword.common.errors import UsageError
from nextword.common.fs import read_sealed_json
from nextword.common.results import weights_digest
from nextword.data.dataset import IGNORE_INDEX
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.training.config import Recipe
from nextword.training.losses import DeviceBatch, causal_lm_loss, distillation_loss

SETTINGS = {
    "steps": 12,
    "seed": 3,
    "vocab_size": 400,
    "normalize": "nfc",
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32},
    "training": {"lr": 0.01, "evaluations": 2, "save_every": 4, "batch_tokens": 512, "compile": "no"},
}


def model(seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(build_config("modern", "micro", vocab_size=50, n_layers=1, n_heads=2, d_model=32, context_length=16))


def test_the_distillation_loss_equals_its_formula():
    student, teachers = model(0), [model(1).eval(), model(2).eval()]
    tokens = torch.randint(0, 50, (3, 16))
    targets = tokens.roll(-1, 1).clone()
    targets[:, -1] = IGNORE_INDEX
    batch = DeviceBatch(tokens, targets)

    def log_probabilities(gpt: GPT) -> torch.Tensor:
        return F.log_softmax(gpt(tokens) @ gpt.unembedding.T, dim=-1)

    q = 0.3 * torch.stack([log_probabilities(teacher).exp() for teacher in teachers]).mean(0)
    q[..., :] += 0.7 * F.one_hot(targets.clamp(0), 50)
    expected = -(q * log_probabilities(student))[targets != IGNORE_INDEX].sum()
    loss = distillation_loss(teachers, 0.3)(student, batch, False)["next_word"].total
    assert torch.isclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert student.unembedding.grad is not None and all(p.grad is None for t in teachers for p in t.parameters())
    text_only = distillation_loss(teachers, 0.0)(student, batch, False)["next_word"].total
    assert torch.isclose(text_only, causal_lm_loss(student, batch)["next_word"].total, rtol=1e-5)


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("members") / "run"
    nextword.pretrain(texts, path, members=2, keep_members=True, **SETTINGS)
    return path


def test_the_run_reports_its_members(run: Path):
    result = read_sealed_json(run / "result.json")
    members = [read_sealed_json(run / "members" / name / "result.json") for name in ("1", "2")]
    assert result["members"]["bits_per_byte"] == [member["bits_per_byte"] for member in members]
    assert result["members"]["seeds"] == [4, 5] and result["members"]["standard_deviation"] > 0
    assert len({weights_digest(path) for path in (run, run / "members" / "1", run / "members" / "2")}) == 3
    assert nextword.verify(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "members, bits per byte" in page and "standard deviation over seeds" in page


@pytest.mark.parametrize("interruption", ["before the second member", "after the members", "during the distillation"])
def test_interrupted_and_resumed_equals_uninterrupted(run: Path, texts: Path, tmp_path: Path, interruption: str):
    cut = tmp_path / "run"
    if interruption == "during the distillation":
        shutil.copytree(run, cut, ignore=shutil.ignore_patterns("result.json", "report.html", "README.md", "step-*12"))
        assert len(list((cut / "checkpoints").glob("step-*"))) >= 1
    else:
        names = ("1",) if interruption == "before the second member" else ("1", "2")
        for name in names:
            shutil.copytree(run / "members" / name, cut / "members" / name)
    result = nextword.pretrain(texts, cut, members=2, resume=True, **SETTINGS)
    assert weights_digest(cut) == weights_digest(run)
    assert result.members == read_sealed_json(run / "result.json")["members"]
    assert not (cut / "members").exists()  # they are kept only by request


def test_another_member_is_refused(run: Path, tmp_path: Path):
    cut = tmp_path / "run"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("result.json", "step-*12"))
    shutil.rmtree(cut / "members" / "2")
    shutil.copytree(cut / "members" / "1", cut / "members" / "2")
    with pytest.raises(UsageError, match="not the member that the run started with"):
        nextword.pretrain(out=cut, resume=True)


def test_a_budget_is_divided_between_members_and_student():
    recipe = Recipe("default", budget=600.0, members=3)
    assert 3 * recipe.member_share + recipe.member_share * recipe.step_cost == pytest.approx(1)
    assert (Recipe("default").step_cost, Recipe("default").member_share) == (1.0, 1.0)


def test_options_that_members_do_not_support(texts: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--members cannot be combined with --mirror"):
        nextword.pretrain(texts, tmp_path / "a", members=2, mirror=str(tmp_path / "mirror"), **SETTINGS)
    with pytest.raises(UsageError, match="--keep-members needs --members"):
        nextword.pretrain(texts, tmp_path / "b", keep_members=True, **SETTINGS)
