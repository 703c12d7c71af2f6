"""Verdicts: chance, intervals, what is scrambled, other seeds, another model; each against scipy or by hand."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import CLIRunner
from nextword.commands import api
from nextword.commands.evaluate import EvaluateResult
from nextword.common.errors import CorruptFileError, NextwordError, UsageError
from nextword.common.fs import write_manifest
from nextword.data.issues import IssueLog
from nextword.evaluation.significance import (
    EvalModels,
    compare_models,
    evaluate_benchmark,
    shuffled_control,
    summarize_item_scores,
)
from nextword.inference.loglikelihood import ContinuationScore
from nextword.pipeline import item_scores as marks_module
from nextword.pipeline.item_scores import ItemScores, score_items, win_score
from nextword.pipeline.language_model import load
from nextword.tasks.benchmark_items import load_rows
from nextword.tasks.benchmark_spec import find_benchmark
from nextword.tasks.metrics import (
    bootstrap_mean,
    bootstrap_ratio,
    generation_metric_difference,
    generation_metrics,
    mcnemar_p_value,
    noise_floor,
    proportion,
)

WORDS = "the a cat dog house tree sees likes finds small old green".split()  # noqa: SIM905


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about nothing, so that no model can know the answers."""
    folder, random = tmp_path_factory.mktemp("nothing"), np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(random.choice(WORDS, 6))

    jsonl(folder / "pairs.jsonl", [
        {"sentence_good": sentence(), "sentence_bad": sentence(), "UID": f"group{i % 3}"} for i in range(60)
    ])  # fmt: skip
    jsonl(folder / "quiz.jsonl", [
        {"question": sentence(), "choices": [sentence() for _ in range(2 + i % 3)], "answer": i % 2} for i in range(40)
    ])  # fmt: skip
    jsonl(folder / "last.jsonl", [{"text": sentence()} for _ in range(20)])
    jsonl(folder / "write.jsonl", [{"text": sentence(), "summary": sentence()} for _ in range(12)])
    (folder / "own.toml").write_text(
        '[writing]\nkind = "writing"\nfiles = ["write.jsonl"]\nprompt = "{text}: "\nreference = "summary"\nmax_tokens = 8\n'
        'metrics = ["exact_match", "chrf"]\n[preferences]\nkind = "stereotypes"\nfiles = ["s.jsonl"]\nsentences = "s"\n'
    )
    rows = [{"s": {"sentence": [sentence() for _ in range(3)], "gold_label": [2, 0, 1]}} for _ in range(15)]
    jsonl(folder / "s.jsonl", rows)
    return folder


# ---------------------------------------------------------------- statistics


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, both):
    from scipy.stats import binomtest

    a = [1.0] * only_a + [0.0] * only_b + [1.0] * both + [0.0]
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * both + [0.0]
    either = only_a + only_b
    expected = binomtest(only_a, either, 0.5).pvalue if either else 1.0
    assert mcnemar_p_value(a, b) == pytest.approx(expected, rel=1e-6)
    assert mcnemar_p_value(b, a) == mcnemar_p_value(a, b)


def test_mcnemar_of_many():
    from scipy.stats import binomtest

    a, b = [1.0] * 26_000 + [0.0] * 25_000, [0.0] * 26_000 + [1.0] * 25_000
    assert mcnemar_p_value(a, b) == pytest.approx(binomtest(25_000, 51_000, 0.5).pvalue, rel=1e-6)


