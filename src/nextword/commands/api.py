"""Every verb as a short story. What the command line does, a program does here by the same names."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nextword.audit.audit import AuditConfig, audit_model
from nextword.commands.arguments import (
    drop_none,
    format_corpus_summary,
    open_or_prepare_corpus,
    parse_run_length,
    resolve_corpus_paths,
    resolve_data_paths,
    resolve_recipe,
)
from nextword.commands.continued_pretraining import ContinuedPretrainTrainer
from nextword.commands.finetune import FinetuneTrainer
from nextword.commands.pretrain import PretrainTrainer
from nextword.common import fs
from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.common.run_dir import RunDir, command_line, resolve_device
from nextword.data import prepare as preparation
from nextword.data.corpus import Corpus
from nextword.data.documents import IssueLog
from nextword.evaluation.lm_eval_adapter import run_lm_eval_task
from nextword.evaluation.results_store import check_results_readable, save_results_to_run
from nextword.evaluation.significance import DEFAULT_ITEM_LIMIT, EvalModels, evaluate_benchmark
from nextword.evaluation.text_evaluation import evaluate_text, load_eval_text
from nextword.export.gguf import write_gguf
from nextword.export.onnx import write_onnx
from nextword.export.verification import TOLERANCE, ExportResult
from nextword.inference.engine import Completion
from nextword.inference.quantization import Precision
from nextword.interpretability.explain import explain as explain_text
from nextword.pipeline.base_model import BaseModel
from nextword.pipeline.language_model import Paths, as_list, load
from nextword.pipeline.predictor import compute_labelled_metrics
from nextword.planning.planner import estimate_cluster_run, plan_run
from nextword.reporting.explain_page import write_explanation_page
from nextword.tasks.benchmark_spec import find_benchmarks
from nextword.tasks.examples import read_examples
from nextword.tasks.metrics import Score
from nextword.training import config
from nextword.training.config import parse_duration, with_overrides
from nextword.training.launch import run_training
from nextword.training.trainer import Trainer

# ---------------------------------------------------------------- verbs


def prepare(
    corpora: Paths,
    out: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    text_column: str | None = None,
    strict: bool = False,
    shard: str | None = None,
    engine: Literal["local", "ray"] = "local",
    console: Console | None = None,
) -> Corpus:
    """Turn text into shards of tokens that any number of runs can share; with `shard` ("3/64") together with other processes,
    which are given the same and other numbers, and each of which returns when all is there. With the engine "ray" the processes
    are those of a Ray cluster."""
    settings = {"tokenizer": tokenizer, "vocab_size": vocab_size, "text_column": text_column, "strict": strict}
    with console or Console(quiet=True) as console:
        if engine == "ray":
            if shard is not None:
                raise UsageError("--shard and --engine ray exclude each other: Ray gives each process its part")
            from nextword.data.ray_prepare import prepare_on_ray

            return prepare_on_ray(
                resolve_corpus_paths(corpora, run_exists=False), Path(out).resolve(), settings, console
            )
        return preparation.prepare(
            as_list(corpora), Path(out), shard, **settings, progress=console.progress, log=console.info
        )


def plan(
    corpora: Paths = (),
    *,
    recipe: str | None = None,
    preset: str | None = None,
    size: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    budget: str | float | None = None,
    steps: int | None = None,
    tokens: str | int | None = None,
    flops: str | float | None = None,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    text_column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    gpu: str | None = None,
    machines: int = 1,
    gpus_per_machine: int = 8,
    parameters: str | None = None,
    price: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """What `pretrain` would make of these texts in this time (or tokens, or operations) on this machine: size, tokens, memory,
    energy, and the bits per byte to expect, with an interval. Nothing is written.

    With `gpu` ("h100"), and without texts: what a run would need and give on `machines` that are not here, on paper; of about
    so many `parameters` ("7B"), at a `price` of a GPU hour.
    """
    request = {
        "recipe": recipe, "preset": preset, "size": size, "tokenizer": tokenizer, "vocab_size": vocab_size,
        **parse_run_length(budget, steps, tokens, flops), "model": model, "training": training,
    }  # fmt: skip
    if gpu is not None:
        if as_list(corpora):
            raise UsageError("--gpu plans on paper, without a text: leave the text out, and say --tokens")
        return estimate_cluster_run(
            resolve_recipe(request), gpu, machines=machines, gpus_per_machine=gpus_per_machine, parameters=parameters,
            price_per_gpu_hour=price,
        )  # fmt: skip
    paths = resolve_corpus_paths(corpora, run_exists=False)
    with console or Console(quiet=True) as console:
        return plan_run(
            paths, resolve_recipe(request), resolve_device(device), text_column=text_column, strict=strict, console=console
        )  # fmt: skip


def pretrain(
    corpora: Paths = (),
    out: str | Path = "",
    *,
    recipe: str | None = None,
    preset: str | None = None,
    size: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    budget: str | float | None = None,
    steps: int | None = None,
    tokens: str | int | None = None,
    flops: str | float | None = None,
    resume: bool = False,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    text_column: str | None = None,
    strict: bool = False,
    seed: int | None = None,
    device: str = "auto",
    tensorboard: bool = False,
    mirror: str | None = None,
    console: Console | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Train a GPT on text, from nothing to a stock model directory with a report; the result as a dictionary.

    `corpora` are files, folders, named corpora, or shards that `prepare` made. With `resume` a run goes on exactly where it
    stood, begins where there is none yet, and is content where it is finished; settings given then must be the run's own.
    `strict` stops at what is wrong in the text, and at a damaged newest checkpoint, where else the one before it is used.
    `mirror` is a place beyond this machine ("s3://…") that checkpoints are copied to, and where a resume finds the run when the
    folder is gone.
    """
    started = time.time() if started is None else started
    if not str(out):
        raise UsageError("say where the run folder is to be: --out RUN")
    request = {
        "corpora": resolve_corpus_paths(corpora, run_exists=RunDir(Path(out)).exists), "recipe": recipe, "preset": preset, "size": size,
        "tokenizer": tokenizer, "vocab_size": vocab_size, "text_column": text_column, "seed": seed,
        **parse_run_length(budget, steps, tokens, flops), "model": drop_none(model), "training": drop_none(training),
    }  # fmt: skip
    chosen = resolve_recipe(request)
    torch_device = resolve_device(device)

    def build_trainer(run: RunDir, request: dict[str, Any], console: Console) -> PretrainTrainer:
        if run.exists:
            corpus = Corpus.open(run.path / run.metadata()["shards"])
        else:
            corpus = open_or_prepare_corpus(
                request["corpora"], run, chosen.tokenizer, chosen.vocab_size, text_column, strict, console
            )
            console.info(format_corpus_summary(corpus))
        pretraining = PretrainTrainer(run, corpus, chosen, console, torch_device, started)
        pretraining.fail_on_corrupt_checkpoint = strict
        return pretraining

    return run_training(
        build_trainer, Path(out), request, resume=resume, tensorboard=tensorboard, console=console, mirror_url=mirror
    )


