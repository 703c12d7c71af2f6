"""Log-likelihoods: equal to those of transformers, by the rules of lm-eval; batched equals single."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextword
from nextword.common import native_build
from nextword.common.errors import NextwordError, UsageError
from nextword.data.issues import IssueLog
from nextword.data.tokenizer import Tokenizer
from nextword.inference.loglikelihood import LoglikelihoodScorer, ScoredSequence, build_tree, pack_batches
from nextword.model import ops
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import save_model
from nextword.pipeline.item_scores import score_items
from nextword.pipeline.language_model import load
from nextword.tasks.benchmark_items import LoglikelihoodItem, load_rows, loglikelihood_item
from nextword.tasks.benchmark_spec import find_benchmark

PRESETS = ("gpt1", "gpt2", "modern", "tutorial")
CONTEXT = 128


def directory(preset: str, base: Path, out: Path, context_length: int = CONTEXT) -> Path:
    """A Hugging Face directory of a tiny random model, far enough from uniform that its rankings mean something."""
    tokenizer = Tokenizer.open(base / "model")
    torch.manual_seed(3)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": context_length}
    model = GPT(build_config(preset, vocab_size=tokenizer.vocab_size + 5, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    out.mkdir()
    save_model(model, out, end_of_text_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
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
        {
            "question": one,
            "choices": [sentences[(i + k) % len(sentences)][: 20 + 7 * k] for k in range(2 + i % 4)],
            "answer": i % 2,
        }
        for i, one in enumerate(sentences)
    ]
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


def questions_of(name: str, path: Path) -> list[LoglikelihoodItem]:
    suite = find_benchmark(f"{name}={path}")
    return [loglikelihood_item(suite, item) for item in load_rows(suite, IssueLog(strict=True))]


class Stock:
    """lm-eval's own computation, written down from its `TemplateLM` and `HFLM`, on transformers: one text at a time."""

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
def test_loglikelihoods_and_rankings_equal_transformers(
    model_path: Path, suite_files: dict[str, Path], name: str
) -> None:
    questions = questions_of(name, suite_files[name])
    model, stock = load(model_path), Stock(model_path)
    found = LoglikelihoodScorer(model.gpt, model.tokenizer, check_greedy=True).score_pairs(
        [question.requests for question in questions]
    )
    for question, likely in zip(questions, found, strict=True):
        expected = [stock.ask(*pair) for pair in question.requests]
        for one, (nats, greedy) in zip(likely, expected, strict=True):
            assert one.logprob == pytest.approx(nats, abs=1e-4, rel=1e-5)
            assert one.is_greedy == greedy
        for sizes in ([1] * len(likely), list(map(len, question.choices))):
            mine, theirs = (
                sorted(range(len(likely)), key=lambda i: values[i] / sizes[i])
                for values in ([one.logprob for one in likely], [nats for nats, _ in expected])
            )
            assert mine == theirs


@pytest.mark.parametrize("name", ["blimp", "arc", "hellaswag", "lambada"])
def test_scores_equal_lm_eval(model_path: Path, suite_files: dict[str, Path], name: str) -> None:
    suite = find_benchmark(f"{name}={suite_files[name]}")
    items, stock = load_rows(suite, IssueLog(strict=True)), Stock(model_path)
    found = score_items(load(model_path), suite, items)
    for i, item in enumerate(items):
        question = loglikelihood_item(suite, item)
        nats, greedy = zip(*(stock.ask(*pair) for pair in question.requests), strict=True)
        if name == "lambada":
            assert found.item_values["acc"][i] == float(greedy[0])
            assert found.item_values["nats"][i] == pytest.approx(-nats[0], abs=1e-4, rel=1e-5)
            continue
        characters = np.array([float(len(answer)) for answer in question.choices])
        n_bytes = np.array([float(len(answer.encode())) for answer in question.choices])
        right = {
            "acc": np.argmax(nats),
            "acc_norm": np.argmax(nats / characters),
            "acc_bytes": np.argmax(nats / n_bytes),
        }
        assert {m: found.item_values[m][i] for m in suite.metrics} == {
            m: float(right[m] == question.gold_index) for m in suite.metrics
        }


