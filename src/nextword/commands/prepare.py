"""``nextword prepare``: text into token shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextword.commands.command import Context, command
from nextword.commands.shared import HELD_OUT_OPTIONS, HeldOutOptions, TextColumnOption, format_corpus, input_paths
from nextword.common.errors import UsageError
from nextword.common.numbers import Size
from nextword.common.options import argument, as_strings, option, options

if TYPE_CHECKING:
    from nextword.data.corpus import Corpus


@options
class PrepareConfig(TextColumnOption, HeldOutOptions):
    """Tokenize text into shards that any number of runs can share.

    pretrain tokenizes its text by itself; prepare it once instead if several runs or several machines use it.

    Attributes:
        corpora: Files, directories or built-in datasets (python-docs, tinystories, wikitext, fineweb-edu), in any mixture.
            Formats: .txt .md .jsonl .csv .tsv .parquet, plain, .gz or .zst.
        out: Directory of the shards. Shards of the same text and settings are reused.
        tokenizer: bpe (byte-level BPE trained on this text), char (one token per character) or the path of a tokenizer.json.
        vocab_size: Vocabulary size of a new BPE tokenizer. Default: chosen from the amount of text and its characters.
        normalize: Unicode normalization of the text by a new tokenizer: none or nfc.
        strict: Stop at the first problem in the text instead of reporting it and continuing.
        shard: I/N, for example 3/64: start with part I of N, while other processes or machines that share the directories
            start with other parts. Each process takes over what is left and ends when the shards are complete. Default: one
            process prepares everything.
        engine: local, or ray to distribute the work over the Ray cluster at RAY_ADDRESS (or a local one).
    """

    corpora: tuple[str, ...] = argument(converter=as_strings)
    out: Path = option(converter=Path, kw_only=False)
    tokenizer: str = "bpe"
    vocab_size: Size | None = None
    normalize: Literal["none", "nfc"] = "none"
    strict: bool = False
    shard: str | None = option(default=None, metavar="I/N")
    engine: Literal["local", "ray"] = "local"


def shards_to_dict(corpus: "Corpus") -> dict[str, Any]:
    """The manifest of the shards without its files."""
    facts = {name: value for name, value in corpus.manifest.items() if name not in ("files", "sources")}
    return {"shards": str(corpus.path), **facts}


def format_shards(corpus: "Corpus") -> str:
    """The directory of the shards and the sizes of the corpus."""
    return f"{corpus.path}: {format_corpus(corpus)}"


@command(
    PrepareConfig, example="nextword prepare my-texts/ --out shards", to_dict=shards_to_dict, to_text=format_shards
)
def prepare(config: PrepareConfig, context: Context) -> "Corpus":
    """Prepare the text in this process or on Ray."""
    from nextword.data import prepare as preparation

    names = ("tokenizer", "vocab_size", "normalize", "text_column", *HELD_OUT_OPTIONS, "strict")
    settings = {name: getattr(config, name) for name in names}
    if config.engine == "ray":
        if config.shard is not None:
            raise UsageError("--shard and --engine ray exclude each other: Ray assigns the parts itself")
        corpora, out = list(input_paths(config.corpora)), config.out.resolve()
        return preparation.prepare_on_ray(corpora, out, settings, context.console)
    console = context.console
    return preparation.prepare(
        config.corpora, config.out, shard=config.shard, **settings, progress=console.progress, log=console.info
    )
