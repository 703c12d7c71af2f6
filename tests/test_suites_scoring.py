"""Likelihoods: those of the stock class on the same directory, one text at a time, by lm-eval's rules; batched as single."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextword.commands import api
from nextword.common.errors import NextwordError, UsageError
from nextword.data.decoding import Problems
from nextword.data.tokenizer import Tokenizer
from nextword.inference import loglikelihood
from nextword.inference.loglikelihood import Scorer, Text, batches, tree
from nextword.model import fused
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import save_model
from nextword.pipeline.item_scores import marks
from nextword.pipeline.language_model import load
from nextword.tasks.benchmark_items import Question, question_of, read_items
from nextword.tasks.benchmark_spec import find_suite

PRESETS = ("gpt1", "gpt2", "modern", "tutorial")
CONTEXT = 128


def directory(preset: str, base: Path, out: Path, context_length: int = CONTEXT) -> Path:
    """A stock directory of a tiny random model, far enough from uniform that its rankings mean something."""
    tokenizer = Tokenizer.open(base / "model")
    torch.manual_seed(3)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": context_length}
    model = GPT(build_config(preset, vocab_size=tokenizer.vocab_size + 5, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    out.mkdir()
    save_model(model, out, end_of_text=tokenizer.end_of_text, pad=tokenizer.pad)
    tokenizer.save(out, context_length)
    return out


@pytest.fixture(scope="module", params=PRESETS)
def model_path(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(request.param, base, tmp_path_factory.mktemp("stock") / request.param)


@pytest.fixture(scope="module")
def suite_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few dozen real sentences in three published forms: those of the language reference inside every Python."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("suites")
    text = " ".join(" ".join(topics[name] for name in sorted(topics)[:3]).split())
    sentences = [one.strip() + "." for one in text.split(". ") if 30 < len(one) < 160][:36]
    pairs = [
        {"sentence_good": one, "sentence_bad": " ".join([*one.split()[:2], *one.split()[:1:-1]]), "UID": f"u{i % 3}"}
        for i, one in enumerate(sentences)
    ]
    choices = [
        {"question": one, "choices": [sentences[(i + k) % len(sentences)][: 20 + 7 * k] for k in range(2 + i % 4)],
         "answer": i % 2}
        for i, one in enumerate(sentences)
    ]  # fmt: skip
    endings = [
        {
            "context": one[: len(one) // 2],
            "endings": [one[len(one) // 2 :], "is.", "ä – 漢字 of it", one[::-1]],
            "label": i % 4,
        }
        for i, one in enumerate(sentences)
    ]
    lines = [{"text": one} for one in sentences]
    for name, rows in {"blimp": pairs, "arc": choices, "hellaswag": endings, "lambada": lines}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {path.stem: path for path in folder.iterdir()}


def questions_of(name: str, path: Path) -> list[Question]:
    suite = find_suite(f"{name}={path}")
    return [question_of(suite, item) for item in read_items(suite, Problems(strict=True))]


class Stock:
    """lm-eval's own computation, written down from its `TemplateLM` and `HFLM`, on the stock classes: one text at a time."""

    def __init__(self, path: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def ask(self, context: str, continuation: str) -> tuple[float, bool]:
        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False)

        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = encode(context) if context else [self.tokenizer.bos_token_id]
        after = encode(context + continuation)[len(before) :] if context else encode(continuation)
        ids = (before + after)[-(CONTEXT + 1) :]
        log_p = self.log_probabilities(ids[:-1])[-len(after) :]
        target = torch.tensor(after)
        return float(log_p.gather(1, target[:, None]).sum()), bool((log_p.argmax(1) == target).all())


@pytest.mark.parametrize("name", ["blimp", "arc", "hellaswag", "lambada"])
def test_likelihoods_and_rankings_are_the_stock_classes(
    model_path: Path, suite_files: dict[str, Path], name: str
) -> None:
    questions = questions_of(name, suite_files[name])
    model, stock = load(model_path), Stock(model_path)
    found = Scorer(model.gpt, model.tokenizer, greedy=True).ask([question.asked for question in questions])
    for question, likely in zip(questions, found, strict=True):
        expected = [stock.ask(*pair) for pair in question.asked]
        for one, (nats, greedy) in zip(likely, expected, strict=True):
            assert one.nats == pytest.approx(nats, abs=1e-4, rel=1e-5)
            assert one.greedy == greedy
        for sizes in ([1] * len(likely), list(map(len, question.answers))):
            mine, theirs = (
                sorted(range(len(likely)), key=lambda i: values[i] / sizes[i])
                for values in ([one.nats for one in likely], [nats for nats, _ in expected])
            )
            assert mine == theirs


