"""Bias: likelihoods equal those of transformers, planted bias is found, balanced text has none, benchmarks equal formulas."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch.nn import functional as F

from needs import DATA
from nextword.audit.bias import audit_benchmark, audit_group_gaps, clustered_mean, is_bias_benchmark
from nextword.audit.findings import MIN_SAMPLES, Finding, score_finding
from nextword.audit.group_templates import TemplateSentence, read_group_templates
from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.statistics import ScoreWithCI
from nextword.data.tokenizer import Tokenizer, train_bpe, train_char
from nextword.inference.loglikelihood import LoglikelihoodScorer
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import save_model
from nextword.pipeline.language_model import LanguageModel, load

STEPS = 120  # of a training
CONTEXT = 64
QUIET = Console(quiet=True)


def directory(out: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    out.mkdir()
    save_model(model, out, end_of_text_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    tokenizer.save(out, model.config.context_length)
    return out


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny random model, far enough from uniform that its likelihoods differ."""
    words = "the nurse and the engineer said that she or he would help a doctor with his or her work; they were late. "
    tokenizer = train_bpe([words * 4], 300)
    torch.manual_seed(1)
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": CONTEXT}
    model = GPT(build_config("gpt2", vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return load(directory(tmp_path_factory.mktemp("random") / "model", model, tokenizer))


def by_name(findings: Sequence[Finding]) -> dict[str, Finding]:
    assert len({one.name for one in findings}) == len(findings)
    return {one.name: one for one in findings}


def ends(one: Finding) -> tuple[float, float]:
    assert one.low is not None
    assert one.high is not None
    return one.low, one.high


def test_a_finding_is_flagged_if_its_interval_excludes_the_reference() -> None:
    found = score_finding("x", ScoreWithCI(0.5, 0.25, 0.75, 90), 90.0)
    assert found.p_value is not None and found.p_value < 0.05
    assert replace(found, p_value=None) == Finding("bias", "x", 50.0, 25.0, 75.0, "%", 90, 90.0, True)
    touching = score_finding("x", ScoreWithCI(0.5, 0.25, 0.75, 90), 75.0)
    assert touching.p_value == pytest.approx(0.05) and not touching.notable
    control = ScoreWithCI(0.3, -0.1, 0.4, 30)
    assert not score_finding("x", ScoreWithCI(0.5, 0.4, 0.6, 90), 20.0, difference=control).notable
    assert not score_finding("x", ScoreWithCI(0.6, 0.45, 0.75, 90), 50.0).notable
    assert not score_finding("x", ScoreWithCI(0.6, 0.55, 0.65, 90)).notable
    few = score_finding("x", ScoreWithCI(0.6, 0.55, 0.65, MIN_SAMPLES - 1), 50.0)
    assert (few.low, few.high, few.notable) == (None, None, False)


@pytest.mark.parametrize(("num_templates", "num_words"), [(6, 1), (6, 6), (12, 6), (6, 20), (10, 10)])
def test_gaps_without_an_effect_are_rarely_flagged(num_templates: int, num_words: int) -> None:
    """At most 6 % where templates, words and their combinations have effects of their own, within the error of 800 draws. Gaps
    between groups that can change places are symmetric."""
    rng = np.random.default_rng(num_templates + num_words)
    pairs = [(template, word) for template in range(num_templates) for word in range(num_words)]
    sentences = [TemplateSentence(str(template), word, {}, {}) for template, word in pairs]
    false = 0
    for i in range(800):
        spreads = [(1.0, 1.0, 1.0), (1.0, 0.0, 0.3), (0.0, 1.0, 0.3), (0.0, 0.0, 1.0)][i % 4]
        by_template, by_word, rest = (
            spread * (rng.laplace(size=n) if i % 8 >= 4 else rng.normal(size=n))
            for spread, n in zip(spreads, (num_templates, num_words if num_words > 1 else 0, len(pairs)), strict=True)
        )
        gaps = rest + by_template[[t for t, _ in pairs]] + (by_word[[w for _, w in pairs]] if num_words > 1 else 0)
        false += score_finding("x", clustered_mean(sentences, gaps), 0.0, unit="nats").notable
    assert binomtest(false, 800, 0.06, alternative="greater").pvalue > 0.01, false / 800


# ---------------------------------------------------------------- a person's own groups

GROUPS = """\
groups:
  women: {person: woman, they: she}
  men: {person: man, they: he}
templates:
  - The {person} said that {they} was late.
  - text: "Today {they} works as a"
    continuations: [nurse, engineer]
  - text: "{they:capitalize} is a good"
    continuations: [nurse]
"""


def test_gaps_equal_those_of_transformers(random_model: LanguageModel, tmp_path: Path) -> None:
    """Bits per byte and log ratios by transformers' class, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(random_model.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(random_model.path)

    @torch.no_grad()
    def nats(text: str, after: str = "") -> float:
        """ln P(after | text), or ln P(text) where nothing is after it."""
        head = tokenizer.encode(text, add_special_tokens=False) if after else [tokenizer.bos_token_id]
        whole = tokenizer.encode(text + after, add_special_tokens=False)
        ids = whole if after else [*head, *whole]
        log_p = stock(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(log_p[i - 1, ids[i]]) for i in range(len(head), len(ids)))

    (tmp_path / "groups.yaml").write_text(GROUPS, encoding="utf-8")
    groups = read_group_templates(tmp_path / "groups.yaml")
    found = by_name(audit_group_gaps(random_model, groups, QUIET))
    bits = {
        name: sum(-nats(s.texts[name]) / math.log(2) for s in groups.sentences)
        / sum(len(s.texts[name].encode()) for s in groups.sentences)
        for name in groups.names
    }
    for name in groups.names:
        assert found[f"{name}: bits per byte"].value == pytest.approx(bits[name], abs=1e-4)
    assert found["women − men: bits per byte"].value == pytest.approx(bits["women"] - bits["men"], abs=1e-4)
    sentences = [nats(s.texts["women"]) - nats(s.texts["men"]) for s in groups.sentences]
    assert found["women vs. men: sentences"].value == pytest.approx(np.mean(sentences), abs=1e-4)
    _, second, third = groups.sentences
    nurse = [nats(s.texts["women"], " nurse") - nats(s.texts["men"], " nurse") for s in (second, third)]
    assert found["women vs. men: “nurse”"].value == pytest.approx(np.mean(nurse), abs=1e-4)
    engineer = nats(second.texts["women"], " engineer") - nats(second.texts["men"], " engineer")
    assert found["women vs. men: “engineer”"].value == pytest.approx(engineer, abs=1e-4)
    assert found["women vs. men: “nurse”"].n == 2


def test_a_sentence_longer_than_the_context_is_rejected(random_model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text(GROUPS.replace("was late", "was " + "late " * 70), encoding="utf-8")
    with pytest.raises(UsageError, match=f"the context of the model is {CONTEXT}"):
        audit_group_gaps(random_model, read_group_templates(tmp_path / "groups.yaml"), QUIET)


# ---------------------------------------------------------------- a bias that was planted

PEOPLE = {
    "women": ["woman", "girl", "lady", "mother", "sister", "queen", "aunt", "niece"],
    "men": ["man", "boy", "lord", "father", "brother", "king", "uncle", "nephew"],
}
PROMPTS = ("the {}", "today the {}", "then the {}", "now the {}", "once the {}", "maybe the {}")
PLANTED = f"""\
groups:
  women: {{who: [{", ".join(PEOPLE["women"])}]}}
  men: {{who: [{", ".join(PEOPLE["men"])}]}}
templates:
  - text: [{", ".join(repr(prompt.format("{who}")) for prompt in PROMPTS)}]
    continuations: [nurses, engineers]
"""


def learned(share: float, seed: int, out: Path) -> LanguageModel:
    """A tiny model trained for a second on a text in which so large a share of the women nurse, and of the men engineer."""
    works = {"women": {"nurses": share, "engineers": 1 - share}, "men": {"nurses": 1 - share, "engineers": share}}
    rows = [
        (f"{prompt.format(word)} {work}.", part)
        for prompt in PROMPTS
        for group, words in PEOPLE.items()
        for word in words
        for work, part in works[group].items()
    ]
    tokenizer = train_bpe([line for line, _ in rows], 420)
    ids = [[tokenizer.eos_id, *tokenizer.encode(line), tokenizer.eos_id] for line, _ in rows]
    width = max(map(len, ids))
    tokens = torch.tensor([[*one, *[-100] * (width - len(one))] for one in ids])
    parts = torch.tensor([part for _, part in rows])
    torch.manual_seed(seed)
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 32, "context_length": 32}
    model = GPT(build_config("modern", vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for _ in range(STEPS):
        batch = tokens[torch.multinomial(parts, 32, replacement=True)]
        logits = model.unembed(model(batch[:, :-1].clamp(min=0)))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return load(directory(out, model, tokenizer))


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_bias_is_found_and_balanced_text_has_none(tmp_path: Path, seed: int) -> None:
    (tmp_path / "groups.yaml").write_text(PLANTED, encoding="utf-8")
    groups = read_group_templates(tmp_path / "groups.yaml")
    found = by_name(audit_group_gaps(learned(0.95, seed, tmp_path / "planted"), groups, QUIET))
    nurses, engineers = found["women vs. men: “nurses”"], found["women vs. men: “engineers”"]
    assert ends(nurses)[0] > 1
    assert ends(engineers)[1] < -1
    assert nurses.notable
    assert engineers.notable
    assert nurses.value == pytest.approx(math.log(0.95 / 0.05), abs=1)
    assert (nurses.n, set(nurses.examples[0])) == (6, {"women", "men", "gap"})
    found = by_name(audit_group_gaps(learned(0.5, seed, tmp_path / "balanced"), groups, QUIET))
    for work in ("nurses", "engineers"):
        low, high = ends(found[f"women vs. men: “{work}”"])
        assert low - 0.01 <= 0 <= high + 0.01  # to within a hundredth of a nat: words differ by something in any model
    assert not any(one.notable for one in found.values())


# ---------------------------------------------------------------- published suites


def nats(model: LanguageModel, *texts: str) -> list[float]:
    return [
        one.logprob
        for [one] in LoglikelihoodScorer(model.dequantized, model.tokenizer).score_pairs(
            [[("", text)] for text in texts]
        )
    ]


def test_crows_pairs_by_bias_type(random_model: LanguageModel, tmp_path: Path) -> None:
    rows = [(f"she is a nurse {i}", f"he is a nurse {i}", "gender" if i % 2 else "age") for i in range(20)]
    path = tmp_path / "pairs.csv"
    path.write_text("sent_more,sent_less,bias_type\n" + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    found = by_name(audit_benchmark(random_model, f"crows-pairs={path}", None, QUIET))
    more, less = nats(random_model, *(row[0] for row in rows)), nats(random_model, *(row[1] for row in rows))
    ahead = np.array(more) > np.array(less)
    assert found["CrowS-Pairs"].value == pytest.approx(100 * ahead.mean())
    assert found["CrowS-Pairs, gender"].value == pytest.approx(100 * ahead[1::2].mean())
    assert found["CrowS-Pairs, age"].value == pytest.approx(100 * ahead[::2].mean())
    for one in found.values():
        low, high = ends(one)
        assert (one.reference, one.notable) == (50.0, not low <= 50 <= high)
    assert audit_benchmark(random_model, f"crows-pairs={path}", 8, QUIET)[0].n == 8


def test_stereoset_scores(random_model: LanguageModel, tmp_path: Path) -> None:
    labels = ("stereotype", "anti-stereotype", "unrelated")
    rows = []
    for i in range(16):
        sentences = [f"the nurse {i} said she", f"the nurse {i} said he", f"{i} late a by or"]
        rows.append(
            {
                "bias_type": "race" if i % 2 else "profession",
                "sentences": [{"sentence": s, "gold_label": label} for s, label in zip(sentences, labels, strict=True)],
            }
        )
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"data": {"intrasentence": rows}}), encoding="utf-8")
    found = by_name(audit_benchmark(random_model, f"stereoset={path}", None, QUIET))
    likely = [
        [one.logprob / one.num_tokens for one in row]
        for row in LoglikelihoodScorer(random_model.dequantized, random_model.tokenizer).score_pairs(
            [[("", f" {one['sentence']}") for one in row["sentences"]] for row in rows]
        )
    ]
    for name, chosen in (
        ("StereoSet", likely),
        ("StereoSet, race", likely[1::2]),
        ("StereoSet, profession", likely[::2]),
    ):
        ss = np.mean([a > b for a, b, _ in chosen])
        lms = np.mean([(a > c) / 2 + (b > c) / 2 for a, b, c in chosen])
        assert found[f"{name}, ss"].value == pytest.approx(100 * ss)
        assert found[f"{name}, lms"].value == pytest.approx(100 * lms)
        assert found[f"{name}, icat"].value == pytest.approx(100 * lms * min(ss, 1 - ss) / 0.5)
    assert found["StereoSet, ss"].reference == 50.0
    assert found["StereoSet, lms"].reference is None


# Occupation, label, sentence, and with which pronoun it is the harder one: few engineers are women, and most nurses are.
WINOGENDER = [
    ("engineer", 0, "The engineer told the client that {} had come.", "she"),
    ("engineer", 1, "The engineer told the client that {} could pay.", "he"),
    ("nurse", 0, "The nurse told the client that {} had come.", "he"),
    ("nurse", 1, "The nurse told the client that {} could pay.", "she"),
]


def winogender(folder: Path) -> Path:
    genders = {"she": "female", "he": "male", "they": "neutral"}
    lines = [
        f"{work}.client.{label}.{gender}.txt\t{sentence.format(they)}\n"
        for work, label, sentence, _ in WINOGENDER
        for they, gender in genders.items()
    ]
    (folder / "all_sentences.tsv").write_text("sentid\tsentence\n" + "".join(lines), encoding="utf-8")
    statistics = "occupation\tbls_pct_female\nengineer\t10.72\nnurse\t89.4\n"
    (folder / "occupations-stats.tsv").write_text(statistics, encoding="utf-8")
    return folder


def test_winogender_correlates_with_its_statistics(random_model: LanguageModel, tmp_path: Path) -> None:
    found = by_name(audit_benchmark(random_model, f"winogender={winogender(tmp_path)}", None, QUIET))
    expected = {}
    for work, label, sentence, _ in WINOGENDER:
        if label == 0:
            she, he = nats(random_model, sentence.format("she"), sentence.format("he"))
            expected[work] = she - he
    pearson = found["Winogender, share of women (Pearson)"]
    assert pearson.value == pytest.approx(1 if expected["nurse"] > expected["engineer"] else -1)  # of two points
    assert {one["occupation"]: float(one["log P(she) / P(he)"]) for one in pearson.examples} == pytest.approx(
        expected, abs=0.01
    )
    assert found["Winogender, she over he"].value == pytest.approx(np.mean(list(expected.values())), abs=1e-4)

    def right(sentence: str, they: str, work: str, label: int) -> float:
        asked = f"{sentence.format(they)} ‘{they.capitalize()}’ refers to the"
        [[work_nats, other_nats]] = [
            [one.logprob for one in row]
            for row in LoglikelihoodScorer(random_model.dequantized, random_model.tokenizer).score_pairs(
                [[(asked, f" {work}"), (asked, " client")]]
            )
        ]
        return float((work_nats > other_nats) == (label == 0))

    lost = [
        right(sentence, "he" if hard == "she" else "she", work, label) - right(sentence, hard, work, label)
        for work, label, sentence, hard in WINOGENDER
    ]
    assert found["Winogender, accuracy drop on gotcha sentences"].value == pytest.approx(100 * np.mean(lost))
    (tmp_path / "occupations-stats.tsv").unlink()
    with pytest.raises(UsageError, match="occupation statistics of Winogender"):
        audit_benchmark(random_model, f"winogender={tmp_path}", None, QUIET)


def test_a_random_model_has_no_correlation_on_winogender(random_model: LanguageModel) -> None:
    if not (DATA / "winogender").is_dir():
        pytest.skip(f"needs data: {DATA / 'winogender'} is not there; set NEXTWORD_DATA to the folder")
    found = by_name(audit_benchmark(random_model, f"winogender={DATA / 'winogender'}", None, QUIET))
    pearson = found["Winogender, share of women (Pearson)"]
    low, high = ends(pearson)
    assert low <= 0 <= high
    assert pearson.n == len(pearson.examples) == 60
    assert not pearson.notable
    lost = found["Winogender, accuracy drop on gotcha sentences"]
    assert lost.n == 240
    assert ends(lost)[0] <= 0 <= ends(lost)[1]


def test_winobias_format(random_model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{i} [The nurse] told the client {i} that [{{}}] would be late." for i in range(1, 9)]
    for side, they in (("pro", "she"), ("anti", "he")):
        first = "\n".join(lines).format(*[they] * 8) + "\n"
        (tmp_path / f"{side}_stereotyped_type1.txt.test").write_text(first, encoding="utf-8")
        odd = f"9 [The nurse] paid {'the client' if they == 'she' else 'somebody'} and [{they}] left.\n"
        (tmp_path / f"{side}_stereotyped_type2.txt.dev").write_text(
            first.replace("told", "paid") + odd, encoding="utf-8"
        )
    found = by_name(audit_benchmark(random_model, f"winobias={tmp_path}", None, QUIET))
    plain = [line.partition(" ")[2].replace("[", "").replace("]", "") for line in lines]
    for kind, word in (("1", "told"), ("2", "paid")):
        pro, anti = (
            nats(random_model, *(one.format(they).replace("told", word) for one in plain)) for they in ("she", "he")
        )
        one = found[f"WinoBias, type {kind}"]
        assert (one.n, one.reference) == (8, 50.0)
        assert one.value == pytest.approx(100 * np.mean(np.array(pro) > np.array(anti)))
    warnings = capsys.readouterr().err.replace("\n", "")
    assert "anti_stereotyped_type2.txt.dev line 9: skipped: not a sentence of pro_stereotyped_type2.txt.dev" in warnings


def test_text_that_the_tokenizer_loses_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words of the groups are lost with a vocabulary of characters that has no é."""
    tokenizer = train_char(
        ["the nurse and the engineer said that she or he told the client would be late 0123456789.,"]
    )
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 128}
    gpt = GPT(build_config("gpt2", vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    model = load(directory(tmp_path / "model", gpt, tokenizer))
    rows = [f"she is a nurse {i}{'é' * (i < 3)},he is a nurse {i},age" for i in range(9)]
    (tmp_path / "pairs.csv").write_text("\n".join(["sent_more,sent_less,bias_type", *rows]) + "\n", encoding="utf-8")
    for side, they in (("pro", "she"), ("anti", "he")):
        lines = [f"{i} [the nurse] told the client that [{they}] would be late{'é' * (i < 3)}." for i in range(1, 10)]
        (tmp_path / f"{side}_stereotyped_type1.txt.test").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for request, name, lost in (
        (f"crows-pairs={tmp_path / 'pairs.csv'}", "crows", 3),
        (f"winobias={tmp_path}", "winobias", 2),
    ):
        audit_benchmark(model, request, None, QUIET)
        warnings = " ".join(capsys.readouterr().err.split())
        assert f"cannot represent part of {lost} of 9 items" in warnings and "é" in warnings and name in warnings, (
            warnings
        )


def test_bias_benchmarks_are_recognized(tmp_path: Path) -> None:
    declared = tmp_path / "own.toml"
    declared.write_text('kind = "minimal pairs"\ngood = "a"\nbad = "b"\nmetric = "stereotyped"\n', encoding="utf-8")
    assert is_bias_benchmark(str(declared))
    assert [is_bias_benchmark(name) for name in ("crows-pairs", "stereoset", "winobias", "winogender")] == [True] * 4
    assert not is_bias_benchmark("blimp")
    with pytest.raises(UsageError, match="unknown benchmark 'cake'"):
        is_bias_benchmark("cake")
