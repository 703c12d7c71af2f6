"""Interpretability: activations equal those of transformers, and everything derived from them equals its formula."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nextword
from nextword import load
from nextword.commands.cli import run as run_command
from nextword.common.errors import UsageError
from nextword.common.format import show_whitespace
from nextword.common.fs import write_manifest
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.interpretability.activations import capture, logit_lens, max_explained_tokens, override_embeddings
from nextword.interpretability.attribution import integrated_gradients, mean_token_embedding
from nextword.interpretability.explain import explain, log_prob_of
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT, with_classification_head, with_resized_vocabulary
from nextword.model.hf import save_model
from nextword.pipeline.language_model import LanguageModel
from nextword.reporting.explain_page import (
    content_security_policy,
    text_direction,
    write_explanation_page,
)
from nextword.tasks.dataset import HEAD_KINDS, TaskSpec

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = "The nurse said that she was tired, and the doctor"
FAMILIES = {**{name: (name, {}) for name in PRESETS}, "llama": ("modern", {"qk_norm": False, "tied": False})}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"{TEXT} and she said that the nurse was a doctor. " * 4] * 20, 300)


def random_model(preset: str, vocab_size: int, **overrides: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": 48}
    model = GPT(build_config(preset, "tiny", vocab_size=vocab_size, **{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def saved(model: GPT, tokenizer: Tokenizer, folder: Path, form: TaskSpec | None = None) -> LanguageModel:
    """A model directory, with a task sealed by its form."""
    folder.mkdir()
    facts: dict[str, Any] = {"model": model.config.to_dict()}
    labels = None
    if form is not None:
        tokenizer = form.with_special_tokens(tokenizer)
        model = with_resized_vocabulary(model, tokenizer.vocab_size, 0)
        if form.n_labels:
            model, labels = with_classification_head(model, form.n_labels, 1), form.labels or ("score",)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        facts = {"model": model.config.to_dict(), "task": form.to_dict()}
    save_model(
        model,
        folder,
        end_of_text_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        labels=labels,
        problem_type=None if form is None else form.problem_type,
    )
    tokenizer.save(folder, model.config.context_length)
    write_manifest(folder, facts)
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: saved(random_model(preset, tokenizer.vocab_size, **more), tokenizer, folder / name)
        for name, (preset, more) in FAMILIES.items()
    }


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, LanguageModel]) -> LanguageModel:
    return models[request.param]


# ---------------------------------------------------------------- compared with transformers


def test_attention_residual_stream_and_predictions_equal_transformers(model: LanguageModel) -> None:
    stock = transformers.AutoModelForCausalLM.from_pretrained(model.path, attn_implementation="eager").eval()
    ids = model.tokenizer.encode(TEXT)
    with torch.no_grad():
        theirs = stock(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    inside = capture(model.gpt, ids)
    assert inside.attention.shape == (2, 4, len(ids), len(ids))
    for layer, weights in enumerate(theirs.attentions):
        torch.testing.assert_close(inside.attention[layer], weights[0], atol=1e-5, rtol=1e-4)
    for layer in range(2):  # what comes after the last layer they give with the final norm
        torch.testing.assert_close(inside.residual_streams[layer], theirs.hidden_states[layer][0], atol=1e-4, rtol=1e-4)
    last = logit_lens(model.gpt, inside.residual_streams[-1])
    torch.testing.assert_close(last, theirs.logits[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(last, model.gpt.unembed(model.gpt(torch.tensor([ids]))[0]), atol=1e-5, rtol=1e-5)

    told, p = explain(model, [TEXT]), theirs.logits[0].double().softmax(-1)
    for t, token in enumerate(told["tokens"]):
        chances, likely_ids = p[t].topk(10)
        assert [one["probability"] for one in token["next"]] == pytest.approx(chances.tolist(), abs=1e-5)
        assert [one["id"] for one in token["next"]][:3] == likely_ids.tolist()[:3]
        assert told["layers"][-1]["says"][t]["id"] == likely_ids[0]
        if t:
            chance = float(p[t - 1, ids[t]])
            assert token["probability"] == pytest.approx(chance, abs=1e-5)
            assert token["surprisal"] == pytest.approx(-math.log2(chance), abs=1e-3)
            assert token["rank"] == 1 + int((p[t - 1] > chance + 1e-12).sum())
    assert told["tokens"][0]["surprisal"] is None
    assert "".join(token["text"] for token in told["tokens"]) == TEXT
    assert [len(row) for row in told["attention"][1][3]] == list(range(1, len(ids) + 1))
    assert told["attention"][1][3][-1] == pytest.approx(theirs.attentions[1][0, 3, -1].tolist(), abs=1e-5)


def test_logit_lens_equals_reference(models: dict[str, LanguageModel]) -> None:
    """The final norm and head of transformers, on its own hidden states; with norms after the sums, the head alone."""
    for name in ("gpt2", "gpt1"):
        model = models[name]
        stock = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
        ids = model.tokenizer.encode(TEXT)
        with torch.no_grad():
            hidden = stock(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
            p = stock.lm_head(stock.transformer.ln_f(hidden) if name == "gpt2" else hidden).softmax(-1)
        says = explain(model, [TEXT])["layers"][1]["says"]
        assert [one["id"] for one in says] == p.argmax(-1).tolist()
        assert [one["probability"] for one in says] == pytest.approx(p.max(-1).values.tolist(), abs=1e-4)


def test_head_patterns_are_fractions_of_attention_weight(models: dict[str, LanguageModel]) -> None:
    told = explain(models["modern"], [TEXT])
    rows = told["attention"][0][2]
    kind = told["heads"][0][2]
    assert kind["before"] == pytest.approx(np.mean([row[-2] for row in rows[2:]]), abs=1e-5)
    assert kind["first"] == pytest.approx(np.mean([row[0] for row in rows[2:]]), abs=1e-5)
    assert kind["itself"] == pytest.approx(np.mean([row[-1] for row in rows[2:]]), abs=1e-5)


# ---------------------------------------------------------------- integrated gradients


def test_attributions_are_complete_and_equal_the_integral(model: LanguageModel) -> None:
    """Completeness, and the midpoint rule along the same way, by the model's own gradients."""
    ids = model.tokenizer.encode(TEXT)
    output = log_prob_of(model.gpt, [7])
    found = integrated_gradients(model.gpt, ids, output, fixed_positions=[2])
    assert found.completeness_error < 0.01
    assert sum(found.per_token) == pytest.approx(found.output_difference, rel=0.01)
    assert found.per_token[2] == 0
    with torch.no_grad():
        logits = model.gpt.unembed(model.gpt(torch.tensor([ids]))[0, -1])
    assert found.target_output == pytest.approx(float(logits.log_softmax(-1)[7]), abs=1e-5)

    embedded = model.gpt.token_embedding.weight.detach()[ids]
    start = mean_token_embedding(model.gpt).repeat(len(ids), 1)
    start[2] = embedded[2]
    alpha = ((torch.arange(256) + 0.5) / 256)[:, None, None]
    points = (start + alpha * (embedded - start)).requires_grad_()
    with override_embeddings(model.gpt, points):
        values = output(model.gpt(torch.tensor([ids]).expand(256, -1)))
    (gradient,) = torch.autograd.grad(values.sum(), points)
    by_hand = ((embedded - start) * gradient.mean(0)).sum(-1)
    assert found.per_token == pytest.approx(by_hand.tolist(), abs=0.02 * max(map(abs, found.per_token)))