@given(st.integers(1, 500))
def test_a_share_of_all_or_none_has_the_exact_interval(n):
    from scipy.stats import binomtest

    for value, right in ((0.0, 0), (1.0, n)):
        interval = binomtest(right, n).proportion_ci(0.95, "exact")
        found = proportion([value] * n)
        assert (found.value, found.n) == (value, n)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_intervals_are_the_percentile_bootstraps():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(80).round(1)
    expected = bootstrap((values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0))
    for found in (
        bootstrap_mean(values.tolist()),
        proportion(values.tolist()),
        bootstrap_ratio(np.stack([values, values**0], 1), ratio),
    ):
        assert found.value == pytest.approx(values.mean())
        interval = expected.confidence_interval
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.012)


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def test_the_noise_floor_covers_the_difference_of_two_runs():
    from scipy.stats import t

    values = [0.61, 0.64, 0.60]
    assert noise_floor(values) == pytest.approx(t.ppf(0.975, 2) * np.std(values, ddof=1) * 2**0.5)
    draws = np.random.default_rng(0).normal(size=(2000, 7))
    below = [abs(a - b) < noise_floor(list(rest)) for a, b, *rest in draws]
    assert 0.93 < np.mean(below) < 0.97
    with pytest.raises(UsageError, match="one run has no noise floor"):
        noise_floor([0.5])


def test_the_difference_of_texts_is_that_of_their_scores():
    pytest.importorskip("sacrebleu")
    gold = ["the cat sat", "a dog ran off", "birds sing", "it rains"] * 5
    a = ["the cat sat", "a dog ran", "birds", "it rains"] * 5
    b = ["cat", "a dog ran off", "sing", "rain it"] * 5
    for name in ("chrf", "rougeL"):
        both = [generation_metrics(gold, texts, [name])[name].value for texts in (a, b)]
        found = generation_metric_difference(gold, a, b, name)
        assert found.value == pytest.approx(both[0] - both[1])
        assert found.low < found.value < found.high
        assert generation_metric_difference(gold, a, a, name).high == 0.0


# ---------------------------------------------------------------- marks


def test_chance_is_that_of_guessing(base, files):
    model = load(base)

    def chance(request: str) -> float | None:
        suite = find_benchmark(request)
        return score_items(model, suite, load_rows(suite, IssueLog())).chance

    assert chance(f"blimp={files / 'pairs.jsonl'}") == 0.5
    assert chance(f"arc={files / 'quiz.jsonl'}") == pytest.approx(np.mean([1 / (2 + i % 3) for i in range(40)]))
    assert chance(f"preferences={files / 'own.toml'}") == 0.5
    cloze = chance(f"lambada={files / 'last.jsonl'}")
    assert cloze is not None and 0 < cloze <= 1 / model.gpt.config.vocab_size
    assert chance(f"writing={files / 'own.toml'}") == 0.0


def test_what_cannot_be_known_is_not_above_chance(base, files):
    """Guessing on fifty sets of questions about nothing: about one in forty comes out above chance by its interval."""
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(200):
        found = ItemScores({"acc": (rng.random(150) < 0.25).astype(float)}, chance=0.25)
        described_ = summarize_item_scores(
            find_benchmark("arc"),
            ItemScores(dict.fromkeys(("acc", "acc_norm", "acc_bytes"), found.item_values["acc"]), 0.25),
            [],
        )
        above += described_["above_chance"]
    assert above <= 14
    result = evaluate_benchmark(EvalModels(load(base)), find_benchmark(f"arc={files / 'quiz.jsonl'}"))
    assert result["above_chance"] is False
    assert "not above chance" in str(EvaluateResult(suites={"arc": result}))


def test_ties_count_their_share(base, tmp_path):
    """lm-eval gives them to the first, which of minimal pairs is always the right one."""
    rows = [{"sentence_good": "the same words", "sentence_bad": "the same words", "UID": "x"}] * 3
    suite = find_benchmark(f"blimp={jsonl(tmp_path / 'same.jsonl', rows)}")
    found = score_items(load(base), suite, load_rows(suite, IssueLog()))
    assert found.item_values["acc"].tolist() == [0.5] * 3
    assert found.ties == 3
    assert (win_score(2, 1), win_score(1, 2), win_score(1, 1)) == (1.0, 0.0, 0.5)


def test_stereotypes_are_scored_as_their_authors_do(base, files):
    suite = find_benchmark(f"preferences={files / 'own.toml'}")
    found = score_items(load(base), suite, load_rows(suite, IssueLog()))
    ss, lms = found.item_values["stereotyped"].mean(), found.item_values["meaningful"].mean()
    assert found.aggregate("icat").value == pytest.approx(lms * min(ss, 1 - ss) / 0.5)
    assert found.secondary_metrics(suite) == ["meaningful", "icat"]


