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
from nextword.commands.evaluate_output import evaluation_in_words
from nextword.common.errors import CorruptFile, NextwordError, UsageError
from nextword.common.fs import seal
from nextword.data.decoding import Problems
from nextword.evaluation.significance import Panel, compared, described, judge_suite, scrambled
from nextword.inference.loglikelihood import Likely
from nextword.pipeline import item_scores as marks_module
from nextword.pipeline.item_scores import Marks, ahead, marks
from nextword.pipeline.language_model import load
from nextword.tasks.benchmark_items import read_items
from nextword.tasks.benchmark_spec import find_suite
from nextword.tasks.metrics import average, mcnemar, noise_floor, of_sums, share, writing, writing_difference

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
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-6)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_mcnemar_of_many():
    from scipy.stats import binomtest

    a, b = [1.0] * 26_000 + [0.0] * 25_000, [0.0] * 26_000 + [1.0] * 25_000
    assert mcnemar(a, b) == pytest.approx(binomtest(25_000, 51_000, 0.5).pvalue, rel=1e-6)


@given(st.integers(1, 500))
def test_a_share_of_all_or_none_has_the_exact_interval(n):
    from scipy.stats import binomtest

    for value, right in ((0.0, 0), (1.0, n)):
        interval = binomtest(right, n).proportion_ci(0.95, "exact")
        found = share([value] * n)
        assert (found.value, found.n) == (value, n)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_intervals_are_the_percentile_bootstraps():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(80).round(1)
    expected = bootstrap((values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0))
    for found in (average(values.tolist()), share(values.tolist()), of_sums(np.stack([values, values**0], 1), ratio)):
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
        both = [writing(gold, texts, [name])[name].value for texts in (a, b)]
        found = writing_difference(gold, a, b, name)
        assert found.value == pytest.approx(both[0] - both[1])
        assert found.low < found.value < found.high
        assert writing_difference(gold, a, a, name).high == 0.0


# ---------------------------------------------------------------- marks


def test_chance_is_that_of_guessing(base, files):
    model = load(base)

    def chance(request: str) -> float | None:
        suite = find_suite(request)
        return marks(model, suite, read_items(suite, Problems())).chance

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
        found = Marks({"acc": (rng.random(150) < 0.25).astype(float)}, chance=0.25)
        described_ = described(
            find_suite("arc"), Marks(dict.fromkeys(("acc", "acc_norm", "acc_bytes"), found.values["acc"]), 0.25), []
        )
        above += described_["above_chance"]
    assert above <= 14
    result = judge_suite(Panel(load(base)), find_suite(f"arc={files / 'quiz.jsonl'}"))
    assert result["above_chance"] is False
    assert "not above chance" in evaluation_in_words({"suites": {"arc": result}})


def test_ties_count_their_share(base, tmp_path):
    """lm-eval gives them to the first, which of minimal pairs is always the right one."""
    rows = [{"sentence_good": "the same words", "sentence_bad": "the same words", "UID": "x"}] * 3
    suite = find_suite(f"blimp={jsonl(tmp_path / 'same.jsonl', rows)}")
    found = marks(load(base), suite, read_items(suite, Problems()))
    assert found.values["acc"].tolist() == [0.5] * 3
    assert found.ties == 3
    assert (ahead(2, 1), ahead(1, 2), ahead(1, 1)) == (1.0, 0.0, 0.5)


def test_stereotypes_are_scored_as_their_authors_do(base, files):
    suite = find_suite(f"preferences={files / 'own.toml'}")
    found = marks(load(base), suite, read_items(suite, Problems()))
    ss, lms = found.values["stereotyped"].mean(), found.values["meaningful"].mean()
    assert found.score("icat").value == pytest.approx(lms * min(ss, 1 - ss) / 0.5)
    assert found.others(suite) == ["meaningful", "icat"]


# ---------------------------------------------------------------- verdicts