@pytest.mark.parametrize("name", ["blimp", "arc", "hellaswag", "lambada"])
def test_scores_are_lm_evals(model_path: Path, suite_files: dict[str, Path], name: str) -> None:
    suite = find_suite(f"{name}={suite_files[name]}")
    items, stock = read_items(suite, Problems(strict=True)), Stock(model_path)
    found = marks(load(model_path), suite, items)
    for i, item in enumerate(items):
        question = question_of(suite, item)
        nats, greedy = zip(*(stock.ask(*pair) for pair in question.asked), strict=True)
        if name == "lambada":
            assert found.values["acc"][i] == float(greedy[0])
            assert found.values["nats"][i] == pytest.approx(-nats[0], abs=1e-4, rel=1e-5)
            continue
        characters = np.array([float(len(answer)) for answer in question.answers])
        n_bytes = np.array([float(len(answer.encode())) for answer in question.answers])
        right = {
            "acc": np.argmax(nats),
            "acc_norm": np.argmax(nats / characters),
            "acc_bytes": np.argmax(nats / n_bytes),
        }
        assert {m: found.values[m][i] for m in suite.metrics} == {
            m: float(right[m] == question.gold) for m in suite.metrics
        }


def test_perplexity_is_the_stock_classs(model_path: Path, texts: Path) -> None:
    """By sliding window: each token but the first window's sees at least half a window."""
    text = sorted(texts.iterdir())[0]
    stock, ids = Stock(model_path), []
    ids = [
        *stock.tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False),
        stock.tokenizer.eos_token_id,
    ]
    for stride in (None, CONTEXT, 10):
        step, nats, done = stride or CONTEXT // 2, 0.0, 0
        for start in range(0, len(ids), step):
            window = ids[start : start + CONTEXT + 1]
            new = start + len(window) - 1 - done
            if new <= 0:
                break
            log_p = stock.log_probabilities(window[:-1])
            nats -= float(log_p[-new:].gather(1, torch.tensor(window[-new:])[:, None]).sum())
            done += new
        result = api.evaluate(model_path, text, stride=stride)
        assert (result["tokens"], result["stride"], done) == (len(ids) - 1, step, len(ids) - 1)
        assert result["loss"] == pytest.approx(nats / done, abs=1e-4)
        assert result["perplexity"] == pytest.approx(math.exp(nats / done), rel=1e-4)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.read_bytes()), rel=1e-4)
        assert result["interval"]["low"] <= result["bits_per_byte"] * 1.02
        assert result["interval"]["high"] >= result["bits_per_byte"] * 0.98


@pytest.mark.parametrize("compiled", [True, False])
def test_batched_is_single(model_path: Path, suite_files: dict[str, Path], compiled: bool, monkeypatch) -> None:
    """Packed into rows, with what they share read once, as if each text were alone; with compiled parts and without."""
    if not compiled:
        monkeypatch.setattr(loglikelihood.fused, "available", lambda model: False)
        monkeypatch.setattr(loglikelihood.fused, "library", lambda: (None, "not here"))
    elif not fused.available(load(model_path).gpt):
        pytest.skip(f"no compiled code: {fused.library()[1]}")
    model = load(model_path)
    scorer = Scorer(model.gpt, model.tokenizer, greedy=True)
    questions = [question.asked for name in suite_files for question in questions_of(name, suite_files[name])]
    together = scorer.ask(questions)
    for pairs, likely in zip(questions, together, strict=True):
        for pair, one in zip(pairs, likely, strict=True):
            [[alone]] = scorer.ask([[pair]])
            assert one.nats == pytest.approx(alone.nats, abs=2e-4)
            assert (one.tokens, one.greedy) == (alone.tokens, alone.greedy)


@pytest.fixture(scope="module")
def modern(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    model = load(directory("modern", base, tmp_path_factory.mktemp("modern") / "m"))
    return Scorer(model.gpt, model.tokenizer)


@settings(max_examples=25)
@given(st.data())
def test_any_texts_that_begin_alike(modern: Scorer, data: st.DataObject) -> None:
    """Trees of any shape: the same sums as the model's own forward pass of each text."""
    token = st.integers(0, 3)
    questions = []
    for _ in range(data.draw(st.integers(1, 4))):
        shared = data.draw(st.lists(token, min_size=1, max_size=50))
        ends = data.draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=4))
        texts = [
            modern.fitted([*shared, *end], data.draw(st.integers(1, len(end) + len(shared) - 1 or 1))) for end in ends
        ]
        questions.append(texts)
    found = modern.score(questions)
    for texts, likely in zip(questions, found, strict=True):
        for text, one in zip(texts, likely, strict=True):
            ids = torch.tensor([text.ids])
            with torch.no_grad():
                log_p = modern.model.unembed(modern.model(ids[:, :-1]))[0].double().log_softmax(-1)
            expected = log_p[-text.asked :].gather(1, ids[0, -text.asked :, None]).sum()
            assert one.nats == pytest.approx(float(expected), abs=1e-4, rel=1e-5)