def test_perplexity_equals_transformers(model_path: Path, texts: Path) -> None:
    """By sliding window: each token but the first window's sees at least half a window."""
    text = sorted(texts.iterdir())[0]
    stock, ids = Stock(model_path), []
    eos = stock.tokenizer.eos_token_id
    ids = [eos, *stock.tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False), eos]
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
        result = nextword.evaluate(model_path, text, stride=stride).to_dict()
        assert (result["tokens"], result["stride"], done) == (len(ids) - 1, step, len(ids) - 1)
        assert result["loss"] == pytest.approx(nats / done, abs=1e-4)
        assert result["perplexity"] == pytest.approx(math.exp(nats / done), rel=1e-4)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.read_bytes()), rel=1e-4)
        assert (result["interval"]["n"], result["interval"]["low"]) == (1, None)


@pytest.mark.parametrize("compiled", [True, False])
def test_batched_scores_equal_single_scores(
    model_path: Path, suite_files: dict[str, Path], compiled: bool, monkeypatch
) -> None:
    """Packed rows with shared prefixes give the scores of single sequences, with and without kernels."""
    if not compiled:
        monkeypatch.setattr(native_build, "load_native_library", lambda source: (None, "disabled by the test"))
    elif not load(model_path).gpt.supports_kernels():
        pytest.skip(f"no compiled kernels: {native_build.load_native_library(ops.SOURCE)[1]}")
    model = load(model_path)
    scorer = LoglikelihoodScorer(model.gpt, model.tokenizer, check_greedy=True)
    questions = [question.requests for name in suite_files for question in questions_of(name, suite_files[name])[:12]]
    together = scorer.score_pairs(questions)
    for pairs, likely in zip(questions, together, strict=True):
        for pair, one in zip(pairs, likely, strict=True):
            [[alone]] = scorer.score_pairs([[pair]])
            assert one.logprob == pytest.approx(alone.logprob, abs=2e-4)
            assert (one.num_tokens, one.is_greedy) == (alone.num_tokens, alone.is_greedy)


@pytest.fixture(scope="module")
def modern(base: Path, tmp_path_factory: pytest.TempPathFactory) -> LoglikelihoodScorer:
    model = load(directory("modern", base, tmp_path_factory.mktemp("modern") / "m"))
    return LoglikelihoodScorer(model.gpt, model.tokenizer)


@settings(max_examples=25)
@given(st.data())
def test_prefix_trees_equal_separate_sequences(modern: LoglikelihoodScorer, data: st.DataObject) -> None:
    """Trees of any shape have the log-likelihoods of separate forward passes."""
    token = st.integers(0, 3)
    questions = []
    for _ in range(data.draw(st.integers(1, 4))):
        shared = data.draw(st.lists(token, min_size=1, max_size=50))
        ends = data.draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=4))
        texts = [
            modern.truncate([*shared, *end], data.draw(st.integers(1, len(end) + len(shared) - 1 or 1))) for end in ends
        ]
        questions.append(texts)
    found = modern.score_sequences(questions)
    for texts, likely in zip(questions, found, strict=True):
        for text, one in zip(texts, likely, strict=True):
            ids = torch.tensor([text.token_ids])
            with torch.no_grad():
                log_p = modern.model.unembed(modern.model(ids[:, :-1]))[0].double().log_softmax(-1)
            expected = log_p[-text.num_targets :].gather(1, ids[0, -text.num_targets :, None]).sum()
            assert one.logprob == pytest.approx(float(expected), abs=1e-4, rel=1e-5)


def test_a_tree_holds_the_common_prefix_once() -> None:
    found = build_tree(
        [ScoredSequence([5, 6, 7, 8, 9], 2), ScoredSequence([5, 6, 7, 3], 3), ScoredSequence([5, 6, 7, 8, 9], 1)],
        [4, 5, 6],
    )
    assert found.tokens.tolist() == [5, 6, 7, 8, 8]  # the first text's inputs are 5 6 7 8, the second's 5 6 7
    assert found.positions.tolist() == [0, 1, 2, 3, 3]
    assert found.prefix_length == 3
    assert found.branch_starts.tolist() == [0, 0, 0, 3, 4]
    assert found.predictor_positions.tolist() == [2, 3, 0, 1, 2, 4]
    assert found.target_ids.tolist() == [8, 9, 6, 7, 3, 9]
    assert found.sequence_ids.tolist() == [4, 4, 5, 5, 5, 6]