# ---------------------------------------------------------------- verdicts


class Alphabet:
    """A reader that finds a text likelier the more of its words stand in the order of the alphabet."""

    def __init__(self, *_, **__): ...

    def ask(self, questions, progress=None):
        def nats(context, text):
            found = (context + text).split()
            return float(sum(one <= other for one, other in pairwise(found)))

        return [[ContinuationScore(nats(*pair), 1, True) for pair in pairs] for pairs in questions]


def test_what_lives_by_the_order_of_words_is_lost_without_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr(marks_module, "Scorer", Alphabet)
    random = np.random.default_rng(0)
    rows = [sorted(random.choice(WORDS, 8, replace=False).tolist()) for _ in range(60)]
    pairs = [{"sentence_good": " ".join(row), "sentence_bad": " ".join(row[::-1]), "UID": "x"} for row in rows]
    suite = find_benchmark(f"blimp={jsonl(tmp_path / 'p.jsonl', pairs)}")
    result = evaluate_benchmark(EvalModels(load(base)), suite)
    assert result["score"] == 1.0 and result["above_chance"]
    assert result["scrambled"]["score"] == 0.5  # the same words in the same order: all ties
    assert result["scrambled"]["order_matters"] and result["scrambled"]["lost"]["value"] == 0.5
    leaning = shuffled_control(
        "stereotyped", ItemScores({"stereotyped": np.zeros(50)}), ItemScores({"stereotyped": np.ones(50)})
    )
    assert leaning["order_matters"]  # towards either side


def test_what_is_lost_has_an_interval():
    right, random = np.ones(200), (np.random.default_rng(0).random(200) < 0.5).astype(float)
    lost = shuffled_control("acc", ItemScores({"acc": right}), ItemScores({"acc": random}))
    assert lost["order_matters"] and lost["lost"]["value"] == pytest.approx(1 - random.mean())
    assert not shuffled_control("acc", ItemScores({"acc": random}), ItemScores({"acc": random}))["order_matters"]


def test_two_models_are_told_apart_only_where_they_differ():
    rng = np.random.default_rng(0)
    weak = (rng.random(400) < 0.5).astype(float)
    strong = np.maximum(weak, rng.random(400) < 0.3)
    other = np.where(rng.random(400) < 0.1, 1 - weak, weak)
    found = compare_models("acc", ItemScores({"acc": weak}), ItemScores({"acc": strong}), "B")
    assert found["real"] and found["ahead"] == "other" and found["p"] < 1e-6
    assert (found["only_this"], found["only_other"]) == (0, int((strong > weak).sum()))
    assert found["difference"]["value"] == pytest.approx(weak.mean() - strong.mean())
    assert compare_models("acc", ItemScores({"acc": strong}), ItemScores({"acc": weak}), "B")["ahead"] == "this"
    found = compare_models("acc", ItemScores({"acc": weak}), ItemScores({"acc": other}), "B")
    assert not found["real"] and found["ahead"] is None
    near = compare_models("stereotyped", ItemScores({"stereotyped": weak}), ItemScores({"stereotyped": strong}), "B")
    assert near["real"] and near["ahead"] == "this"  # nearer to a half