class Alphabet:
    """A reader that finds a text likelier the more of its words stand in the order of the alphabet."""

    def __init__(self, *_, **__): ...

    def ask(self, questions, progress=None):
        def nats(context, text):
            found = (context + text).split()
            return float(sum(one <= other for one, other in pairwise(found)))

        return [[Likely(nats(*pair), 1, True) for pair in pairs] for pairs in questions]


def test_what_lives_by_the_order_of_words_is_lost_without_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr(marks_module, "Scorer", Alphabet)
    random = np.random.default_rng(0)
    rows = [sorted(random.choice(WORDS, 8, replace=False).tolist()) for _ in range(60)]
    pairs = [{"sentence_good": " ".join(row), "sentence_bad": " ".join(row[::-1]), "UID": "x"} for row in rows]
    suite = find_suite(f"blimp={jsonl(tmp_path / 'p.jsonl', pairs)}")
    result = judge_suite(Panel(load(base)), suite)
    assert result["score"] == 1.0 and result["above_chance"]
    assert result["scrambled"]["score"] == 0.5  # the same words in the same order: all ties
    assert result["scrambled"]["order_matters"] and result["scrambled"]["lost"]["value"] == 0.5
    leaning = scrambled("stereotyped", Marks({"stereotyped": np.zeros(50)}), Marks({"stereotyped": np.ones(50)}))
    assert leaning["order_matters"]  # towards either side


def test_what_is_lost_has_an_interval():
    right, random = np.ones(200), (np.random.default_rng(0).random(200) < 0.5).astype(float)
    lost = scrambled("acc", Marks({"acc": right}), Marks({"acc": random}))
    assert lost["order_matters"] and lost["lost"]["value"] == pytest.approx(1 - random.mean())
    assert not scrambled("acc", Marks({"acc": random}), Marks({"acc": random}))["order_matters"]


def test_two_models_are_told_apart_only_where_they_differ():
    rng = np.random.default_rng(0)
    weak = (rng.random(400) < 0.5).astype(float)
    strong = np.maximum(weak, rng.random(400) < 0.3)
    other = np.where(rng.random(400) < 0.1, 1 - weak, weak)
    found = compared("acc", Marks({"acc": weak}), Marks({"acc": strong}), "B")
    assert found["real"] and found["ahead"] == "other" and found["p"] < 1e-6
    assert (found["only_this"], found["only_other"]) == (0, int((strong > weak).sum()))
    assert found["difference"]["value"] == pytest.approx(weak.mean() - strong.mean())
    assert compared("acc", Marks({"acc": strong}), Marks({"acc": weak}), "B")["ahead"] == "this"
    found = compared("acc", Marks({"acc": weak}), Marks({"acc": other}), "B")
    assert not found["real"] and found["ahead"] is None
    near = compared("stereotyped", Marks({"stereotyped": weak}), Marks({"stereotyped": strong}), "B")
    assert near["real"] and near["ahead"] == "this"  # nearer to a half


def test_the_result_of_a_suite(base, files):
    model = load(base)
    suite = find_suite(f"blimp={files / 'pairs.jsonl'}")
    whole = judge_suite(Panel(model), suite, limit=None)
    assert (whole["n"], whole["of"], whole["metric"], whole["chance"]) == (60, 60, "acc", 0.5)
    assert whole["low"] <= whole["score"] <= whole["high"]
    assert {name: group["n"] for name, group in whole["groups"].items()} == {f"group{i}": 20 for i in range(3)}
    assert whole["score"] == pytest.approx(np.mean([group["score"] for group in whole["groups"].values()]))
    some = judge_suite(Panel(model), suite, limit=15)
    assert (some["n"], some["of"]) == (15, 60)
    assert {group["n"] for group in some["groups"].values()} == {5}
    again = judge_suite(Panel(model), suite, limit=15)
    assert again | {"seconds": 0} == some | {"seconds": 0}
    same = judge_suite(Panel(model, against=load(base), seeds=[load(base)]), suite, limit=15)
    assert same["against"]["real"] is False and same["against"]["difference"]["value"] == 0.0
    assert same["noise"] == {"models": 2, "scores": [same["score"]] * 2, "floor": 0.0}
    words = evaluation_in_words({"suites": {"blimp": same}})
    assert "the two are not told apart" in words and "group0" in words