def test_attributions_of_a_linear_output_are_exact(models: dict[str, LanguageModel]) -> None:
    """Of F(x) = Σ w·x the parts are w·(x − x′) exactly, whatever the model behind makes of it."""
    model, direction = models["gpt2"], torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids, seen = model.tokenizer.encode("the doctor said"), {}
    embedded = model.gpt.token_embedding.weight.detach()[ids]

    def linear(hidden: torch.Tensor) -> torch.Tensor:
        return (seen["x"] @ direction).sum(-1)

    handle = model.gpt.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    found = integrated_gradients(model.gpt, ids, linear)
    handle.remove()
    assert found.per_token == pytest.approx(
        ((embedded - mean_token_embedding(model.gpt)) @ direction).tolist(), abs=1e-4
    )
    assert found.steps == 16


def test_the_model_is_unchanged(models: dict[str, LanguageModel]) -> None:
    gpt = models["modern"].gpt
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    explain(models["modern"], [TEXT])
    assert all(torch.equal(before[name], value) for name, value in gpt.state_dict().items())
    assert all(parameter.grad is None for parameter in gpt.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in gpt.modules())


# ---------------------------------------------------------------- tasks

TASKS: dict[str, tuple[TaskSpec, list[str]]] = {
    "classify": (TaskSpec("classify", "label", ("bad", "good", "<b>")), ["the nurse was tired"]),
    "several": (TaskSpec("classify", "labels", ("calm", "glad")), ["the nurse was tired"]),
    "entail": (TaskSpec("entail", "label", ("no", "yes")), ["the nurse said", "she was a doctor"]),
    "similarity": (TaskSpec("similarity", "score"), ["the nurse said", "the doctor said"]),
    "choose": (TaskSpec("choose", "choice"), ["who was tired", "the nurse", "the doctor", "she"]),
    "rewrite": (TaskSpec("rewrite", "answer", answer_tokens=8), ["the nurse said"]),
    "chat": (TaskSpec("chat", "answer", answer_tokens=8, chat=True), ["the nurse said"]),
    "prefer": (TaskSpec("prefer", "preference", answer_tokens=8), ["the nurse said"]),
}


