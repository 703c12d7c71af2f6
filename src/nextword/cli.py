"""`nextword VERB …`: reads the command line, calls the verb, prints.

Results go to standard output, everything else to standard error. Nothing heavy is imported before a verb runs.
Exit codes: 0 done, 1 failed, 2 wrong use, 3 a corrupt file, 4 the disk is full, 5 the loss diverged, 6 another process works
on the run, 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

import json as json_module
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import App, CycloptsError, Parameter

from nextword import STARTED, __version__
from nextword.console import Console, duration
from nextword.errors import NextwordError, UsageError
from nextword.model.config import PRESETS, SIZES, ModelConfig
from nextword.recipes import RECIPES, Training

app = App(
    name="nextword",
    version=__version__,
    help="From a folder of text to a GPT that is trained, measured and used, on the machine you have.",
    help_epilogue="Exit codes: 0 done · 1 failed · 2 wrong use · 3 corrupt file · 4 disk full · 5 diverged · 6 run is locked · "
    "130, 143 stopped.\n\nBegin with: nextword demo\n",
    help_format="plaintext",  # a parser of Markdown would take longer to import than all the rest
    result_action="return_value",
)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print one result object on standard output.")
    ] = False
    quiet: Annotated[bool, Parameter(negative="", show_default=False, help="Say nothing but results and warnings.")] = (
        False
    )
    seed: Annotated[int | None, Parameter(help="Makes every draw repeatable.")] = None
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"

    def console(self) -> Console:
        return Console(quiet=self.quiet)


def optional(cls: type, name: str, leave_out: tuple[str, ...] = ()) -> Any:
    """A settings class with every field optional, for options such as --training.lr; what is not said is None."""
    hints = get_type_hints(cls)
    made = make_dataclass(
        name,
        [
            (f.name, Annotated[hints[f.name] | None, Parameter(help=f.metadata["help"], show_default=False)], None)
            for f in fields(cls)
            if f.name not in leave_out
        ],
        frozen=True,
    )
    made.__module__ = __name__  # without a module of its own, Cyclopts takes it for a type of the standard library
    return made


ModelOptions: Any = optional(ModelConfig, "ModelOptions", leave_out=("vocab_size",))
TrainingOptions: Any = optional(Training, "TrainingOptions")
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Recipes = Annotated[str | None, Parameter(help=f"A named recipe: {', '.join(RECIPES)}.")]
Presets = Annotated[str | None, Parameter(help=f"The kind of model: {', '.join(PRESETS)}. [default: modern]")]
Sizes = Annotated[str | None, Parameter(help=f"{', '.join(SIZES)}. Chosen from the text and the time where not given.")]


def said(options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}


def show(result: dict[str, Any], common: Common, text: Callable[[], str]) -> None:
    """One JSON object, or lines for a person."""
    print(json_module.dumps(result, ensure_ascii=False) if common.json else text())


@app.command
def demo(*, out: Path = Path("nextword-demo"), common: Common = Common()) -> None:
    """The whole life of a small GPT on the documentation inside your own Python, in under five minutes.

    Parameters
    ----------
    out
        The run folder.
    """
    from nextword import api

    console = common.console()
    result = api.demo(out, console=console, started=STARTED, seed=common.seed, device=common.device)

    def text() -> str:
        lines = [f"\n{c['prompt']}{c['text']}\n" for c in result["completions"]]
        return "\n".join([*lines, summary(result), "", "Go on: " + next_commands(result)])

    show(result, common, text)


@app.command
def prepare(
    corpora: list[str],
    /,
    *,
    out: Path,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: Flag = False,
    common: Common = Common(),
) -> None:
    """Turn text into shards of tokens, which any number of runs can share.

    Parameters
    ----------
    corpora
        Files, folders or named corpora (python-docs, tinystories, wikitext, fineweb-edu), mixed freely.
        Read are .txt .md .jsonl .csv .tsv .parquet, plain, .gz or .zst.
    out
        Where the shards go. A second run on the same text uses them as they are.
    tokenizer
        bpe (byte-level, trained on this text), char (one token a character), or the path of a tokenizer.json.
    vocab_size
        Of a new BPE; chosen to suit the text where not given.
    text_column
        The column of tables that holds the text.
    strict
        Stop at the first thing that is wrong, instead of telling and going on.
    """
    from nextword import api

    corpus = api.prepare(
        corpora, out, tokenizer=tokenizer, vocab_size=vocab_size, text_column=text_column, strict=strict,
        console=common.console(),
    )  # fmt: skip
    result = {"shards": str(out), **{k: v for k, v in corpus.facts.items() if k not in ("files", "sources")}}
    show(result, common, lambda: f"{out}: {api.describe(corpus)}")


@app.command
def pretrain(
    corpora: list[str] | None = None,
    /,
    *,
    corpus: Annotated[list[str] | None, Parameter(negative="")] = None,
    out: Path,
    recipe: Recipes = None,
    preset: Presets = None,
    size: Sizes = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    budget: str | None = None,
    steps: int | None = None,
    tokens: str | None = None,
    resume: Flag = False,
    text_column: str | None = None,
    strict: Flag = False,
    tensorboard: Flag = False,
    model: Annotated[ModelOptions, Parameter(group="Single settings of the model")] = ModelOptions(),  # pyright: ignore[reportInvalidTypeForm]
    training: Annotated[TrainingOptions, Parameter(group="Single settings of the training")] = TrainingOptions(),  # pyright: ignore[reportInvalidTypeForm]
    common: Common = Common(),
) -> None:
    """Train a GPT on your own text, from nothing to a model that generates.

    Parameters
    ----------
    corpora
        Files, folders, shards from nextword prepare, or named corpora (python-docs, tinystories, wikitext, fineweb-edu).
    corpus
        The same, as an option.
    out
        The run folder: the model, its measurements and its report.
    tokenizer
        bpe (byte-level, trained on this text), char (one token a character), or the path of a tokenizer.json.
    vocab_size
        Of a new BPE; chosen to suit the text where not given.
    budget
        Wall time of the whole run, such as 90s, 30m or 2h; ten minutes where nothing is said.
    steps
        Train so many steps instead.
    tokens
        Train on so many tokens instead, such as 5M.
    resume
        Go on exactly where the run stood; begin where there is none yet.
    text_column
        The column of tables that holds the text.
    strict
        Stop at the first thing that is wrong in the text, instead of telling and going on.
    tensorboard
        Write the curves for TensorBoard too, to RUN/tensorboard.
    """
    from nextword import api

    result = api.pretrain(
        [*(corpora or []), *(corpus or [])], out, recipe=recipe, preset=preset, size=size, tokenizer=tokenizer,
        vocab_size=vocab_size, budget=budget, steps=steps, tokens=tokens, resume=resume, model=said(model),
        training=said(training), text_column=text_column, strict=strict, seed=common.seed, device=common.device,
        tensorboard=tensorboard, console=common.console(), started=STARTED,
    )  # fmt: skip
    show(result, common, lambda: summary(result) + "\nTry it: " + next_commands(result))


def summary(result: dict[str, Any]) -> str:
    lines = [f"{result['steps']:,} steps in {duration(result['seconds'])}: {result['model']}"]
    if "loss" in result:
        lines.append(
            f"validation loss {result['loss']:.4f} · {result['bits_per_byte']:.4f} bits/byte · "
            f"perplexity {result['perplexity']:.2f} (all {result['validation_tokens']:,} held-out tokens, "
            f"weights of step {result['best_step']:,})"
        )
    return "\n".join([*lines, f"report: {Path(result['run']) / 'report.html'}"])


def next_commands(result: dict[str, Any]) -> str:
    return f"nextword generate {result['run']} {shlex.quote(result['prompt'])}"


@app.command
def generate(
    model: Path,
    prompts: list[str] | None = None,
    /,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Annotated[list[str] | None, Parameter(negative="")] = None,
    common: Common = Common(),
) -> None:
    """Let a model go on from a text.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    prompts
        What to go on from; none begins a new document.
    max_tokens
        How many tokens are written at most. Past the context length the window slides.
    temperature
        0 always takes the likeliest token; higher is bolder.
    top_k
        Draw from the k likeliest tokens only.
    top_p
        Draw from the fewest tokens that have this probability together.
    min_p
        Draw from tokens at least this share as likely as the likeliest.
    repetition_penalty
        Above 1 makes tokens that the text already has less likely.
    stop
        End before this text. May be given more than once.
    """
    from nextword import api
    from nextword.inference.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=common.seed,
    )  # fmt: skip
    loaded = api.load(model, common.device)
    prompts = prompts or [""]
    if len(prompts) == 1 and not common.json:  # one text is shown as it is made
        print(prompts[0], end="", flush=True)
        for piece in loaded.stream(prompts[0], sampling):
            print(piece, end="", flush=True)
        print()
        return
    completions = loaded.generate(prompts, sampling)
    result = {
        "completions": [{"prompt": c.prompt, "text": c.text, "finish_reason": c.finish_reason} for c in completions]
    }
    show(result, common, lambda: "\n\n".join(f"{c.prompt}{c.text}" for c in completions))


@app.command
def evaluate(
    model: Path,
    texts: list[str] | None = None,
    /,
    *,
    text_column: str | None = None,
    common: Common = Common(),
) -> None:
    """Measure how well a model predicts a text: loss, perplexity, bits per byte.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    texts
        Files, folders or named corpora; without any, the whole held-out part of the run's own text.
    text_column
        The column of tables that holds the text.
    """
    from nextword import api

    measured = api.evaluate(model, texts or [], text_column=text_column, device=common.device, console=common.console())
    result = {name: getattr(measured, name) for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}
    show(
        result,
        common,
        lambda: (
            f"loss {measured.loss:.4f} nats/token · perplexity {measured.perplexity:.2f} · "
            f"{measured.bits_per_byte:.4f} bits/byte, over {measured.tokens:,} tokens, {measured.bytes:,} bytes"
        ),
    )


@app.command
def report(runs: list[Path], /, *, common: Common = Common()) -> None:
    """Draw the report of a run anew.

    Parameters
    ----------
    runs
        Run folders.
    """
    from nextword import api

    pages = [str(api.report(run)) for run in runs]
    show({"reports": pages}, common, lambda: "\n".join(pages))


@app.command
def verify(paths: list[Path], /, *, common: Common = Common()) -> None:
    """Check every file of a run, a model or shards against its SHA-256.

    Parameters
    ----------
    paths
        Run folders, model directories or shards.
    """
    from nextword import api

    whole = {directory: kind for path in paths for directory, kind in api.verify(path).items()}
    show(
        {"whole": whole}, common, lambda: "\n".join(f"{directory}: {kind}, whole" for directory, kind in whole.items())
    )


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        print(f"nextword: {error}\nSee: nextword --help", file=sys.stderr)
        return UsageError.exit_code
    except NextwordError as error:
        print(f"nextword: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nextword: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 1
    return 0