def test_sequences_form_a_tree_only_if_it_saves_work(
    modern: LoglikelihoodScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree may be longer than the context; sequences with hardly any common prefix do not share one."""
    context = list(range(3, 3 + CONTEXT - 20))
    alike = [ScoredSequence([*context, *[n] * 20], 20) for n in range(4)]
    [one] = modern.build_trees([alike])
    assert len(one.tokens) == len(context) + 4 * 19 > CONTEXT
    [together], each = modern.score_sequences([alike]), modern.score_sequences([[text] for text in alike])
    with monkeypatch.context() as patch:
        patch.setattr(native_build, "load_native_library", lambda source: (None, "disabled by the test"))
        [without] = modern.score_sequences([alike])
    for likely, by_itself, other in zip(together, each, without, strict=True):
        assert likely.logprob == pytest.approx(by_itself[0].logprob, abs=1e-4)
        assert other.logprob == pytest.approx(by_itself[0].logprob, abs=1e-4)
    apart = [
        ScoredSequence([1, *[n] * 400], 400) for n in range(2, 4)
    ]  # more than its context: they are asked for their trees alone
    assert [one.sequence_ids[0] for one in modern.build_trees([apart])] == [0, 1]


def test_batches_have_little_padding() -> None:
    """At most 5 % of the tokens are padding."""
    sizes = np.random.default_rng(0).integers(5, 60, 500).tolist()
    trees = [build_tree([ScoredSequence(list(range(n + 1)), 1)], [i]) for i, n in enumerate(sizes)]
    rows = list(pack_batches(trees, 2048))
    padded = sum(len(batch) * max(sum(len(one.tokens) for one in row) for row in batch) for batch in rows)
    assert sorted(one.sequence_ids[0] for batch in rows for row in batch for one in row) == list(range(500))
    assert padded < 1.05 * sum(sizes)
    assert max(len(batch) for batch in rows) > 1


def test_a_long_context_loses_its_beginning(modern: LoglikelihoodScorer) -> None:
    [text] = modern.encode_pairs([("x y " * 200, "z")])
    assert len(text.token_ids) == CONTEXT + 1
    [[one]] = modern.score_pairs([[("x y " * 200 + "x", " z")]])
    assert one.num_tokens == len(modern.tokenizer.encode(" z"))
    [answer] = modern.encode_pairs([("", "x y " * 200)])
    assert (len(answer.token_ids), answer.num_targets) == (CONTEXT + 1, CONTEXT)


def test_whitespace_moves_to_the_continuation(modern: LoglikelihoodScorer) -> None:
    assert modern.encode_pairs([("a question \n", "b")]) == modern.encode_pairs([("a question", " \nb")])
    assert modern.encode_pairs([(" \n", "b")]) == modern.encode_pairs([("", " \nb")])
    assert modern.encode_pairs([("", "b")])[0].token_ids[0] == modern.tokenizer.eos_id


def test_wrong_tokenizers_and_nonfinite_weights_are_rejected(modern: LoglikelihoodScorer, base: Path) -> None:
    small = GPT(build_config("modern", "tiny", vocab_size=300, n_layers=1, d_model=32))
    with pytest.raises(UsageError, match="not the tokenizer that the model was trained with"):
        LoglikelihoodScorer(small, modern.tokenizer)
    broken = load(base).gpt
    with torch.no_grad():
        broken.blocks[0].feed_forward.down.weight[0, 0] = torch.nan  # pyright: ignore[reportIndexIssue]
    with pytest.raises(NextwordError, match="not finite"):
        LoglikelihoodScorer(broken, modern.tokenizer).score_pairs([[("a", " b")]])