@pytest.mark.parametrize("name", TASKS)
def test_an_example_of_a_task(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    form, texts = TASKS[name]
    model = saved(
        random_model("gpt2" if name == "entail" else "modern", tokenizer.vocab_size), tokenizer, tmp_path / "m", form
    )
    told = explain(model, texts)
    assert told["task"] == form.task
    markers = [token["text"] for token in told["tokens"] if token["kind"] == "marker"]
    assert markers[0] == ("<|user|>" if form.chat else "<|start|>")
    assert all(
        part == 0 and token["surprisal"] is None
        for part, token in zip(told["leaning"]["parts"], told["tokens"], strict=True)
        if token["kind"] == "marker"
    )
    assert told["leaning"]["relative_error"] < 0.01
    if form.kind not in HEAD_KINDS:
        assert told["answer"] is None and told["leaning"]["kind"] == "word"
        assert told["leaning"]["target"] == told["tokens"][-1]["next"][0]["text"]
        return
    assert told["answer"] == model.predict(*texts)
    assert markers[-1] == "<|extract|>"
    last, answer = told["layers"][-1]["outputs"], told["answer"]
    if isinstance(answer.get("probabilities"), dict):
        assert last == pytest.approx(answer["probabilities"], abs=1e-5)
        chosen = max(last, key=lambda label: last[label])
        assert told["leaning"]["target"] == chosen
        other = min(last, key=lambda label: last[label])
        assert explain(model, texts, label=other)["leaning"]["target"] == other
    if name == "choose":
        assert "choice 1" in explain(model, texts, label="1")["notes"][0]
        said = "".join(token["text"] for token in explain(model, texts, label="1")["tokens"])
        assert said == "<|start|>who was tired<|delimiter|>the doctor<|extract|>"
    with pytest.raises(UsageError, match="--label 'purple'"):
        explain(model, texts, label="purple")
    with pytest.raises(UsageError, match="--word is for models that generate text"):
        explain(model, texts, word="doctor")


def test_a_transformers_classifier_uses_its_last_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        num_labels=3,
        pad_token_id=1,
        id2label={0: "red", 1: "green", 2: "blue"},
        label2id={"red": 0, "green": 1, "blue": 2},
    )
    torch.manual_seed(3)
    stock = transformers.GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        stock.score.weight.mul_(50)
    stock.save_pretrained(tmp_path)
    tokenizer.save(tmp_path, 48)
    told = explain(load(tmp_path), [TEXT])
    with torch.no_grad():
        p = stock(torch.tensor([tokenizer.encode(TEXT)])).logits[0].softmax(-1)
    assert told["answer"]["probabilities"] == pytest.approx(
        dict(zip(("red", "green", "blue"), p.tolist(), strict=True)), abs=1e-5
    )
    assert told["leaning"]["target"] == ("red", "green", "blue")[int(p.argmax())]