def test_whatever_is_scrambled_stays_a_sample(base, files, monkeypatch):
    monkeypatch.setattr("nextword.evaluation.significance.LIMIT", 10)
    result = judge_suite(Panel(load(base)), find_suite(f"arc={files / 'quiz.jsonl'}"), limit=None)
    assert (result["n"], result["scrambled"]["n"]) == (40, 10)


# ---------------------------------------------------------------- what is written


def test_answers_in_words_are_scored(base, files, monkeypatch):
    pytest.importorskip("sacrebleu")
    suite = find_suite(f"writing={files / 'own.toml'}")
    items = read_items(suite, Problems())
    gold = [item.values["summary"] for item in items]
    monkeypatch.setattr(marks_module, "write", lambda model, prompts, sampling, progress: [*gold[:6], *WORDS[:6]])
    found = marks(load(base), suite, items)
    assert found.score("exact_match").value == 0.5
    assert found.score("chrf").value == pytest.approx(writing(gold, [*gold[:6], *WORDS[:6]], ["chrf"])["chrf"].value)
    assert found.chance == 0.0
    monkeypatch.undo()
    result = judge_suite(Panel(load(base), against=load(base)), suite)
    assert (result["metric"], result["n"], result["against"]["real"]) == ("exact_match", 12, False)
    assert {"score", "low", "high", "n"} == set(result["others"]["chrf"])


def test_free_text_is_measured_beside_peoples_and_read_by_a_judge(base, tmp_path, texts):
    long = [" ".join(path.read_text(encoding="utf-8").split())[:600] for path in sorted(texts.iterdir())[:6]]
    path = jsonl(tmp_path / "people.jsonl", [{"text": text} for text in long])
    model = load(base)
    result = judge_suite(Panel(model, judge=load(base)), find_suite(f"free={path}"))
    assert (result["metric"], result["n"], result["people"]["n"]) == ("repeated_4grams", 6, 6)
    assert result["beside_people"]["n"] == 6 and "as much of the model's" in evaluation_in_words(
        {"suites": {"free": result}}
    )
    assert set(result["others"]) == {"distinct_1", "distinct_2", "distinct_3"}
    assert 0 <= result["score"] <= 1 and result["judge"]["value"] > 0
    assert result["judge"]["low"] <= result["judge"]["value"] <= result["judge"]["high"]
    assert result["examples"] == judge_suite(Panel(model), find_suite(f"free={path}"))["examples"]
    other = judge_suite(Panel(model), find_suite(f"free={path}"), seed=1)
    assert other["examples"] != result["examples"]


def test_nothing_to_go_on_from_is_a_new_document(base, tmp_path):
    file = tmp_path / "short.toml"
    file.write_text('kind = "free text"\nmax_tokens = 4\n')
    result = judge_suite(Panel(load(base)), find_suite(str(file)))
    assert result["n"] == marks_module.TEXTS
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
    said = evaluation_in_words(result)
    assert "this model is ahead" in said and "windows 32 tokens apart" in said
    with pytest.raises(UsageError, match="has another tokenizer"):
        api.evaluate(base, against=other)


def test_a_checkpoint_is_a_model_too(base, files, tmp_path):
    run, suite = tmp_path / "run", f"blimp={files / 'pairs.jsonl'}"
    shutil.copytree(base / "model", run / "model")
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    weights = {name: tensor.clone() for name, tensor in load(base).gpt.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    seal(folder, {"step": 1})
    same = api.evaluate(folder, suites=[suite], against=base)["suites"]["blimp"]["against"]
    assert same["difference"]["value"] == 0.0 and not same["real"]
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "weights.safetensors")
    with pytest.raises(CorruptFile, match=r"weights\.safetensors: the content does not match"):
        load(folder)
    seal(folder, {"step": 1})
    assert torch.equal(load(folder).gpt.token_embedding.weight, -load(base).gpt.token_embedding.weight)
    save_file({"other": torch.zeros(3)}, folder / "weights.safetensors")
    seal(folder, {"step": 1})
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
