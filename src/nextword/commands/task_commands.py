"""The verbs about tasks: fine-tune, ask, talk, and measure what pre-training is worth."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nextword import STARTED
from nextword.commands.options import (
    CommonOptions,
    Flag,
    PrecisionOption,
    TaskOptions,
    TrainingGroup,
    TrainingOptions,
    TuningGroup,
    TuningOptions,
    format_finetune_summary,
    format_transfer_summary,
    given_options,
    print_result,
)
from nextword.common.run_lock import fail_if_locked


def finetune(
    model: Path | None = None,
    data: list[str] | None = None,
    /,
    *,
    out: Path,
    task_options: TaskOptions = TaskOptions(),
    scratch: Flag = False,
    limit: int | None = None,
    epochs: float | None = None,
    budget: str | None = None,
    steps: int | None = None,
    resume: Flag = False,
    strict: Flag = False,
    tensorboard: Flag = False,
    mirror: str | None = None,
    training: TrainingGroup = TrainingOptions(),  # pyright: ignore[reportInvalidTypeForm]
    tuning: TuningGroup = TuningOptions(),  # pyright: ignore[reportInvalidTypeForm]
    common: CommonOptions = CommonOptions(),
) -> None:
    """Adapt a model to a task by labelled examples, and score it beside what needs no model.

    The tasks: classify (one label, or several) · entail (premise, hypothesis) · similarity (two sentences, a score or a
    label) · choose (multiple choice) · rewrite (text in, text out) · chat (conversations, instructions) · prefer (chosen and
    rejected answers) · continue (more text of one's own domain).

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    data
        Tables of examples: .csv .tsv .jsonl .json .parquet, plain, .gz or .zst; for continue, text.
    out
        The run folder: the model, its scores and its report.
    scratch
        Begin with fresh weights of the same shape, to see what pre-training is worth.
    limit
        Learn from so many of the examples.
    epochs
        Times over the examples; where not given, three for many and more for few.
    budget
        Wall time of the whole run instead.
    steps
        Train so many steps instead.
    resume
        Go on exactly where the run stood; begin where there is none yet.
    strict
        Stop at the first thing that is wrong in the data, instead of telling and going on.
    tensorboard
        Write the curves for TensorBoard too, to RUN/tensorboard.
    mirror
        A place beyond this machine (s3://bucket/run, gs://…, a folder elsewhere) that checkpoints are copied to while the run
        goes on. With --resume the run is brought from there where its folder is gone.
    """
    fail_if_locked(out)
    from nextword.commands import api

    tuning_settings = given_options(tuning) | ({} if epochs is None else {"epochs": epochs})
    result = api.finetune(
        model or "", data or [], out, **task_options.to_kwargs(), scratch=scratch, limit=limit, budget=budget, steps=steps,
        resume=resume, training=given_options(training), tuning=tuning_settings, strict=strict, seed=common.seed, device=common.device,
        tensorboard=tensorboard, mirror=mirror, console=common.console(), started=STARTED,
    )  # fmt: skip
    print_result(result, common, lambda: format_finetune_summary(result))


def transfer(
    model: Path,
    data: list[str],
    /,
    *,
    out: Path,
    task_options: TaskOptions = TaskOptions(),
    counts: Annotated[list[int] | None, Parameter(negative="")] = None,
    seeds: int = 3,
    resume: Flag = False,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Measure what pre-training is worth on a task: the model fine-tuned and trained from scratch, by number of labels.

    Parameters
    ----------
    model
        A run folder or a model directory.
    data
        Tables of examples, as nextword finetune takes them.
    out
        The folder for the figures and their page; --resume goes on where it stood.
    counts
        Numbers of examples to learn from, beside all of them; may be given more than once. [default: 32 128 512 2048]
    seeds
        Runs of each kind.
    resume
        Go on where it stood; begin where there is nothing yet.
    """
    from nextword.commands import api

    result = api.transfer(
        model, data, out, **task_options.to_kwargs(), counts=counts, seeds=seeds, resume=resume, device=common.device,
        console=common.console(),
    )  # fmt: skip
    print_result(result, common, lambda: format_transfer_summary(result))


def predict(
    model: Path,
    inputs: list[str],
    /,
    *,
    out: Path | None = None,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Ask a fine-tuned model: a label, a score, a choice or a text for each example, one JSON object a line.

    Parameters
    ----------
    model
        A run folder or a model directory that was fine-tuned.
    inputs
        A table of examples, or the texts of one example: a text; a premise and a hypothesis; a question and its choices.
        Where a table says what is right, the answers are scored as well.
    out
        A file for the answers; standard output where not given.
    """
    from nextword.commands import api
    from nextword.common.fs import atomic_write

    examples = Path(inputs[0]) if len(inputs) == 1 and Path(inputs[0]).is_file() else inputs
    answers, metrics = api.predict(model, examples, device=common.device, console=common.console())
    scores = {name: score.to_dict() for name, score in metrics.items()}
    lines = "".join(json_module.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is not None:
        atomic_write(out, lines)
    score_text = "\n".join(f"{name.replace('_', ' ')} {in_words(score)}" for name, score in scores.items())
    if common.json:
        result = {"predictions": answers if out is None else str(out), "scores": scores}
        print(json_module.dumps(result, ensure_ascii=False))
    elif out is None:
        print(lines, end="")
        print(score_text, end="\n" if score_text else "", file=sys.stderr)
    else:
        print("\n".join(filter(None, [f"{len(answers):,} answers: {out}", score_text])))


def chat(
    model: Path,
    /,
    *,
    system: str | None = None,
    max_tokens: int = 200,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    precision: PrecisionOption = "float32",
    common: CommonOptions = CommonOptions(),
) -> None:
    """Talk with a model that was fine-tuned on conversations. /help shows the commands, Ctrl-D leaves.

    Parameters
    ----------
    model
        A run folder or a model directory from nextword finetune --task chat.
    system
        What the model is told before the conversation.
    max_tokens
        How long an answer may be.
    temperature
        0 always takes the likeliest token; higher is bolder.
    top_k
        Draw from the k likeliest tokens only.
    top_p
        Draw from the fewest tokens that have this probability together.
    """
    from nextword.commands import api, chat
    from nextword.inference.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=common.seed
    )  # fmt: skip
    loaded = api.load(model, common.device, precision)
    stream = sys.stderr if common.json else sys.stdout
    messages = chat.chat(
        loaded.gpt, loaded.tokenizer, sampling, runner=loaded.runner, read_line=chat.make_terminal_reader(), system=system,
        write_text=lambda text: print(text, end="", flush=True, file=stream),
        greeting=None if common.quiet else chat.GREETING,
    )  # fmt: skip
    if common.json:
        print(json_module.dumps({"messages": messages}, ensure_ascii=False))