def test_the_result_of_a_suite(base, files):
    model = load(base)
    suite = find_benchmark(f"blimp={files / 'pairs.jsonl'}")
    whole = evaluate_benchmark(EvalModels(model), suite, limit=None)
    assert (whole["n"], whole["of"], whole["metric"], whole["chance"]) == (60, 60, "acc", 0.5)
    assert whole["low"] <= whole["score"] <= whole["high"]
    assert {name: group["n"] for name, group in whole["groups"].items()} == {f"group{i}": 20 for i in range(3)}
    assert whole["score"] == pytest.approx(np.mean([group["score"] for group in whole["groups"].values()]))
    some = evaluate_benchmark(EvalModels(model), suite, limit=15)
    assert (some["n"], some["of"]) == (15, 60)
    assert {group["n"] for group in some["groups"].values()} == {5}
    again = evaluate_benchmark(EvalModels(model), suite, limit=15)
    assert again | {"seconds": 0} == some | {"seconds": 0}
    same = evaluate_benchmark(EvalModels(model, against=load(base), seed_runs=[load(base)]), suite, limit=15)
    assert same["against"]["real"] is False and same["against"]["difference"]["value"] == 0.0
    assert same["noise"] == {"models": 2, "scores": [same["score"]] * 2, "floor": 0.0}
    words = str(EvaluateResult(suites={"blimp": same}))
    assert ": not significant" in words and "group0" in words


def test_whatever_is_scrambled_stays_a_sample(base, files, monkeypatch):
    monkeypatch.setattr("nextword.evaluation.significance.LIMIT", 10)
    result = evaluate_benchmark(EvalModels(load(base)), find_benchmark(f"arc={files / 'quiz.jsonl'}"), limit=None)
    assert (result["n"], result["scrambled"]["n"]) == (40, 10)


# ---------------------------------------------------------------- what is written


def test_answers_in_words_are_scored(base, files, monkeypatch):
    pytest.importorskip("sacrebleu")
    suite = find_benchmark(f"writing={files / 'own.toml'}")
    items = load_rows(suite, IssueLog())
    gold = [item.values["summary"] for item in items]
    monkeypatch.setattr(marks_module, "write", lambda model, prompts, sampling, progress: [*gold[:6], *WORDS[:6]])
    found = score_items(load(base), suite, items)
    assert found.aggregate("exact_match").value == 0.5
    assert found.aggregate("chrf").value == pytest.approx(
        generation_metrics(gold, [*gold[:6], *WORDS[:6]], ["chrf"])["chrf"].value
    )
    assert found.chance == 0.0
    monkeypatch.undo()
    result = evaluate_benchmark(EvalModels(load(base), against=load(base)), suite)
    assert (result["metric"], result["n"], result["against"]["real"]) == ("exact_match", 12, False)
    assert {"score", "low", "high", "n"} == set(result["others"]["chrf"])


def test_free_text_is_measured_beside_peoples_and_read_by_a_judge(base, tmp_path, texts):
    long = [" ".join(path.read_text(encoding="utf-8").split())[:600] for path in sorted(texts.iterdir())[:6]]
    path = jsonl(tmp_path / "people.jsonl", [{"text": text} for text in long])
    model = load(base)
    result = evaluate_benchmark(EvalModels(model, judge=load(base)), find_benchmark(f"free={path}"))
    assert (result["metric"], result["n"], result["people"]["n"]) == ("repeated_4grams", 6, 6)
    assert result["beside_people"]["n"] == 6 and "the same amount of generated text" in str(
        EvaluateResult(suites={"free": result})
    )
    assert set(result["others"]) == {"distinct_1", "distinct_2", "distinct_3"}
    assert 0 <= result["score"] <= 1 and result["judge"]["value"] > 0
    assert result["judge"]["low"] <= result["judge"]["value"] <= result["judge"]["high"]
    assert result["examples"] == evaluate_benchmark(EvalModels(model), find_benchmark(f"free={path}"))["examples"]
    other = evaluate_benchmark(EvalModels(model), find_benchmark(f"free={path}"), seed=1)
    assert other["examples"] != result["examples"]


def test_nothing_to_go_on_from_is_a_new_document(base, tmp_path):
    file = tmp_path / "short.toml"
    file.write_text('kind = "free text"\nmax_tokens = 4\n')
    result = evaluate_benchmark(EvalModels(load(base)), find_benchmark(str(file)))
    assert result["n"] == marks_module.DEFAULT_NUM_TEXTS
    assert "people" not in result


# ---------------------------------------------------------------- the verb


