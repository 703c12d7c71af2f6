"""Benchmark evaluation: chance, the control with shuffled words, seeds, comparison with another model, generated text."""

import html
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import t

import nextword
from conftest import CLIRunner
from nextword.commands.evaluate import EvaluateResult
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import write_manifest
from nextword.common.statistics import holm, mean_of_runs, ratio_of_sums
from nextword.data.issues import IssueLog
from nextword.evaluation import evaluate as evaluation
from nextword.evaluation.evaluate import (
    EvalModels,
    compare_models,
    correct_for_multiple_comparisons,
    evaluate_benchmark,
    shuffled_control,
    summarize_item_scores,
)
from nextword.inference.engine import Completion
from nextword.inference.loglikelihood import ContinuationScore
from nextword.pipeline import item_scores
from nextword.pipeline.item_scores import ItemScores, score_items, win_score
from nextword.pipeline.language_model import load
from nextword.reporting.comparison import write_comparison
from nextword.reporting.report import write_card, write_report
from nextword.tasks.benchmark_items import BenchmarkRow, load_rows
from nextword.tasks.benchmark_spec import find_benchmark
from nextword.tasks.metrics import generation_metrics

WORDS = ["the", "a", "cat", "dog", "house", "tree", "sees", "likes", "finds", "small", "old", "green"]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random benchmarks, on which no model can be better than chance."""
    folder, rng = tmp_path_factory.mktemp("random"), np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, 6))

    pairs = [(sentence(), sentence()) for _ in range(60)]
    rows = [{"sentence_good": a, "sentence_bad": b, "UID": f"group{i % 3}"} for i, (a, b) in enumerate(pairs)]
    jsonl(folder / "pairs.jsonl", rows)
    questions = [(sentence(), [sentence() for _ in range(2 + i % 3)]) for i in range(40)]
    rows = [{"question": question, "choices": c, "answer": i % 2} for i, (question, c) in enumerate(questions)]
    jsonl(folder / "quiz.jsonl", rows)
    jsonl(folder / "last.jsonl", [{"text": sentence()} for _ in range(20)])
    jsonl(folder / "write.jsonl", [{"text": sentence(), "summary": sentence()} for _ in range(12)])
    rows = [{"s": {"sentence": [sentence() for _ in range(3)], "gold_label": [2, 0, 1]}} for _ in range(15)]
    jsonl(folder / "s.jsonl", rows)
    (folder / "own.toml").write_text(
        '[writing]\nkind = "writing"\nfiles = ["write.jsonl"]\nprompt = "{text}: "\nreference = "summary"\nmax_tokens = 8\n'
        'metrics = ["exact_match", "chrf"]\n[preferences]\nkind = "stereotypes"\nfiles = ["s.jsonl"]\nsentences = "s"\n'
    )
    return folder


# ---------------------------------------------------------------- ratios over documents


def test_a_ratio_over_documents():
    rng = np.random.default_rng(0)
    values = rng.normal(2, 0.3, 12)
    expected, equal = (
        mean_of_runs(values),
        ratio_of_sums(7 * values, np.full(12, 7.0)),
    )  # Student's t interval if all sizes are equal
    assert (equal.value, equal.low, equal.high) == pytest.approx((expected.value, expected.low, expected.high))
    sizes = np.array([3.0, 1.0, 2.0, 4.0])
    unequal = ratio_of_sums([6.0, 2.0, 5.0, 8.0], sizes)
    left_out = np.array([15 / 7, 19 / 9, 16 / 8, 13 / 6])
    w = sizes / 10
    residuals = np.diag(w / (1 - w)) @ (
        np.eye(4) - np.outer(np.ones(4), w)
    )  # of the values of units: value minus ratio
    a = residuals @ residuals.T
    margin = t.ppf(0.975, a.trace() ** 2 / (a @ a).trace()) * np.sqrt(3 / 4 * np.square(left_out - 2.1).sum())
    assert (unequal.value, unequal.low, unequal.n) == (pytest.approx(2.1), pytest.approx(2.1 - margin), 4)
    assert ratio_of_sums([6.0, 2.0, 3.0], [9.0, 1.0, 1.0]).low is None  # the first one decides
    assert ratio_of_sums([3.0], [2.0]).low is None and ratio_of_sums([3.0, 0.0], [2.0, 0.0]).value == 1.5
    with pytest.raises(UsageError, match="all sizes are 0"):
        ratio_of_sums([1.0, 2.0], [0.0, 0.0])


@pytest.mark.parametrize("documents", [5, 30])
def test_the_interval_over_documents_of_unequal_length_covers(documents):
    """Lengths that vary by a factor of 30, as those of books do, and losses that vary between documents and inside them."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        sizes = np.exp(rng.normal(0, 0.9, documents))
        losses = sizes * (2 + rng.normal(0, 0.2, documents)) + np.sqrt(sizes) * rng.normal(0, 0.1, documents)
        score = ratio_of_sums(losses, sizes)
        covered += not (score.is_above(2) or score.is_below(2))
    assert 940 <= covered <= 993  # at most 0.98 for documents of one length