def test_a_classifier_without_output_embeddings_is_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    form, texts = TASKS["classify"]
    model = saved(random_model("tutorial", tokenizer.vocab_size), tokenizer, tmp_path / "m", form)
    told = explain(model, texts)
    assert any("no longer predicts tokens" in note for note in told["notes"])
    assert "next" not in told["tokens"][0] and "says" not in told["layers"][0]
    assert "outputs" in told["layers"][0]
    assert write_explanation_page(told, tmp_path / "page.html").is_file()


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize("word", ["doctor", "xylophone", "看護師"])
def test_all_tokens_of_a_word_are_explained(models: dict[str, LanguageModel], word: str) -> None:
    """Bytes of characters included. The word is the likelier of its encodings with and without a space."""
    model, text = models["gpt2"], "The nurse said that"
    input_ids = model.tokenizer.encode(text)

    def log_prob(ids: list[int]) -> float:
        with torch.no_grad():
            log_probs = model.gpt.unembed(model.gpt(torch.tensor([input_ids + ids]))[0]).log_softmax(-1)
        return float(log_probs[len(input_ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum())

    leaning = explain(model, [text], word=word)["leaning"]
    assert leaning["target"] == word and len(leaning["parts"]) == len(input_ids)
    expected = max(log_prob(model.tokenizer.encode(form)) for form in (word, f" {word}"))
    assert leaning["output"] == pytest.approx(expected, abs=1e-4)
    assert leaning["sum"] == pytest.approx(leaning["output"] - leaning["at_baseline"], rel=0.02, abs=1e-3)


def test_tokens_are_shown_as_what_they_are() -> None:
    assert show_whitespace(" the") == "the" and show_whitespace("  ") == "␣␣" and show_whitespace("a\nb\t") == "a↵b⇥"
    assert show_whitespace(" \u0e34") == "\u25cc\u0e34" and show_whitespace("\u0301\u0301") == "\u25cc\u0301\u0301"
    assert show_whitespace("क\u094d\u200dष") == "क\u094d\u200dष"  # a joiner is part of the word
    assert show_whitespace("\x1b[31m\u202e") == "\ufffd[31m\ufffd"


def test_invalid_requests_are_rejected(models: dict[str, LanguageModel]) -> None:
    model = models["gpt2"]
    with pytest.raises(UsageError, match="takes one text, but 2 were given"):
        explain(model, ["The nurse", "said"])
    with pytest.raises(UsageError, match="--label is for models with labels"):
        explain(model, [TEXT], label="good")
    with pytest.raises(UsageError, match="--word needs a word"):
        explain(model, [TEXT], word="")
    with pytest.raises(UsageError, match="more than the context"):
        explain(model, ["The nurse said"], word="x" * 4000)


def test_long_texts_are_truncated_with_a_note(
    models: dict[str, LanguageModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, text = models["modern"], TEXT * 8
    ids = model.tokenizer.encode(text)
    told = explain(model, [text])
    assert told["notes"] == [f"The text has {len(ids)} tokens; the last 48 of them are explained."]
    assert [token["id"] for token in told["tokens"]] == ids[-48:]
    for name in ("classify", "chat"):
        form, _ = TASKS[name]
        one = saved(random_model("modern", tokenizer.vocab_size), tokenizer, tmp_path / name, form)
        told = explain(one, [text])
        assert len(told["notes"]) == 1 and "truncated" in told["notes"][0]
        assert len(told["tokens"]) == 48
        assert [told["tokens"][i]["kind"] for i in (0, -1)] == (
            ["marker"] * 2 if name == "classify" else ["text", "marker"]
        )


def test_the_page_size_is_limited() -> None:
    def limit(preset: str, size: str) -> int:
        return max_explained_tokens(GPT.on_meta(build_config(preset, size, vocab_size=50)))

    assert limit("gpt2", "micro") == limit("gpt2", "125m") == 128
    assert limit("modern", "1.3b") == 128
    assert limit("gpt2", "175b") == 29  # of 9,216 heads
    assert 9216 * 29 * 30 / 2 <= 4_010_000


def test_an_empty_text_is_explained(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    told = explain(models["modern"], [""])
    assert [token["kind"] for token in told["tokens"]] == ["marker"]
    assert told["attention"] == [[[[1.0]]] * 4] * 2
    assert told["heads"][0][0] == {"before": None, "first": None, "itself": None}
    assert write_explanation_page(told, tmp_path / "page.html").is_file()


# ---------------------------------------------------------------- the page and the words


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">([^<]*)</script>', page)
    return json.loads(found)


HOSTILE = "</script><script>document.title='owned'</script></style><img src=x onerror=alert(1)> &amp; ${x} $title \x00\x1b[31m"
HOSTILE += " \u202e שלום 👩‍👩‍👧"


@settings(max_examples=20)
@given(st.text(max_size=40))
@example(HOSTILE)
@example("\ud800 half")
def test_any_text_is_escaped_in_the_page(
    models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    told = explain(models["gpt2"], [text])
    page = write_explanation_page(told, tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and page.count("</script>") == 2 and page.count("<style") == 1
    assert not re.search(r"https?:|<link|<img|@import", page)
    data = data_of(page)
    assert [data["words"][token["word"]][0] for token in data["tokens"]] == [token["text"] for token in told["tokens"]]
    weights = np.frombuffer(base64.b64decode(data["attention"]), dtype="<u2") / 65535
    wanted = [x for layer in told["attention"] for head in layer for row in head for x in row]
    assert np.abs(weights - wanted).max() <= 1 / 65535


def test_the_content_security_policy_matches_the_page(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    page = write_explanation_page(explain(models["gpt2"], [TEXT]), tmp_path / "page.html").read_text(encoding="utf-8")
    (style,), (script,) = (
        re.findall(r"<style>(.*?)</style>", page, re.DOTALL),
        re.findall(r"<script>(.*?)</script>", page, re.DOTALL),
    )
    for part in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" in page
    assert content_security_policy(style, script) in page
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write", "://"):
        assert forbidden not in script
    assert " style=" not in page.replace(style, "")


@pytest.mark.parametrize(
    ("text", "way"), [("abc", "ltr"), ("12 שלום abc", "rtl"), ("سلام", "rtl"), ("", "ltr"), ("日本", "ltr")]
)
def test_a_text_runs_its_own_way(text: str, way: str) -> None:
    assert text_direction([text]) == way


def test_from_the_command_line(
    models: dict[str, LanguageModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run_command(["explain", str(models["modern"].path), f"\x1b[31m {TEXT}", "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    for word in (
        "next token: “",
        "highest surprisal: “",
        "attributions for ",
        " of the exact difference after ",
        f"page: {page}",
    ):
        assert word in said
    assert (
        run_command(["explain", str(models["modern"].path), TEXT, "--out", str(page), "--json", "--word", "doctor"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(page)
    assert told == {**nextword.explain(models["modern"].path, TEXT, word="doctor").to_dict(), "page": str(page)}
    assert run_command(["explain", str(tmp_path), TEXT]) == 1
    assert "not a model directory or a run directory" in capsys.readouterr().err
    assert run_command(["explain", str(models["modern"].path), TEXT, "--out", str(tmp_path / "no" / "page.html")]) == 1
    assert "cannot write" in capsys.readouterr().err
