"""The lm-eval adapter: scores equal those of its own `hf` model, and those of our benchmarks."""

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nextword
from nextword.common.errors import MissingDependencyError, UsageError
from nextword.data.issues import IssueLog
from nextword.evaluation.lm_eval_adapter import LMEvalAdapter, lm_eval_model_class, run_lm_eval_task
from nextword.pipeline.item_scores import score_items
from nextword.pipeline.language_model import load
from nextword.tasks.benchmark_items import load_rows
from nextword.tasks.benchmark_spec import find_benchmark
from test_benchmark_spec import HELLASWAG
from test_loglikelihood import directory

installed = pytest.mark.needs("lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its packages' own


def package(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def model_path(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory("modern", base, tmp_path_factory.mktemp("judged") / "model")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name] for name in sorted(topics)[3:6]).split())
    return [one.strip() + "." for one in text.split(". ") if 30 < len(one) < 160][:24]


@pytest.fixture(scope="module")
def rows(sentences: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows as the Hub has them, which is how lm-eval reads them."""
    labels = ["A", "B", "C"]
    return {
        "blimp": [{"sentence_good": one, "sentence_bad": " ".join(one.split()[::-1]), "UID": "u"} for one in sentences],
        "arc": [
            {
                "question": one,
                "choices": {"text": [one[k : k + 9 + 5 * k] for k in range(3)], "label": labels},
                "answerKey": labels[i % 3],
            }
            for i, one in enumerate(sentences)
        ],
        "hellaswag": [
            HELLASWAG
            | {
                "ctx_a": one,
                "ctx_b": "so it",
                "endings": ["is [step] so.", "will", one[:30], one[10:]],
                "label": str(i % 4),
            }
            for i, one in enumerate(sentences)
        ],
        "lambada": [{"text": one} for one in sentences],
        "winogender": [
            {
                "sentence": one,
                "pronoun": "her",
                "occupation": "nurse",
                "participant": "patient",
                "label": i % 2,
                "gender": "female",
                "sentid": f"nurse.patient.{i % 2}.female.txt",
            }
            for i, one in enumerate(sentences)
        ],
        "crows-pairs": [
            {"sent_more": one, "sent_less": " ".join(one.split()[::-1]), "bias_type": "age"} for one in sentences
        ],
    }


# Our suite, lm-eval's task, our scores and its own.
BOTH = {
    "blimp": ("blimp/adjunct_island", {"acc": "acc"}),
    "arc": ("arc/arc_easy", {"acc": "acc", "acc_norm": "acc_norm"}),
    "hellaswag": ("hellaswag/hellaswag", {"acc": "acc", "acc_norm": "acc_norm"}),
    "lambada": ("lambada/lambada_openai", {"acc": "acc", "perplexity": "perplexity"}),
    "winogender": ("winogender/winogender", {"acc": "acc"}),
    "crows-pairs": ("crows_pairs/crows_pairs_english", {"stereotyped": "pct_stereotype"}),
}


def manager(folder: Path, name: str, rows: list[dict[str, Any]]) -> Any:
    """lm-eval's own task `name`, as it is in its package, on rows of ours instead of the Hub's."""
    found = package("lm_eval.tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits = json.dumps(dict.fromkeys(("train", "validation", "test"), str(data)))
    own = Path(found.__file__).parent / f"{BOTH[name][0]}.yaml"
    (folder / "task.yaml").write_text(
        f"include: {own}\ntask: ours\ndataset_path: json\ndataset_name: null\ndataset_kwargs: {{data_files: {splits}}}\n"
    )
    return found.TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a network, and with the caches of `datasets` in the test's own folder."""
    datasets = package("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with contextlib.suppress(AttributeError):
        datasets.disable_progress_bars()
    yield


@installed
@pytest.mark.parametrize("name", BOTH)
def test_task_scores_equal_those_of_lm_eval_and_of_our_benchmark(
    model_path: Path, rows: dict[str, list[dict[str, Any]]], tmp_path: Path, offline: None, name: str
) -> None:
    evaluate = package("lm_eval.evaluator").simple_evaluate
    tasks = manager(tmp_path, name, rows[name])
    model = load(model_path)
    theirs = evaluate(
        "hf", {"pretrained": str(model_path)}, tasks=["ours"], task_manager=tasks, bootstrap_iters=0, device="cpu"
    )
    ours = evaluate(lm_eval_model_class()(model), tasks=["ours"], task_manager=tasks, bootstrap_iters=0)
    for one, other in zip(ours["samples"]["ours"], theirs["samples"]["ours"], strict=True):
        assert one["doc"] == other["doc"]
        for (mine,), (stock,) in zip(one["resps"], other["resps"], strict=True):
            assert float(mine[0]) == pytest.approx(float(stock[0]), abs=1e-4, rel=1e-5)
            assert str(mine[1]) == str(stock[1])
    suite = find_benchmark(f"{name}={tmp_path / 'rows.jsonl'}")
    found = score_items(model, suite, load_rows(suite, IssueLog(strict=True)))
    result = run_lm_eval_task(model, "ours", None, task_manager=tasks)
    for score, metric in BOTH[name][1].items():
        expected = theirs["results"]["ours"][f"{metric},none"]
        assert ours["results"]["ours"][f"{metric},none"] == pytest.approx(expected, rel=1e-4)
        assert found.aggregate(score).value == pytest.approx(expected, rel=1e-4)
        told = result if result["metric"] == metric else result["others"][metric]
        assert told["score"] == pytest.approx(expected, rel=1e-4)
    assert result["n"] == len(rows[name])


@installed
def test_requests_are_answered_as_lm_evals_model_answers_them(model_path: Path, sentences: list[str]) -> None:
    """Any continuation, whole texts longer than the context, and what is written."""

    def asked(kind: str, *arguments: Any) -> Any:
        return package("lm_eval.api.instance").Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    ours = lm_eval_model_class()(load(model_path))
    # Its cache takes one text cut at several places for one request.
    settings = {"pretrained": str(model_path), "device": "cpu", "batch_size": 4, "logits_cache": False}
    theirs = package("lm_eval.models.huggingface").HFLM(**settings)
    pairs = [(one[:k], one[k:]) for one in sentences[:6] for k in (0, 5, 20)]
    pairs += [(" ".join(sentences), " and so on"), ("ends in a space ", "here")]
    for mine, stock in zip(
        ours.loglikelihood([asked("loglikelihood", *pair) for pair in pairs]),
        theirs.loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True),
        strict=True,
    ):
        assert mine[0] == pytest.approx(stock[0], abs=1e-4, rel=1e-5)
        assert mine[1] == stock[1]
    texts = [*sentences[:4], " ".join(sentences), "x"]
    for mine, stock in zip(
        ours.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts]),
        theirs.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts], disable_tqdm=True),
        strict=True,
    ):
        assert mine == pytest.approx(stock, abs=1e-3, rel=1e-5)
    settings = {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [asked("generate_until", one, settings) for one in sentences[:5]]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


@installed
def test_an_unknown_task_is_said(model_path: Path) -> None:
    with pytest.raises(UsageError, match="lm-eval has no task 'blymp'"):
        nextword.evaluate(model_path, benchmarks=["lm-eval:blymp"])


# ---------------------------------------------------------------- without the package


def test_the_missing_package_is_said(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval_model_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nextword\[lm-eval\]'"):
        nextword.evaluate(model_path, benchmarks=["lm-eval:arc_easy"])
    with pytest.raises(MissingDependencyError):
        nextword.LMEval  # noqa: B018


def test_answers_are_the_models_own(model_path: Path) -> None:
    """What lm-eval asks of a model, without lm-eval: greedy unless it says otherwise, up to a stop string."""
    model = load(model_path)
    answers = LMEvalAdapter(model)
    requests = [
        SimpleNamespace(args=("The value", {"until": ["e"], "max_gen_toks": 9})),
        SimpleNamespace(args=("An object", {"max_gen_toks": 5})),
    ]
    first, second = answers.generate_until(requests)
    assert second == model.generate("An object", max_tokens=5, temperature=0.0)[0].text
    assert first == model.generate("The value", max_tokens=9, temperature=0.0, stop=("e",))[0].text
    sampled = {"do_sample": True, "temperature": 0.8, "max_gen_toks": 9}
    [text] = answers.generate_until([SimpleNamespace(args=("The value", sampled))])
    assert isinstance(text, str) and text != first
    [whole] = answers.loglikelihood_rolling([SimpleNamespace(args=("An object",))])
    [(alone, _)] = answers.loglikelihood([SimpleNamespace(args=("", "An object"))])
    assert whole == pytest.approx(alone, abs=1e-4)