# ---------------------------------------------------------------- item scores


def test_chance_is_the_score_of_random_guessing(base, files):
    model = load(base)

    def chance(request: str) -> float | None:
        benchmark = find_benchmark(request)
        return score_items(model, benchmark, load_rows(benchmark, IssueLog())).chance

    assert chance(f"blimp={files / 'pairs.jsonl'}") == 0.5
    assert chance(f"arc={files / 'quiz.jsonl'}") == pytest.approx(np.mean([1 / (2 + i % 3) for i in range(40)]))
    assert chance(f"preferences={files / 'own.toml'}") == 0.5
    cloze = chance(f"lambada={files / 'last.jsonl'}")
    assert cloze is not None and 0 < cloze <= 1 / model.gpt.config.vocab_size
    assert chance(f"writing={files / 'own.toml'}") == 0.0


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.05 / 4, / 3, then 0.03 > 0.05 / 2
    assert holm([0.03, None, 0.02]) == [True, False, True] and holm([None, 0.06]) == [False, False] and holm([]) == []


def test_groups_that_guess_are_seldom_marked():
    """Of 67 groups that guess, none is significantly different from chance in at least 19 of 20 evaluations."""
    rng = np.random.default_rng(0)
    benchmark = find_benchmark("arc")
    rows = [BenchmarkRow("", i, {}, f"group {i % 67}") for i in range(67 * 40)]
    marked, evaluations = 0, 60
    for _ in range(evaluations):
        values = (rng.random(len(rows)) < 0.5).astype(float)
        groups = summarize_item_scores(benchmark, ItemScores(dict.fromkeys(benchmark.metrics, values), 0.5), rows)[
            "groups"
        ]
        marked += any(group["above_chance"] or group["below_chance"] for group in groups.values())
    assert marked <= 0.15 * evaluations  # 5 % expected; each at 0.05 alone would mark 96 %
    better = [0.5, *[1.0] * 39]
    values = np.array([better[i // 67] if i % 67 == 3 else float(i // 67 % 2) for i in range(len(rows))])
    groups = summarize_item_scores(benchmark, ItemScores(dict.fromkeys(benchmark.metrics, values), 0.5), rows)["groups"]
    assert [name for name, group in groups.items() if group["above_chance"]] == ["group 3"]
    text = str(EvaluateResult(suites={"arc": {"metric": "acc", "score": 0.5, "n": 2680, "groups": groups}}))
    assert "Holm-corrected for 67 comparisons" in text


def test_comparisons_of_one_evaluation_are_corrected_together():
    def comparison(p_value):
        return {"real": p_value < 0.05, "ahead": "this" if p_value < 0.05 else None, "p_value": p_value}

    suites = {
        name: {"score": 0.6, "chance": 0.5, "p_value": p, "scrambled": None, "against": comparison(p)}
        for name, p in (("a", 0.001), ("b", 0.04), ("c", 0.5))
    }
    result = {"suites": suites, "against": comparison(0.03)}
    correct_for_multiple_comparisons(result)
    assert [suites[name]["above_chance"] for name in "abc"] == [True, False, False]
    assert [part["against"]["real"] for part in (result, *suites.values())] == [False, True, False, False]
    assert result["against"]["ahead"] is None and result["against"]["comparisons"] == 4


def test_random_guessing_is_not_above_chance(base, files):
    """About one in forty random results is above chance by its confidence interval."""
    rng = np.random.default_rng(0)
    benchmark = find_benchmark("arc")
    above = 0
    for _ in range(200):
        values = (rng.random(150) < 0.25).astype(float)
        scores = ItemScores(dict.fromkeys(benchmark.metrics, values), chance=0.25)
        above += summarize_item_scores(benchmark, scores, [])["above_chance"]
    assert above <= 14
    result = evaluate_benchmark(EvalModels(load(base)), find_benchmark(f"arc={files / 'quiz.jsonl'}"))
    assert result["above_chance"] is False
    assert "not above chance" in str(EvaluateResult(suites={"arc": result}))


def test_ties_share_the_credit(base, tmp_path):
    """lm-eval gives it to the first choice, which is always correct for minimal pairs."""
    rows = [{"sentence_good": "the same words", "sentence_bad": "the same words", "UID": "x"}] * 3
    benchmark = find_benchmark(f"blimp={jsonl(tmp_path / 'same.jsonl', rows)}")
    scores = score_items(load(base), benchmark, load_rows(benchmark, IssueLog()))
    assert scores.item_values["acc"].tolist() == [0.5] * 3
    assert scores.ties == 3
    assert (win_score(2, 1), win_score(1, 2), win_score(1, 1)) == (1.0, 0.0, 0.5)


def test_stereotypes_are_scored_as_by_stereoset(base, files):
    benchmark = find_benchmark(f"preferences={files / 'own.toml'}")
    scores = score_items(load(base), benchmark, load_rows(benchmark, IssueLog()))
    ss, lms = scores.item_values["stereotyped"].mean(), scores.item_values["meaningful"].mean()
    assert scores.aggregate("icat").value == pytest.approx(lms * min(ss, 1 - ss) / 0.5)
    assert scores.secondary_metrics(benchmark) == ["meaningful", "icat"]


# ---------------------------------------------------------------- comparisons


class AlphabeticalScorer:
    """Scores a text by the number of neighbouring words in alphabetical order."""

    def __init__(self, *_, **__): ...

    def score_pairs(self, pair_groups, progress=None):
        def score(context, text):
            words = (context + text).split()
            return ContinuationScore(float(sum(a <= b for a, b in pairwise(words))), 1, True)

        return [[score(*pair) for pair in pairs] for pairs in pair_groups]


def test_a_score_that_depends_on_word_order_drops_with_shuffled_words(base, tmp_path, monkeypatch):
    monkeypatch.setattr(item_scores, "LoglikelihoodScorer", AlphabeticalScorer)
    rng = np.random.default_rng(0)
    rows = [sorted(rng.choice(WORDS, 8, replace=False).tolist()) for _ in range(60)]
    pairs = [{"sentence_good": " ".join(row), "sentence_bad": " ".join(row[::-1]), "UID": "x"} for row in rows]
    benchmark = find_benchmark(f"blimp={jsonl(tmp_path / 'p.jsonl', pairs)}")
    result = evaluate_benchmark(EvalModels(load(base)), benchmark)
    assert result["score"] == 1.0 and result["above_chance"]
    assert result["scrambled"]["score"] == 0.5  # the same words in the same order: all ties
    assert result["scrambled"]["order_matters"] and result["scrambled"]["lost"]["value"] == 0.5
    zeros, ones = ItemScores({"stereotyped": np.zeros(50)}), ItemScores({"stereotyped": np.ones(50)})
    assert shuffled_control("stereotyped", zeros, ones)["order_matters"]  # a preference may change in either direction


def test_the_drop_of_shuffled_words_has_an_interval():
    correct, values = ItemScores({"acc": np.ones(200)}), (np.random.default_rng(0).random(200) < 0.5).astype(float)
    control = shuffled_control("acc", correct, ItemScores({"acc": values}))
    assert control["order_matters"] and control["lost"]["value"] == pytest.approx(1 - values.mean())
    assert not shuffled_control("acc", ItemScores({"acc": values}), ItemScores({"acc": values}))["order_matters"]


def test_models_are_compared_by_paired_interval_and_mcnemar():
    rng = np.random.default_rng(0)
    weak = (rng.random(400) < 0.5).astype(float)
    strong = np.maximum(weak, rng.random(400) < 0.3)
    similar = np.where(rng.random(400) < 0.1, 1 - weak, weak)
    result = compare_models("acc", ItemScores({"acc": weak}), ItemScores({"acc": strong}), "B")
    assert result["real"] and result["ahead"] == "other" and result["p"] < 1e-6
    assert (result["only_this"], result["only_other"]) == (0, int((strong > weak).sum()))
    assert result["difference"]["value"] == pytest.approx(weak.mean() - strong.mean())
    assert compare_models("acc", ItemScores({"acc": strong}), ItemScores({"acc": weak}), "B")["ahead"] == "this"
    result = compare_models("acc", ItemScores({"acc": weak}), ItemScores({"acc": similar}), "B")
    assert not result["real"] and result["ahead"] is None
    less, more = ItemScores({"stereotyped": weak}), ItemScores({"stereotyped": strong})
    result = compare_models("stereotyped", less, more, "B")
    assert result["real"] and result["ahead"] == "this"  # 0.5 is best


def test_the_result_of_a_benchmark(base, files):
    model = load(base)
    benchmark = find_benchmark(f"blimp={files / 'pairs.jsonl'}")
    full = evaluate_benchmark(EvalModels(model), benchmark, limit=None)
    assert (full["n"], full["of"], full["metric"], full["chance"]) == (60, 60, "acc", 0.5)
    assert full["low"] <= full["score"] <= full["high"]
    assert {name: group["n"] for name, group in full["groups"].items()} == {f"group{i}": 20 for i in range(3)}
    assert full["score"] == pytest.approx(np.mean([group["score"] for group in full["groups"].values()]))
    sampled = evaluate_benchmark(EvalModels(model), benchmark, limit=15)
    assert (sampled["n"], sampled["of"]) == (15, 60)
    assert {group["n"] for group in sampled["groups"].values()} == {5}
    again = evaluate_benchmark(EvalModels(model), benchmark, limit=15)
    assert again | {"seconds": 0} == sampled | {"seconds": 0}
    compared = evaluate_benchmark(EvalModels(model, load(base), [load(base)]), benchmark, limit=15)
    assert compared["against"]["real"] is False and compared["against"]["difference"]["value"] == 0.0
    assert compared["noise"] == {"models": 2, "scores": [compared["score"]] * 2, "floor": 0.0}
    text = str(EvaluateResult(suites={"blimp": compared}))
    assert ": not significant" in text and "group0" in text


def test_the_shuffled_control_is_a_sample(base, files, monkeypatch):
    monkeypatch.setattr(evaluation, "DEFAULT_ITEM_LIMIT", 10)
    result = evaluate_benchmark(EvalModels(load(base)), find_benchmark(f"arc={files / 'quiz.jsonl'}"), limit=None)
    assert (result["n"], result["scrambled"]["n"]) == (40, 10)


# ---------------------------------------------------------------- generated text


def test_generated_answers(base, files, monkeypatch):
    pytest.importorskip("sacrebleu")
    benchmark = find_benchmark(f"writing={files / 'own.toml'}")
    rows = load_rows(benchmark, IssueLog())
    references = [row.values["summary"] for row in rows]
    answers = [*references[:6], *WORDS[:6]]
    with monkeypatch.context() as patch:
        completions = [Completion("", text, "stop", []) for text in answers]
        patch.setattr(item_scores, "generate_completions", lambda *_: completions)
        scores = score_items(load(base), benchmark, rows)
    assert scores.aggregate("exact_match").value == 0.5
    chrf = generation_metrics(references, answers, ["chrf"])["chrf"].value
    assert scores.aggregate("chrf").value == pytest.approx(chrf)
    assert scores.chance == 0.0
    result = evaluate_benchmark(EvalModels(load(base), compare_to=load(base)), benchmark)
    assert (result["metric"], result["n"], result["against"]["real"]) == ("exact_match", 12, False)
    assert {"score", "low", "high", "n"} == set(result["others"]["chrf"])


def test_free_text_is_compared_with_human_text_and_scored_by_a_judge(base, tmp_path, texts):
    human = [" ".join(path.read_text(encoding="utf-8").split())[:600] for path in sorted(texts.iterdir())[:6]]
    benchmark = find_benchmark(f"free={jsonl(tmp_path / 'people.jsonl', [{'text': text} for text in human])}")
    model = load(base)
    result = evaluate_benchmark(EvalModels(model, judge=load(base)), benchmark)
    assert (result["metric"], result["n"], result["people"]["n"]) == ("repeated_4grams", 6, 6)
    assert result["beside_people"]["n"] == 6
    assert "a generated sample of the same size" in str(EvaluateResult(suites={"free": result}))
    assert set(result["others"]) == {"distinct_1", "distinct_2", "distinct_3"}
    assert 0 <= result["score"] <= 1 and result["judge"]["value"] > 0
    assert result["judge"]["low"] <= result["judge"]["value"] <= result["judge"]["high"]
    assert result["examples"] == evaluate_benchmark(EvalModels(model), benchmark)["examples"]
    assert result["examples"] != evaluate_benchmark(EvalModels(model), benchmark, seed=1)["examples"]


def test_free_text_without_prompts(base, tmp_path):
    file = tmp_path / "short.toml"
    file.write_text('kind = "free text"\nmax_tokens = 4\n')
    result = evaluate_benchmark(EvalModels(load(base)), find_benchmark(str(file)))
    assert result["n"] == item_scores.DEFAULT_NUM_TEXTS
    assert "people" not in result


# ---------------------------------------------------------------- the command


def test_perplexity_compared_with_another_model(base, texts, tmp_path):
    result = nextword.evaluate(base, compare_to=base, seed_runs=[base], context_use=True)
    assert result.loss == pytest.approx(json.loads((base / "result.json").read_text())["loss"], abs=1e-6)
    assert result.stride == 64  # one window, as in training
    assert result.against is not None and result.noise is not None and result.context_use is not None
    assert (result.against["real"], result.against["difference"]["value"]) == (False, 0.0)
    assert result.noise["floor"] == 0.0
    assert len(result.context_use["true"]) == 64
    other = tmp_path / "other"
    model = {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32}
    training = {"batch_tokens": 256, "evaluations": 1}
    nextword.pretrain(texts, other, steps=3, vocab_size=300, training=training, model=model)
    result = nextword.evaluate(base, texts, compare_to=other)
    assert result.stride == 32 and result.against is not None
    assert result.against["real"] and result.against["ahead"] == "this"  # trained for thirty steps, not three
    bits_per_byte = result.against["bits_per_byte"] + result.against["difference"]["value"]
    assert bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-3)
    assert "this model is better" in str(result) and "stride 32 tokens" in str(result)
    with pytest.raises(UsageError, match="its tokenizer differs"):
        nextword.evaluate(base, compare_to=other)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_every_byte_of_a_short_text_is_predicted(base, tmp_path, length):
    """The first one after an end-of-text token, as a document in training; not the end-of-text token alone."""
    model, text = load(base), "Zebra q"[:length]
    file = tmp_path / "short.txt"
    file.write_text(text)
    ids = torch.tensor([[model.tokenizer.eos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id]])
    with torch.no_grad():
        log_p = model.gpt.unembed(model.gpt(ids[:, :-1]))[0].double().log_softmax(-1)
    nats = -float(log_p[range(ids.shape[1] - 1), ids[0, 1:]].sum())
    result = nextword.evaluate(base, file)
    assert (result.bytes, result.tokens) == (length, ids.shape[1] - 1)
    assert result.bits_per_byte == pytest.approx(nats / np.log(2) / length, rel=1e-5)


def test_what_the_interval_of_a_text_speaks_of(base, tmp_path):
    """Documents are its units: one document, however long, has neither an interval nor a significance test."""
    rng = np.random.default_rng(0)
    one, few, many = tmp_path / "one.txt", tmp_path / "few", tmp_path / "many.jsonl"
    one.write_text(" ".join(rng.choice(WORDS, 3000)))
    few.mkdir()
    for i in range(4):
        (few / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 60)))
    jsonl(many, [{"text": " ".join(rng.choice(WORDS, 30 + i))} for i in range(12)])
    for text, expected in ((one, "one document is too few"), (few, "4 documents are too few")):
        result = nextword.evaluate(base, text, compare_to=base)
        assert result.interval is not None and result.against is not None
        assert result.interval["low"] is None and expected in result.interval["basis"]
        assert (result.against["real"], result.against["ahead"]) == (None, None)
        assert (
            "no significance test" in str(result) and "95 % CI" not in str(result) and str(result).count(expected) == 2
        )
    result = nextword.evaluate(base, many, compare_to=base)
    assert result.interval is not None and result.against is not None
    assert result.interval["low"] < result.bits_per_byte < result.interval["high"]
    assert (result.interval["n"], result.against["real"]) == (12, False)
    assert "for texts like these 12 documents; jackknife" in str(result)