def finetune(
    model: str | Path = "",
    data: Paths = (),
    out: str | Path = "",
    *,
    task: str | None = None,
    validation: Paths = (),
    columns: dict[str, str] | None = None,
    lora: bool = False,
    scratch: bool = False,
    limit: int | None = None,
    budget: str | float | None = None,
    steps: int | None = None,
    resume: bool = False,
    training: dict[str, Any] | None = None,
    tuning: dict[str, Any] | None = None,
    strict: bool = False,
    seed: int | None = None,
    device: str = "auto",
    tensorboard: bool = False,
    mirror: str | None = None,
    console: Console | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Adapt a model to a task by labelled examples; the result, with the task's scores, as a dictionary.

    `data` and `validation` are tables; `task` is guessed from their columns, which `columns` may name by hand ({role:
    column}). A tenth is held out where no validation is given. `lora` trains an adapter alone; `scratch` begins with fresh
    weights, for comparison; `limit` learns from so many of the examples. With `resume` as `pretrain`.
    """
    started = time.time() if started is None else started
    if not str(out):
        raise UsageError("say where the run folder is to be: --out RUN")
    run_exists = RunDir(Path(out)).exists
    if not str(model) and not run_exists:
        raise UsageError("say which model to begin with: nextword finetune MODEL DATA --out RUN")
    request = {
        "model": str(Path(model).resolve()) if str(model) else None, "data": resolve_data_paths(data, run_exists), "task": task,
        "validation": resolve_data_paths(validation, True), "columns": columns or None, "lora": lora or None,
        "scratch": scratch or None, "limit": limit, "seed": seed, "strict": strict or None, "steps": steps,
        "budget": None if budget is None else parse_duration(budget),
        "training": drop_none(training), "tuning": drop_none(tuning),
    }  # fmt: skip
    torch_device = resolve_device(device)

    def build_trainer(run: RunDir, request: dict[str, Any], console: Console) -> Trainer:
        return build_finetune_trainer(run, request, console, torch_device, started)

    return run_training(
        build_trainer, Path(out), request, resume=resume, tensorboard=tensorboard, console=console, mirror_url=mirror
    )


def build_finetune_trainer(
    run_dir: RunDir, request: dict[str, Any], console: Console, device: torch.device, start_time: float
) -> FinetuneTrainer | ContinuedPretrainTrainer:
    """The run that a request asks for: more text to go on with, or labelled examples of a task."""
    base_model = BaseModel.open(Path(request["model"]))
    settings = {name: request[name] for name in ("steps", "budget", "training")}
    task = request["task"] or read_examples(request["data"], None, IssueLog(), request["columns"]).task
    if task != "continue":
        recipe = config.build_finetune_config(
            task=task, lora=request["lora"], scratch=request["scratch"], tuning=request["tuning"], **settings
        )
        return FinetuneTrainer(run_dir, base_model, recipe, console, device, start_time)
    for name in ("lora", "scratch", "limit", "validation"):
        if request[name]:
            raise UsageError(f"--{name} is not for --task continue, which goes on with pre-training")
    tuning = request["tuning"]
    if unknown := set(tuning) - {"dropout"}:
        raise UsageError(f"--tuning.{min(unknown).replace('_', '-')} is not for --task continue")
    recipe = with_overrides(config.continued_pretrain(), model=tuning, tokens=None, **settings)
    if (run_dir.data_dir / fs.MANIFEST).is_file():
        corpus = Corpus.open(run_dir.data_dir)
    else:
        column = (request["columns"] or {}).get("text")
        corpus = open_or_prepare_corpus(
            request["data"], run_dir, str(base_model.directory), None, column, bool(request["strict"]), console
        )  # fmt: skip
    console.info(f"task continue: {format_corpus_summary(corpus)}")
    return ContinuedPretrainTrainer(run_dir, base_model, corpus, recipe, console, device, start_time)


def transfer(
    model: str | Path,
    data: Paths,
    out: str | Path,
    *,
    counts: Sequence[int] | None = None,
    seeds: int = 3,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What pre-training is worth on a task: a model fine-tuned and trained from scratch on 32, 128, 512, 2,048 and all
    examples, several seeds each; points with their intervals, and one sentence. `settings` are `finetune`'s."""
    if seeds < 1 or any(count < 1 for count in counts or ()):
        raise UsageError("--seeds and --counts must be at least 1")
    finetune_options = {name: value for name, value in settings.items() if value not in (None, (), [], {}, False)}
    request = {
        "model": str(Path(model).resolve()), "data": resolve_data_paths(data, False), "seeds": seeds,
        "counts": sorted(counts) if counts else None,
        "settings": {name: resolve_data_paths(v, True) if name == "validation" else v for name, v in finetune_options.items()},
    }  # fmt: skip
    resolve_device(device)
    from nextword.evaluation.label_efficiency import run_study  # what draws takes half a second to import

    def run_finetune(**cell: Any) -> dict[str, Any]:
        return finetune(model, data, device=device, **finetune_options, **cell)

    with console or Console(quiet=True) as console:
        return run_study(run_finetune, Path(out), request, command_line(), resume=resume, console=console)


def predict(
    model: str | Path,
    data: str | Path | Sequence[str],
    *,
    device: str = "auto",
    console: Console | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Score]]:
    """Answers of a fine-tuned model to the examples in a file, and their scores where the file has the gold as well.

    `data` may also be the texts of one example.
    """
    with console or Console(quiet=True) as console:
        loaded = load(model, device)
        if not isinstance(data, (str, Path)):
            return [loaded.predict(*data)], {}
        predictor, problems = loaded.predictor, IssueLog()
        task_spec = predictor.task_spec
        items = read_examples([data], task_spec.task, problems, dict(task_spec.columns), gold=False).items
        if not items:
            raise NextwordError("\n".join([f"{data}: no example to answer", *problems.summary_lines()]))
        answers = predictor.predict(items, problems, lambda i, n: console.progress("predicting", i, n))
        for line in problems.summary_lines():
            console.warn(line)
        return answers, compute_labelled_metrics(task_spec, items, answers)