def test_a_tree_reads_what_is_shared_once() -> None:
    found = tree([Text([5, 6, 7, 8, 9], 2), Text([5, 6, 7, 3], 3), Text([5, 6, 7, 8, 9], 1)], [4, 5, 6])
    assert found.tokens.tolist() == [5, 6, 7, 8, 8]  # the first text's inputs are 5 6 7 8, the second's 5 6 7
    assert found.positions.tolist() == [0, 1, 2, 3, 3]
    assert found.shared == 3
    assert found.begins.tolist() == [0, 0, 0, 3, 4]
    assert found.after.tolist() == [2, 3, 0, 1, 2, 4]
    assert found.words.tolist() == [8, 9, 6, 7, 3, 9]
    assert found.texts.tolist() == [4, 4, 5, 5, 5, 6]


def test_texts_are_a_tree_where_that_spares_something(modern: Scorer) -> None:
    """One may be longer than the context, its texts are not; and what hardly begins alike stands by itself."""
    context = list(range(3, 3 + CONTEXT - 20))
    alike = [Text([*context, *[n] * 20], 20) for n in range(4)]
    [one] = modern.trees([alike])
    assert len(one.tokens) == len(context) + 4 * 19 > CONTEXT
    [together], each = modern.score([alike]), modern.score([[text] for text in alike])
    plain = Scorer(modern.model, modern.tokenizer)
    plain.fused = None  # where nothing is compiled
    [without] = plain.score([alike])
    for likely, by_itself, other in zip(together, each, without, strict=True):
        assert likely.nats == pytest.approx(by_itself[0].nats, abs=1e-4)
        assert other.nats == pytest.approx(by_itself[0].nats, abs=1e-4)
    apart = [
        Text([1, *[n] * 400], 400) for n in range(2, 4)
    ]  # more than its context: they are asked for their trees alone
    assert [one.texts[0] for one in modern.trees([apart])] == [0, 1]


def test_rows_are_full() -> None:
    """Little of what goes through the model is padding."""
    sizes = np.random.default_rng(0).integers(5, 60, 500).tolist()
    trees = [tree([Text(list(range(n + 1)), 1)], [i]) for i, n in enumerate(sizes)]
    rows = list(batches(trees, 2048))
    padded = sum(len(batch) * max(sum(len(one.tokens) for one in row) for row in batch) for batch in rows)
    assert sorted(one.texts[0] for batch in rows for row in batch for one in row) == list(range(500))
    assert padded < 1.05 * sum(sizes)
    assert max(len(batch) for batch in rows) > 1


def test_a_long_context_keeps_its_end(modern: Scorer) -> None:
    [text] = modern.texts([("x y " * 200, "z")])
    assert len(text.ids) == CONTEXT + 1
    [[one]] = modern.ask([[("x y " * 200 + "x", " z")]])
    assert one.tokens == len(modern.tokenizer.encode(" z"))
    [answer] = modern.texts([("", "x y " * 200)])
    assert (len(answer.ids), answer.asked) == (CONTEXT + 1, CONTEXT)


def test_whitespace_moves_to_the_continuation(modern: Scorer) -> None:
    assert modern.texts([("a question \n", "b")]) == modern.texts([("a question", " \nb")])
    assert modern.texts([(" \n", "b")]) == modern.texts([("", " \nb")])
    assert modern.texts([("", "b")])[0].ids[0] == modern.tokenizer.end_of_text


def test_another_models_tokenizer_and_broken_weights_are_said(modern: Scorer, base: Path) -> None:
    small = GPT(build_config("modern", "tiny", vocab_size=300, n_layers=1, d_model=32))
    with pytest.raises(UsageError, match="not the tokenizer that the model was trained with"):
        Scorer(small, modern.tokenizer)
    broken = load(base).gpt
    with torch.no_grad():
        broken.blocks[0].feed_forward.down.weight[0, 0] = torch.nan  # pyright: ignore[reportIndexIssue]
    with pytest.raises(NextwordError, match="not a finite number"):
        Scorer(broken, modern.tokenizer).ask([[("a", " b")]])