def test_texts_with_an_interval_beside_another_model(base, texts, tmp_path):
    result = api.evaluate(base, against=base, noise=[base], context_use=True)
    assert result["loss"] == pytest.approx(json.loads((base / "result.json").read_text())["loss"], abs=1e-6)
    assert result["stride"] == 64  # a window, as in training
    assert (result["against"]["real"], result["against"]["difference"]["value"]) == (False, 0.0)
    assert result["noise"]["floor"] == 0.0
    assert len(result["context_use"]["true"]) == 64
    other = tmp_path / "other"
    api.pretrain(
        texts, other, steps=3, vocab_size=300, training={"batch_tokens": 256, "evaluations": 1},
        model={"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32},
    )  # fmt: skip
    result = api.evaluate(base, texts, against=other)
    assert result["stride"] == 32
    assert result["against"]["real"] and result["against"]["ahead"] == "this"  # thirty steps against three
    value = result["against"]["bits_per_byte"] + result["against"]["difference"]["value"]
    assert value == pytest.approx(result["bits_per_byte"], rel=1e-3)
    said = str(result)
    assert "this model is better" in said and "stride 32 tokens" in said
    with pytest.raises(UsageError, match="has another tokenizer"):
        api.evaluate(base, against=other)


def test_a_checkpoint_is_a_model_too(base, files, tmp_path):
    run, suite = tmp_path / "run", f"blimp={files / 'pairs.jsonl'}"
    shutil.copytree(base / "model", run / "model")
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    weights = {name: tensor.clone() for name, tensor in load(base).gpt.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    write_manifest(folder, {"step": 1})
    same = api.evaluate(folder, suites=[suite], against=base)["suites"]["blimp"]["against"]
    assert same["difference"]["value"] == 0.0 and not same["real"]
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "weights.safetensors")
    with pytest.raises(CorruptFileError, match=r"weights\.safetensors: the content does not match"):
        load(folder)
    write_manifest(folder, {"step": 1})
    assert torch.equal(load(folder).gpt.token_embedding.weight, -load(base).gpt.token_embedding.weight)
    save_file({"other": torch.zeros(3)}, folder / "weights.safetensors")
    write_manifest(folder, {"step": 1})
    with pytest.raises(NextwordError, match="not a whole model's weights"):
        load(folder)


def test_the_command_line(nextword: CLIRunner, base, files):
    done = nextword(
        "evaluate", base, "--suite", f"blimp={files / 'pairs.jsonl'}", "--suite", f"arc={files / 'quiz.jsonl'}",
        "--limit", "12", "--json", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == {"suites"} and set(result["suites"]) == {"blimp", "arc"}
    for suite in result["suites"].values():
        keys = {"score", "low", "high", "chance", "n", "scrambled", "groups", "above_chance", "metric"}
        assert keys <= set(suite)
        assert suite["n"] == 12 and {"score", "low", "high", "n"} <= set(suite["scrambled"])
    done = nextword("evaluate", base, files / "write.jsonl", "--suite", f"blimp={files / 'pairs.jsonl'}")
    assert done.returncode == 0, done.stderr
    assert "bits/byte" in done.stdout and "blimp: acc" in done.stdout and "with its words scrambled" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "blymp"], "no suite called 'blymp'"),
        (["--suite", "blimp={f}/pairs.jsonl", "--suite", "blimp={f}/pairs.jsonl"], "--suite blimp is said twice"),
        (["--suite", "blimp={f}/pairs.jsonl", "--limit", "0"], "--limit must be at least 1"),
        (["--suite", "blimp={f}/pairs.jsonl", "--limit", "5", "--whole"], "does not go together with --whole"),
        (["{f}/write.jsonl", "--stride", "65"], "the stride must be between 1 and the context length of 64"),
        (["{f}/write.jsonl", "--stride", "0"], "the stride must be between 1"),
    ],
)
def test_wrong_use_is_said(nextword: CLIRunner, base, files, arguments, message):
    done = nextword("evaluate", base, *(one.format(f=files) for one in arguments))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