def test_every_page_says_what_the_interval_of_a_text_speaks_of(base, tmp_path):
    """The same interval at the end of the run and of `evaluate`; in the report, the card and the comparison page."""
    run = tmp_path / "run"
    shutil.copytree(base, run)
    result = json.loads((run / "result.json").read_text())
    evaluated = nextword.evaluate(run)
    assert result["interval"] is not None and evaluated.interval is not None
    assert result["interval"]["basis"] == evaluated.interval["basis"]
    assert result["interval"]["n"] == evaluated.interval["n"]
    if result["interval"]["low"] is not None:
        assert result["interval"]["low"] == pytest.approx(evaluated.interval["low"], rel=1e-4)
    many = jsonl(tmp_path / "many.jsonl", [{"text": " ".join(WORDS[i:] + WORDS)} for i in range(9)])
    nextword.evaluate(run, many)
    basis = "for texts like these 9 documents; jackknife over documents, Student's t"
    for write in (write_report, write_card):
        page = html.unescape(write(run).read_text(encoding="utf-8"))
        assert basis in page and result["interval"]["basis"] in page
    page = html.unescape(write_comparison([run, base], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert basis in page and result["interval"]["basis"] in page


def test_a_checkpoint_is_a_model(base, files, tmp_path):
    run, request = tmp_path / "run", f"blimp={files / 'pairs.jsonl'}"
    shutil.copytree(base / "model", run / "model")
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    weights = {name: tensor.clone() for name, tensor in load(base).gpt.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    write_manifest(folder, {"step": 1})
    suites = nextword.evaluate(folder, benchmarks=[request], compare_to=base).suites
    assert suites is not None and suites["blimp"]["against"]["difference"]["value"] == 0.0
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "weights.safetensors")
    with pytest.raises(CorruptFileError, match=r"weights\.safetensors"):
        load(folder)
    write_manifest(folder, {"step": 1})
    assert torch.equal(load(folder).gpt.token_embedding.weight, -load(base).gpt.token_embedding.weight)
    save_file({"other": torch.zeros(3)}, folder / "weights.safetensors")
    write_manifest(folder, {"step": 1})
    with pytest.raises(NextwordError, match="does not hold all weights"):
        load(folder)


def test_the_command_line(nextword: CLIRunner, base, files):
    blimp, arc = f"blimp={files / 'pairs.jsonl'}", f"arc={files / 'quiz.jsonl'}"
    done = nextword("evaluate", base, "--benchmark", blimp, "--benchmark", arc, "--limit", "12", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result["suites"]) == {"blimp", "arc"}
    for suite in result["suites"].values():
        assert {"score", "low", "high", "chance", "n", "scrambled", "groups", "above_chance", "metric"} <= set(suite)
        assert suite["n"] == 12 and {"score", "low", "high", "n"} <= set(suite["scrambled"])
    done = nextword("evaluate", base, files / "write.jsonl", "--benchmark", blimp)
    assert done.returncode == 0, done.stderr
    assert "bits/byte" in done.stdout and "blimp: acc" in done.stdout and "shuffled words" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "blymp"], "unknown benchmark 'blymp'"),
        (
            ["--benchmark", "blimp={f}/pairs.jsonl", "--benchmark", "blimp={f}/pairs.jsonl"],
            "--benchmark blimp is given twice",
        ),
        (["--benchmark", "blimp={f}/pairs.jsonl", "--limit", "0"], "--limit must be a whole number from 1"),
        (
            ["--benchmark", "blimp={f}/pairs.jsonl", "--limit", "5", "--no-limit"],
            "--limit and --no-limit exclude each other",
        ),
        (["{f}/write.jsonl", "--stride", "65"], "the stride must be between 1 and the context length of 64"),
        (["{f}/write.jsonl", "--stride", "0"], "--stride must be a whole number from 1"),
    ],
)
def test_invalid_arguments(nextword: CLIRunner, base, files, arguments, message):
    done = nextword("evaluate", base, *(argument.format(f=files) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