def generate(
    model: str | Path,
    prompts: str | Sequence[str],
    *,
    device: str = "auto",
    precision: Precision = "float32",
    **settings: Any,
) -> list[Completion]:
    """Continue prompts with the model at a path."""
    return load(model, device, precision).generate(prompts, **settings)


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    insecure: bool = False,
    allowed_hosts: Sequence[str] = (),
    grace: float = 30.0,
    console: Console | None = None,
    ready: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> None:
    """Serve a model over HTTP, by OpenAI's API and a page, until a signal comes. `ready` is told where, as soon as requests
    are let in. `settings` are those of `serving.service.Settings`: device, precision, name, max_batch, queue, deterministic,
    seed.

    Raises:
        MissingExtra: FastAPI or uvicorn is not installed.
        UsageError: anybody could connect, and neither a key nor `insecure` was given.
    """
    try:
        from nextword.serving.app import ListenConfig, serve_model
        from nextword.serving.service import ServiceConfig
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nextword"):
            raise
        raise MissingDependencyError("nextword serve", "serve") from error
    listen_config = ListenConfig(host, port, api_key, insecure, tuple(allowed_hosts), grace)
    with console or Console(quiet=True) as console:
        serve_model(ServiceConfig(Path(model), **settings), listen_config, console, ready)


