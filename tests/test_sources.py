"""Labeled data in the form in which its sources publish it."""

import gzip
import json

import pytest

from nextword.common.errors import UsageError
from nextword.data.issues import IssueLog
from nextword.data.readers import first_row_is_header
from nextword.tasks.examples import read_examples
from nextword.tasks.schema import SuggestionError
from nextword.tasks.sources import HEADER_NAMES, flatten, split_of, table_suffix

SENTENCES = [
    f"the {noun} of house {i} is {how} today" for i in range(3) for noun in ("cat", "dog") for how in ("fine", "old")
]


def read(tmp_path, files, arguments=("",), task=None, columns=None, **options):
    """The example set of these files, given by name and content, and the issues as text."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    issues = IssueLog()
    examples = read_examples([tmp_path / name for name in arguments], task, issues, columns, **options)
    return examples, "\n".join(issues.summary_lines())


def labeled(examples):
    return [(example.fields["text"], example.fields["label"]) for example in examples]


def lines(*columns, separator="\t", quote=""):
    """A table of columns; an integer n stands for a column with the values 0 to n - 1 in turn, as text."""
    cells = [[str(i % c) for i in range(len(SENTENCES))] if isinstance(c, int) else c for c in columns]
    return "".join(separator.join(f"{quote}{cell}{quote}" for cell in row) + "\n" for row in zip(*cells, strict=True))


RTE = [("entailment", "not_entailment")[i % 2] for i in range(12)]
NUMBERS = [str(i) for i in range(12)]
# name: (files, arguments, task, {role: column}), each with twelve examples
TABLES = {
    "SST-2": (
        {"train.tsv": "sentence\tlabel\n" + lines(SENTENCES, 2)},
        "classify",
        {"text": "sentence", "label": "label"},
    ),
    "RTE": (
        {"train.tsv": "index\tsentence1\tsentence2\tlabel\n" + lines(NUMBERS, SENTENCES, SENTENCES, RTE)},
        "entail",
        {"premise": "sentence1", "hypothesis": "sentence2", "label": "label"},
    ),
    "QNLI": (
        {"train.tsv": "index\tquestion\tsentence\tlabel\n" + lines(NUMBERS, SENTENCES, SENTENCES, RTE)},
        "entail",
        {"premise": "sentence", "hypothesis": "question", "label": "label"},
    ),
    "MRPC": (
        {
            "msr_paraphrase_train.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
            + lines(2, NUMBERS, NUMBERS, [f'{s} "so' for s in SENTENCES], SENTENCES)
        },
        "similarity",
        {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "AG News": (
        {"train.csv": lines(3, SENTENCES, [s * 2 for s in SENTENCES], separator=",", quote='"')},
        "classify",
        {"text": "3", "label": "1"},
    ),
    "SMS spam": (
        {"SMSSpamCollection": lines([("ham", "spam")[i % 2] for i in range(12)], SENTENCES)},
        "classify",
        {"text": "2", "label": "1"},
    ),
    "hate speech": (
        {"labeled_data.csv": ",count,hate_speech,class,tweet\n" + lines(NUMBERS, 3, 2, 3, SENTENCES, separator=",")},
        "classify",
        {"text": "tweet", "label": "class"},
    ),
    "Excel": (
        {"a.csv": "\ufeffText;Bewertung\n" + lines(SENTENCES, 3, separator=";")},
        "classify",
        {"text": "Text", "label": "Bewertung"},
    ),
    "airline": (
        {"Tweets.csv": "tweet_id,airline_sentiment,airline,text\n" + lines(NUMBERS, 3, 2, SENTENCES, separator=",")},
        "classify",
        {"text": "text", "label": "airline_sentiment"},
    ),
    "toxic comments": (
        {
            "train.csv": "id,comment_text,toxic,threat,insult\n"
            + lines([f"a{n}" for n in NUMBERS], SENTENCES, 2, 2, 2, separator=",")
        },
        "classify",
        {"text": "comment_text", "labels": "toxic,threat,insult"},
    ),
    "Yelp": (
        {"r.json": [{"stars": i % 5 + 1.0, "text": s, "date": "x"} for i, s in enumerate(SENTENCES)]},
        "classify",
        {"text": "text", "label": "stars"},
    ),
    "SNLI": (
        {
            "snli.jsonl": [
                {"gold_label": ("neutral", "entailment")[i % 2], "sentence1": s, "sentence2": s}
                for i, s in enumerate(SENTENCES)
            ]
        },
        "entail",
        {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
    "self-instruct": (
        {
            "seeds.jsonl": [
                {"id": i, "instruction": s, "instances": [{"input": "", "output": s}]} for i, s in enumerate(SENTENCES)
            ]
        },
        "chat",
        {"instruction": "instruction", "input": "instances.input", "output": "instances.output"},
    ),
    "SQuAD": (
        {
            "train.json": json.dumps(
                {
                    "version": "1",
                    "data": [
                        {
                            "title": "t",
                            "paragraphs": [
                                {
                                    "context": s,
                                    "qas": [
                                        {"id": "1", "question": "who?", "answers": [{"text": "it", "answer_start": 0}]}
                                    ],
                                }
                            ],
                        }
                        for s in SENTENCES
                    ],
                },
                indent=1,
            )
        },
        "chat",
        {
            "instruction": "paragraphs.qas.question",
            "input": "paragraphs.context",
            "output": "paragraphs.qas.answers.text",
        },
    ),
    "Dolly": (
        {"d.jsonl": [{"instruction": s, "context": "", "response": s, "category": "qa"} for s in SENTENCES]},
        "chat",
        {"instruction": "instruction", "input": "context", "output": "response"},
    ),
    "GSM8K": (
        {"g.jsonl": [{"question": s, "answer": f"{s} #### 1"} for s in SENTENCES]},
        "rewrite",
        {"prompt": "question", "completion": "answer"},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_they_are_published(name, tmp_path):
    files, task, columns = TABLES[name]
    examples, issues = read(tmp_path, files, list(files))
    assert (examples.task, examples.columns, len(examples)) == (task, columns, 12), issues
    assert examples.reason
    if "toxic" in name:
        assert [example.fields["labels"] for example in examples][:2] == [(), ("toxic", "threat", "insult")]
        assert len(read(tmp_path, {}, list(files), like=examples)[0]) == 12


def test_tables_without_a_header_lose_no_row(tmp_path):
    cola = lines(["gj04"] * 6 + ["l-93"] * 6, 2, [""] * 12, SENTENCES)
    examples, issues = read(tmp_path, {"train.tsv": cola}, ["train.tsv"], "classify", {"text": "4", "label": "2"})
    assert labeled(examples) == [(s, str(i % 2)) for i, s in enumerate(SENTENCES)]
    assert (
        "no header: the first line is data, and the columns are numbered: 1: gj04 · 2: 0 · 3:  · 4: the cat" in issues
    )
    with pytest.raises(SuggestionError, match=r"the table has no header(.|\n)*4: 'the cat") as caught:
        read(tmp_path, {"train.tsv": cola}, ["train.tsv"])
    assert caught.value.options[:2] == ["--task", "classify"] and "text=4" in caught.value.options
    with pytest.raises(SuggestionError) as caught:
        read(tmp_path, {"x.tsv": lines(NUMBERS, SENTENCES, SENTENCES)}, ["x.tsv"])
    assert caught.value.options == ["--task", "rewrite", "--column", "prompt=2", "--column", "completion=3"]
    # A header is one also if the columns are given by number, and a first row that may be either is data then.
    table = "sentence,label\n" + lines(SENTENCES, 2, separator=",")
    assert len(read(tmp_path, {"a.csv": table}, ["a.csv"], "classify", {"text": "1", "label": "2"})[0]) == 12
    for columns, count in (({"prompt": "1", "completion": "2"}, 2), ({"prompt": "hello", "completion": "bonjour"}, 1)):
        assert len(read(tmp_path, {"b.tsv": "hello\tbonjour\nyes\toui\n"}, ["b.tsv"], "rewrite", columns)[0]) == count


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["text", "label"], ["a", "x"]], True),
        ([["a", "b"], ["a", "1"], ["c", "2"]], False),  # "a" occurs again
        ([["comment", "so good"], ["question", "why"], ["comment", "well"]], False),
        ([["x", "y"], ["a", "1"], ["c", "2"]], True),  # a column of numbers
        ([["1", "good"], ["2", "bad"]], False),
        ([["0", "1"], ["good", "5"], ["bad", "7"]], True),  # as pandas names columns
        ([["Hello there.", "Bonjour."], ["Yes.", "Oui."]], False),
        ([["hello", "bonjour"], ["yes", "oui"]], None),
        ([["a text of more than five words", "x"], ["b", "y"]], False),
        ([["这部电影很好看。", "好"], ["不好看。", "坏"]], False),
        ([["บทความภาษาไทยเรื่องหนึ่งซึ่งยาวมาก", "x"], ["ข้อความ", "y"]], False),
        ([["यह फ़िल्म अच्छी है।", "x"], ["नहीं", "y"]], False),
        ([["የሰው ልጅ ነጻ ነው።", "x"], ["ነው", "y"]], False),
        ([["评论内容", "情感标签"], ["好看", "1"], ["难看", "0"]], True),
        ([["ข้อความ", "ป้าย"], ["ดี", "1"], ["ไม่ดี", "0"]], True),
    ],
)
def test_the_header_of_a_table(rows, expected):
    assert first_row_is_header(rows, HEADER_NAMES) is expected


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', ".jsonl"),
        ('[\n {"text": "a"}\n]\n', ".json"),
        ("a\tb\nc\td\n", ".tsv"),
        ("id,text\n1,a\n", ".csv"),
        ("text;label\na;b\n", ".csv"),
        ("i am glad;joy\nno, not;fear\n" * 3, ".csv"),
        ("Text, the first of all, was long.\nIt went on, and on.\n", ""),
        ("A line\tof prose\nand others\nwithout\nany tab\n", ""),
        ("EU B-ORG\nrejects O\n\nGerman B-MISC\n", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.data"])
def test_tables_under_any_name(content, suffix, name, tmp_path):
    (tmp_path / name).write_text(content)
    assert table_suffix(tmp_path / name) == suffix


@pytest.mark.parametrize("root", ["", "train/", "20news-bydate-train/"])
def test_a_folder_for_each_class(root, tmp_path):
    files = {
        f"{root}{label}/{i}{'.txt' if i else ''}": f"{label} {i}\n"
        for label in ("alt.atheism", "rec.autos")
        for i in range(3)
    }
    held_out = {f"20news-bydate-test/rec.autos/{i}": f"test {i}" for i in range(2)} if root else {}
    more = {"unsup/1.txt": "x", "README": "about", ".hidden/a/b.txt": "x"} if not root else {}
    examples, issues = read(tmp_path, files | held_out | more)
    expected = [(f"{label} {i}", label) for label in ("alt.atheism", "rec.autos") for i in range(3)]
    assert sorted(labeled(e for e in examples if e.split != "test")) == sorted(expected)
    assert [e.fields["text"] for e in examples if e.split == "test"] == [f"test {i}" for i in range(2 * bool(root))]
    assert "the label of a text is the name of its folder (alt.atheism, rec.autos)" in issues


def test_texts_in_pairs(tmp_path):
    articles = {f"News Articles/business/{i}.txt": f"article {i} with more words" for i in range(3)}
    files = articles | {f"Summaries/business/{i}.txt": f"summary {i}" for i in range(3)}
    for arguments in ([""], ["News Articles", "Summaries"], ["Summaries", "News Articles"]):
        examples, issues = read(tmp_path / "bbc", files, arguments)
        assert [e.fields for e in examples] == [
            {"prompt": f"article {i} with more words", "completion": f"summary {i}"} for i in range(3)
        ]
        assert "is a prompt, and" in issues
    numbered = {f"{name}/{i}.txt": f"{name} {i}" for name in ("up", "down") for i in range(3)}
    assert read(tmp_path / "classes", numbered)[0].task == "classify"  # classes may number their files alike
    assert read(tmp_path / "classes", {}, task="rewrite")[0].task == "rewrite"
    same_name = {f"{i}.{kind}": f"{kind} {i} {'long' * (kind == 'src')}" for i in range(3) for kind in ("src", "tgt")}
    examples, _ = read(tmp_path / "names", same_name)
    assert [e.fields["completion"] for e in examples] == ["tgt 0", "tgt 1", "tgt 2"]
    mail = {f"{i}.subject": f"Dear all,\n\nmore {i}\n\n@subject\nOn {i}\n\n@ann0\nOther\n" for i in range(2)}
    examples, _ = read(tmp_path / "mail", mail)
    assert [e.fields for e in examples] == [
        {"prompt": f"Dear all,\n\nmore {i}", "completion": f"On {i}"} for i in range(2)
    ]


def test_lines_that_belong_together(tmp_path):
    files = {"train.en.gz": "a cat\na dog\n\n", "train.fr.gz": "un chat\nun chien\nvide\n"}
    for task in (None, "rewrite"):
        examples, issues = read(tmp_path, files, list(files), task)
        pairs = [{"prompt": "a cat", "completion": "un chat"}, {"prompt": "a dog", "completion": "un chien"}]
        assert [e.fields for e in examples] == pairs and "line 3: the prompt is empty" in issues
    assert "train.en.gz is the prompt and train.fr.gz the completion" in issues
    folder = {
        f"{split}.{lang}": f"{lang} {split}\n"
        for split in ("train", "val", "test_2016_flickr")
        for lang in ("de", "en")
    }
    examples, _ = read(tmp_path / "multi30k", folder)
    assert [(e.split, e.fields["completion"]) for e in examples] == [
        ("test", "en test_2016_flickr"),
        ("train", "en train"),
        ("validation", "en val"),
    ]
    with pytest.raises(UsageError, match=r"has 2 lines and .* 1: lines that belong together need the same number"):
        read(tmp_path / "x", {"a.en": "a\nb\n", "a.fr": "c\n"}, ["a.en", "a.fr"])
    polarity = {"rt-polarity.pos": "so good\n", "rt-polarity.neg": "so bad\n"}
    assert labeled(read(tmp_path / "p", polarity, list(polarity))[0]) == [("so good", "pos"), ("so bad", "neg")]
    genres = {"rap.txt": "a\nb\n", "rock.txt": "c\n"}
    assert labeled(read(tmp_path / "g", genres, task="classify")[0]) == [("a", "rap"), ("b", "rap"), ("c", "rock")]
    assert read(tmp_path / "g", {})[0].task == "continue"
    fasttext = {"train.ft.txt": "__label__2 great CD: yes\n__label__1 , __label__3 no\n"}
    assert [e.fields["labels"] for e in read(tmp_path / "f", fasttext)[0]] == [("2",), ("1", "3")]
    with pytest.raises(UsageError, match="No task labels tokens"):
        read(
            tmp_path / "c", {"eng.train": "EU NNP B-ORG\nrejects VBZ O\n\nGerman JJ B-MISC\ncall NN O\n"}, ["eng.train"]
        )


def test_rows_without_targets(tmp_path):
    model = read(tmp_path, {"a.csv": "text,label\nx,1\ny,2\n"}, ["a.csv"], label_map=None)[0]
    options = {"require_targets": False, "like": model, "keep_columns": ("*",)}
    examples, _ = read(tmp_path, {"lines.txt": "one\n\ntwo\n"}, ["lines.txt"], **options)
    assert [(row.line, row.values, bool(row.error)) for row in examples.rows] == [
        (1, {"text": "one"}, False),
        (2, {"text": ""}, True),
        (3, {"text": "two"}, False),
    ]
    examples, _ = read(tmp_path / "docs", {"b.txt": "two\nlines", "a.txt": "one"}, **options)
    assert [row.values["text"] for row in examples.rows] == ["one", "two\nlines"]
    examples, _ = read(tmp_path, {"c.csv": "tweet_of_today\nx\n"}, ["c.csv"], **options)  # its only column
    assert [e.fields["text"] for e in examples] == ["x"]
    with pytest.raises(SuggestionError) as caught:
        read(tmp_path, {"d.csv": "a,b\nx y,1\n"}, ["d.csv"], **options)
    assert caught.value.options == ["--column", "text=a"]


def test_a_column_or_a_file_names_the_split(tmp_path):
    rows = [{"text": s, "label": i % 2, "split": ("Train", "dev", "test")[i % 3]} for i, s in enumerate(SENTENCES)]
    examples, _ = read(tmp_path, {"a.jsonl": rows}, ["a.jsonl"])
    assert [e.split for e in examples] == ["train", "validation", "test"] * 4
    rows = [{**row, "split": "abc"[i % 3]} for i, row in enumerate(rows)]
    examples, issues = read(tmp_path, {"a.jsonl": rows}, ["a.jsonl"])
    assert {e.split for e in examples} == {""} and "unused columns: split" in issues
    table = "text,label\na,1\n"
    files = {"train-00000-of-00001.csv": table, "dev_matched.csv": table, "test.csv": "text\nb\n"}
    examples, issues = read(tmp_path / "glue", files)
    assert [e.split for e in examples] == ["validation", "train"] and "no column label" in issues
    for name, split in (("a/train/pos", "train"), ("WMT.dev.tsv", "validation"), ("contest.csv", ""), ("latest", "")):
        assert split_of(tmp_path.relative_to("/") / name) == split or split_of(type(tmp_path)(name)) == split


def test_questions_about_labels(tmp_path):
    def ask(names, **label_map):
        table = [{"text": f"t{i}", "label": name} for i, name in enumerate(names)]
        examples, issues = read(tmp_path, {"a.jsonl": table}, ["a.jsonl"], label_map=label_map)
        return [e.fields["label"] for e in examples], issues

    with pytest.raises(
        SuggestionError, match=r"is NA \(1\) a missing(.|\n)*are pos \(2\), Pos \(1\) one label\?"
    ) as caught:
        ask(["pos", "pos", "Pos", "neg", "NA"])
    assert sorted(caught.value.options) == ["--map-label=NA=", "--map-label=Pos=pos"]
    labels, issues = ask(["pos", "pos", "Pos", "neg", "NA"], Pos="pos", NA="")
    assert labels == ["pos", "pos", "pos", "neg"] and "left out by --map-label: NA" in issues
    assert ask(["pos", "Pos", "neg"], Pos="Pos")[0] == ["pos", "Pos", "neg"]
    with pytest.raises(SuggestionError, match=r"is -1 \(1\) a missing label"):
        ask([0, 1, 2, -1])
    with pytest.raises(SuggestionError, match=r"some labels are numbers and others words: 1 \(2\), 0 \(1\), pos \(1\)"):
        ask(["1", 1.0, "0", "pos"])
    for names in (["-1", "1"], [1, "1.0", 0], ["1", "2", "10"], ["a b", "c"]):
        ask(names)


def test_markup_and_numbers_that_are_no_classes(tmp_path):
    texts = ["a &amp; b", "&#39;c&#39; &lt;", "d<br />e</p>", "x < y and z > 1", "f & g; <3 h"]
    _, issues = read(
        tmp_path, {"a.jsonl": [{"text": text, "label": i % 2} for i, text in enumerate(texts)]}, ["a.jsonl"]
    )
    assert (
        "line 1: HTML entities: &amp; in 2 of 5 examples" in issues and "line 3: HTML tags: <br /> in 1 of 5" in issues
    )
    rows = [{"review": text, "rating": i / 7} for i, text in enumerate(SENTENCES * 3)]
    with pytest.raises(UsageError, match=r"rating has numbers such as 0.0, which are no classes"):
        read(tmp_path, {"b.jsonl": rows}, ["b.jsonl"])
    boolq = [{"question": s, "answer": i % 2 == 0, "passage": s * 2} for i, s in enumerate(SENTENCES)]
    with pytest.raises(SuggestionError, match="the answers are no texts") as caught:
        read(tmp_path, {"c.jsonl": boolq}, ["c.jsonl"])
    assert caught.value.options[:4] == ["--task", "entail", "--column", "premise=question"]
    wmt = [{"translation": {"en": s, "de": s}} for s in SENTENCES]
    with pytest.raises(SuggestionError) as caught:
        read(tmp_path, {"d.jsonl": wmt}, ["d.jsonl"])
    assert caught.value.options == [
        "--task",
        "rewrite",
        *("--column", "prompt=translation.en"),
        *("--column", "completion=translation.de"),
    ]
    stories = {
        f"stories/{i}.story": f"{'long ' * 9}\n\n@highlight\n\nfirst\n\n@highlight\n\nsecond\n" for i in range(3)
    }
    assert {e.fields["completion"] for e in read(tmp_path / "cnn", stories)[0]} == {"first\nsecond"}
    with pytest.raises(UsageError, match="texts without labels"):
        read(tmp_path / "plain", {"train/a.txt": "a", "test/b.txt": "b"})


def test_nested_records():
    nested = {"id": 1, "a": [{"x": 1, "b": [{"y": 2}, {"y": 3}]}, {"x": 4, "b": []}], "t": {"en": "e", "fr": "f"}}
    assert flatten(nested) == [
        {"id": 1, "a.x": 1, "a.b.y": 2, "t.en": "e", "t.fr": "f"},
        {"id": 1, "a.x": 1, "a.b.y": 3, "t.en": "e", "t.fr": "f"},
        {"id": 1, "a.x": 4, "a.b": [], "t.en": "e", "t.fr": "f"},
    ]
