"""The verbs about text: prepare it, learn it, go on from it, measure it; and those about any run or model."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from nextword import STARTED
from nextword.commands.options import (
    CommonOptions,
    Flag,
    ModelGroup,
    ModelOptions,
    PrecisionOption,
    RunOptions,
    TrainingGroup,
    TrainingOptions,
    format_cluster_estimate,
    format_plan,
    format_pretrain_summary,
    given_options,
    print_result,
    suggest_generate_command,
)
from nextword.common.run_lock import fail_if_locked


def demo(*, out: Path = Path("nextword-demo"), budget: str = "3m", common: CommonOptions = CommonOptions()) -> None:
    """The whole life of a small GPT on the documentation inside your own Python: trained on text, then fine-tuned to classify
    and to answer.

    Parameters
    ----------
    out
        The run folder.
    budget
        Wall time of all of it.
    """
    from nextword.commands import demo

    console = common.console()
    result = demo.demo(out, budget=budget, console=console, started=STARTED, seed=common.seed, device=common.device)

    def text() -> str:
        lines = [f"\n{c['prompt']}{c['text']}\n" for c in result["completions"]]
        for one in result["answers"]:
            said = one["answered"].get("label") or one["answered"]["text"]
            lines.append(f"{one['asked']}\n  → {said}")
        packages = result["packages"]["scores"][
            "macro_f1" if result["packages"]["metric"] == "macro_f1" else "accuracy"
        ]
        words = result["packages"]["baselines"]["bag of words"][result["packages"]["metric"]]
        lines.append(
            f"\nwhich package says it: {result['packages']['metric'].replace('_', ' ')} {in_words(packages)}; "
            f"bag of words {in_words(words)}"
        )
        run = result["run"]
        more = f"nextword predict {run}/tasks/packages 'a text', nextword chat {run}/tasks/assistant"
        return "\n".join(
            [*lines, format_pretrain_summary(result), "", f"Go on: {suggest_generate_command(result)}, {more}"]
        )

    print_result(result, common, text)


def prepare(
    corpora: list[str],
    /,
    *,
    out: Path,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: Flag = False,
    shard: str | None = None,
    engine: Literal["local", "ray"] = "local",
    common: CommonOptions = CommonOptions(),
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
    shard
        3/64: begin with the third of 64 parts of the work, while other processes, on any machine that sees the same
        folders, begin with others. Each does what is left, and ends when all is there.
    engine
        ray: let the processes of a Ray cluster do it, each a part: of the one that RAY_ADDRESS names, or of this machine.
    """
    from nextword.commands import api

    corpus = api.prepare(
        corpora, out, tokenizer=tokenizer, vocab_size=vocab_size, text_column=text_column, strict=strict, shard=shard,
        engine=engine, console=common.console(),
    )  # fmt: skip
    result = {"shards": str(out), **{k: v for k, v in corpus.manifest.items() if k not in ("files", "sources")}}
    print_result(result, common, lambda: f"{out}: {api.format_pretrain_summary(corpus)}")


def plan(
    corpora: list[str] | None = None,
    /,
    *,
    run_options: RunOptions = RunOptions(),
    gpu: str | None = None,
    machines: int = 1,
    gpus_per_machine: int = 8,
    parameters: str | None = None,
    price: float | None = None,
    model: ModelGroup = ModelOptions(),  # pyright: ignore[reportInvalidTypeForm]
    training: TrainingGroup = TrainingOptions(),  # pyright: ignore[reportInvalidTypeForm]
    common: CommonOptions = CommonOptions(),
) -> None:
    """Say what a pre-training would be before it is begun: size, tokens, time, memory, energy, and what it will reach.

    Takes the text's and this machine's measure in some seconds; writes nothing. With --gpu, and without a text, it plans on
    paper for machines that are not here: nextword plan --machines 8 --gpu h100 --parameters 7B --tokens 140B

    Parameters
    ----------
    corpora
        Files, folders, shards from nextword prepare, or named corpora (python-docs, tinystories, wikitext, fineweb-edu).
    gpu
        Plan on paper for GPUs of this kind: v100, a100, h100, h200, b200, l4, l40s, rtx4090.
    machines
        How many machines, on paper.
    gpus_per_machine
        And how many GPUs in each.
    parameters
        About how many the model is to have, on paper: 7B.
    price
        Of a GPU hour, in any money.
    """
    from nextword.commands import api

    estimate = api.plan(
        corpora or [], **given_options(run_options), model=given_options(model), training=given_options(training), device=common.device, gpu=gpu,
        machines=machines, gpus_per_machine=gpus_per_machine, parameters=parameters, price=price, console=common.console(),
    )  # fmt: skip
    print_result(estimate, common, lambda: format_cluster_estimate(estimate) if gpu else format_plan(estimate))