def evaluate(
    model: str | Path,
    texts: Paths = (),
    *,
    suites: Sequence[str] = (),
    limit: int | None = None,
    whole: bool = False,
    against: str | Path | None = None,
    noise: Sequence[str | Path] = (),
    judge: str | Path | None = None,
    stride: int | None = None,
    context_use: bool = False,
    text_column: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    console: Console | None = None,
) -> dict[str, Any]:
    """How well a model predicts texts, and what it scores on suites of questions; without either, how well it predicts the
    whole validation part of its own run. The result is that of `nextword evaluate --json`.

    `suites` are NAME, NAME=PATH, a declaration's path or lm-eval:TASK, judged by `limit` items each (1,000) or the `whole`.
    `against` is a model to be compared with, `noise` others that the seed alone tells apart from this one, `judge` a
    stronger one that reads what the model writes of its own. `stride` is that of the windows over a text: half a window,
    and over the run's own validation part a whole one, as in training; `context_use` tells the loss by position besides.
    """
    if limit is not None and (limit < 1 or whole):
        raise UsageError("--limit must be at least 1, and does not go together with --whole")
    benchmarks = find_benchmarks(suites)
    check_results_readable(model)
    with console or Console(quiet=True) as console:
        models = EvalModels(
            load(model, device, precision),
            None if against is None else load(against, device, precision),
            [load(one, device, precision) for one in noise],
            None if judge is None else load(judge, device),
        )
        result: dict[str, Any] = {}
        if as_list(texts) or not benchmarks:
            eval_text, stride = load_eval_text(models, model, texts, text_column, stride, console)
            result |= evaluate_text(models, eval_text, stride=stride, with_context_use=context_use, console=console)
        max_items = None if whole else limit or DEFAULT_ITEM_LIMIT
        for name, suite in benchmarks.items():
            suite_results = result.setdefault("suites", {})
            if suite is None:
                suite_results[name] = run_lm_eval_task(models.model, name.removeprefix("lm-eval:"), max_items, console)
            else:
                suite_results[name] = evaluate_benchmark(
                    models, suite, limit=max_items, seed=seed or 0, console=console
                )
        run_settings = {
            "precision": None if precision == "float32" else precision,
            "against": against and Path(against).name,
        }
        save_results_to_run(
            model,
            result,
            texts,
            console,
            text_settings={"stride": stride, **run_settings},
            benchmark_settings={"seed": seed, **run_settings},
        )
        return result


def audit(
    model: str | Path, *, corpus: Paths = (), device: str = "auto", console: Console | None = None, **settings: Any
) -> dict[str, Any]:
    """Look at a model before others use it: whom it favours, what of its text it knows by heart, what that text holds, and what
    the run took. The result is that of `nextword audit --json`; of a run it is kept as RUN/measured/audit.json.

    `corpus` is what the model was trained on; of a run its own where it is still there. `settings` are those of
    `auditing.audit.Asked`: templates, suites, data, group, passages, index, texts, prefixes, limit, price, intensity, seed.
    """
    audit_config = AuditConfig(corpora=tuple(resolve_corpus_paths(corpus, run_exists=True)), **settings)
    with console or Console(quiet=True) as console:
        return audit_model(Path(model), audit_config, device=device, console=console)


def explain(
    model: str | Path, texts: str | Sequence[str], *, word: str | None = None, label: str | None = None,
    out: str | Path | None = None, device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """What happens inside a model as it reads a text (or an example of its task): see `explaining.explain.explain`. With `out`
    it is written as a page as well."""
    explanation = explain_text(
        load(model, device), [texts] if isinstance(texts, str) else list(texts), word=word, label=label
    )
    return explanation if out is None else {**explanation, "page": str(write_explanation_page(explanation, Path(out)))}


def export(
    model: str | Path,
    to: Literal["gguf", "onnx"] = "gguf",
    out: str | Path | None = None,
    precision: Precision = "float32",
    tolerance: float = TOLERANCE,
) -> ExportResult:
    """Write a model as one file for other programs, by default `MODEL.gguf` or `MODEL.onnx` beside the run or the directory.
    It is read back by the program that it is for where that is installed (llama-cpp-python, onnxruntime), and no number may be
    further off than `tolerance` (of log-probabilities in nats, of logits).

    Raises:
        UsageError: there is no such format, or it has no such precision.
        NextwordError: the format cannot hold this model or its tokenizer, or the file read back is not the model.
    """
    path = Path(model).resolve()
    out = Path(out) if out else path.with_name(f"{path.name}.{to}")
    if to == "gguf":
        return write_gguf(model, out, precision, tolerance)
    if to != "onnx":
        raise UsageError(f"there is no format {to!r}, only gguf and onnx")
    if precision != "float32":
        raise UsageError(
            f"ONNX is written in float32, not {precision}: ONNX Runtime has tools of its own for fewer bits"
        )
    return write_onnx(model, out, tolerance)


def report(runs: Paths, out: str | Path | None = None) -> Path:
    """Write RUN/report.html and the model card anew from what the run folder holds, measurements included; of several runs a
    page that sets them side by side, `comparison.html` where `out` says nothing else."""
    from nextword.reporting.comparison import write_comparison  # what draws takes half a second to import
    from nextword.reporting.report import regenerate

    folders = [Path(run) for run in as_list(runs)]
    if len(folders) > 1:
        return write_comparison(folders, Path(out or "comparison.html"))
    if out is not None:
        raise UsageError(f"--out is for the page of several runs; that of one is {folders[0] / 'report.html'}")
    return regenerate(folders[0])


def verify(path: str | Path) -> dict[str, str]:
    """Check every file of a run, a model or shards against its SHA-256; each directory that is whole, and what it is.

    Raises:
        CorruptFile: with every damaged file by name.
    """
    return fs.verify_tree(Path(path))