def pretrain(
    corpora: list[str] | None = None,
    /,
    *,
    corpus: Annotated[list[str] | None, Parameter(negative="")] = None,
    out: Path,
    run_options: RunOptions = RunOptions(),
    resume: Flag = False,
    tensorboard: Flag = False,
    mirror: str | None = None,
    model: ModelGroup = ModelOptions(),  # pyright: ignore[reportInvalidTypeForm]
    training: TrainingGroup = TrainingOptions(),  # pyright: ignore[reportInvalidTypeForm]
    common: CommonOptions = CommonOptions(),
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
    resume
        Go on exactly where the run stood; begin where there is none yet.
    tensorboard
        Write the curves for TensorBoard too, to RUN/tensorboard.
    mirror
        A place beyond this machine (s3://bucket/run, gs://…, a folder elsewhere) that checkpoints are copied to while the run
        goes on. With --resume the run is brought from there where its folder is gone.
    """
    fail_if_locked(out)
    from nextword.commands import api

    result = api.pretrain(
        [*(corpora or []), *(corpus or [])], out, **given_options(run_options), resume=resume, model=given_options(model), training=given_options(training),
        seed=common.seed, device=common.device, tensorboard=tensorboard, mirror=mirror, console=common.console(),
        started=STARTED,
    )  # fmt: skip
    print_result(
        result, common, lambda: format_pretrain_summary(result) + "\nTry it: " + suggest_generate_command(result)
    )


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
    precision: PrecisionOption = "float32",
    common: CommonOptions = CommonOptions(),
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
    from nextword.commands import api
    from nextword.inference.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=common.seed,
    )  # fmt: skip
    loaded = api.load(model, common.device, precision)
    prompts = prompts or [""]
    if len(prompts) == 1 and not common.json:  # one text is shown as it is made
        print(prompts[0], end="", flush=True)
        for text_chunk in loaded.stream(prompts[0], sampling):
            print(text_chunk, end="", flush=True)
        print()
        return
    completions = loaded.generate(prompts, sampling)
    result = {
        "completions": [{"prompt": c.prompt, "text": c.text, "finish_reason": c.finish_reason} for c in completions]
    }
    print_result(result, common, lambda: "\n\n".join(f"{c.prompt}{c.text}" for c in completions))


def evaluate(
    model: Path,
    texts: list[str] | None = None,
    /,
    *,
    suite: Annotated[list[str] | None, Parameter(negative="")] = None,
    limit: int | None = None,
    whole: Flag = False,
    against: Path | None = None,
    noise: Annotated[list[Path] | None, Parameter(negative="")] = None,
    judge: Path | None = None,
    stride: int | None = None,
    context_use: Flag = False,
    text_column: str | None = None,
    precision: PrecisionOption = "float32",
    common: CommonOptions = CommonOptions(),
) -> None:
    """Measure a model: how well it predicts a text, and what it scores on suites of questions, each score beside chance and
    beside the same questions with their words scrambled.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    texts
        Files, folders or named corpora; without any and without a suite, the held-out part of the run's own text.
    suite
        blimp, hellaswag, arc, arc-challenge, lambada, crows-pairs, stereoset, stereoset-discourse, free (texts of its own),
        as NAME=PATH or fetched from the Hub; a declaration of your own, FILE.toml; or lm-eval:TASK. May be given more than
        once.
    limit
        Judge by so many items of each suite, of each of its groups a share; 1,000 where nothing is said.
    whole
        Judge by all items.
    against
        Another model: whether the two really differ, and then which is ahead.
    noise
        Models of the same kind and another seed, so that it is known what the seed alone does to a score. May be given more
        than once.
    judge
        A stronger model that reads what this one writes of its own (--suite free).
    stride
        Tokens from one window over a text to the next. [default: half a window; for the run's own text a whole one]
    context_use
        Tell the loss at each position of the window, on the text and on its words shuffled.
    text_column
        The column of tables that holds the text.
    """
    from nextword.commands import api
    from nextword.commands.evaluate_output import format_evaluation

    result = api.evaluate(
        model, texts or [], suites=suite or [], limit=limit, whole=whole, against=against, noise=noise or [], judge=judge,
        stride=stride, context_use=context_use, text_column=text_column, seed=common.seed, device=common.device,
        precision=precision, console=common.console(),
    )  # fmt: skip
    print_result(result, common, lambda: format_evaluation(result))


def export(
    model: Path,
    /,
    *,
    to: Literal["gguf", "onnx"] = "gguf",
    out: Path | None = None,
    precision: PrecisionOption = "float32",
    tolerance: float = 1e-3,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Write a model as one file for another program: gguf, for llama.cpp and everything that is built on it, or onnx, for ONNX
    Runtime. Where that program's library is installed (llama-cpp-python, onnxruntime), it reads the file back, and no file is
    left that is not the model.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    to
        The format.
    out
        The file. [default: the model's name with the format's ending, beside it]
    tolerance
        How far off a number may be when the file is read back: log-probabilities in nats (gguf), logits (onnx).
    """
    from nextword.commands import api

    written = api.export(model, to, out, precision, tolerance)
    print_result(written.summary, common, lambda: str(written))


def report(runs: list[Path], /, *, out: Path | None = None, common: CommonOptions = CommonOptions()) -> None:
    """Draw the report of a run anew, with all that was measured on it; or set several runs side by side on one page: what they
    reached, how they learned, what differs between their settings, what was measured, and what they write.

    Parameters
    ----------
    runs
        A run folder, or several.
    out
        The page of several runs. [default: comparison.html]
    """
    from nextword.commands import api

    page = str(api.report(list(runs), out))
    print_result({"reports": [page]}, common, lambda: page)


def verify(paths: list[Path], /, *, common: CommonOptions = CommonOptions()) -> None:
    """Check every file of a run, a model or shards against its SHA-256.

    Parameters
    ----------
    paths
        Run folders, model directories or shards.
    """
    from nextword.commands import api

    verified = {directory: kind for path in paths for directory, kind in api.verify(path).items()}
    print_result(
        {"whole": verified},
        common,
        lambda: "\n".join(f"{directory}: {kind}, whole" for directory, kind in verified.items()),
    )
