"""A fine-tuning run from a model and labelled examples to a stock directory with its scores: one loop for every task."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextword.base import OLD_TOKENS, Base, forgetting
from nextword.console import Console
from nextword.errors import MissingExtra, NextwordError, UsageError
from nextword.job import FINISHING_SECONDS, Job, Look
from nextword.model.gpt import GPT, with_head, with_vocabulary
from nextword.model.lora import LoraConfig, add_lora, merge_lora, save_adapter
from nextword.model.stock import load_model
from nextword.prediction import METRIC, Judged, Predictor, baseline_scores
from nextword.recipes import Finetune
from nextword.runs import RunFolder
from nextword.tasks.data import Request, gather, label_weights
from nextword.tasks.encoding import HEADS, Encoded, Encoder, Form, TaskDataset
from nextword.tasks.examples import Example, inputs_of
from nextword.tasks.scores import Score
from nextword.text.batches import seed_for
from nextword.text.chat import save_template
from nextword.text.documents import Problems
from nextword.training import objectives
from nextword.training.objectives import Objective
from nextword.training.pace import Pace

LOOKED_AT = (100, 500)  # held-out examples at each look: at least, at most
WRITTEN_AT = 64  # and how many of those are answered in words, fewer where answers are long
WRITTEN_TOKENS = 4096  # of those answers together
WRITTEN_AT_END = 500
LORA_LR = 3.0  # how many times an adapter's learning rate is that of full weights
LEAST_STEPS = 300  # a fine-tuning of few examples goes over them more often


class Finetuning(Job):
    """From a model to one that does a task. `begin` or `go_on` first, then `train`, then `finish`."""

    rows_differ = True

    def __init__(
        self, run: RunFolder, base: Base, recipe: Finetune, console: Console, device: torch.device, started: float
    ):
        super().__init__(run, console, device, started)
        self.base, self.recipe = base, recipe
        self.judging_seconds = math.inf  # of all that is held out, the fastest so far

    # ------------------------------------------------------------ begin, or go on

    def begin(self, command: list[str], request: dict[str, Any]) -> None:
        seed = request["seed"] or 0
        start = self._read(request)
        self._choose(start.config.d_model)
        data_hash = self._build(start, seed, torch.get_num_threads())
        form, data = self.form, self.task_data
        self.facts = {
            "command": " ".join(command),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "recipe": self.recipe.to_dict(),
            "task": form.to_dict(),
            **self.base.facts(),
            "model": self.model.config.to_dict(),
            "parameters": self.model.config.parameters,
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "training": asdict(self.training),
            "tuning": asdict(self.recipe.tuning),
            "metric": self.metric,
            "seed": seed,
            "data": {
                "fingerprint": data_hash,
                "train": {"examples": len(data.train)},
                "validation": {"examples": len(data.validation)},
                "available": data.available,
                "labels": self.frequent,
                "problems": self.problems.total,
            },
            "fixed": self.placed(),
            **self.common_facts(),
        }

    def go_on(self) -> None:
        self.facts = self.run.facts()
        self.recipe = Finetune.from_dict(self.facts["recipe"])
        if self.facts["base"]["weights"] != self.base.fingerprint():
            raise UsageError(
                f"{self.base.given}: not the model that this run began with. Begin a new run with another --out"
            )
        start = self._read(self.facts["request"])
        fixed = self.facts["fixed"]
        if self._build(start, self.facts["seed"], fixed["threads"]) != self.facts["data"]["fingerprint"]:
            raise UsageError(
                f"{self.run.path}: the examples are not those that this run began with, so going on would mix two runs. "
                "Begin a new one with another --out"
            )
        self.find_checkpoint()

    def _read(self, request: dict[str, Any]) -> GPT:
        """The data, the tokenizer and the encoder; the model as it begins, without what the task adds."""
        model = load_model(self.base.directory, self.device)
        if self.recipe.scratch:
            torch.manual_seed(seed_for(request["seed"] or 0, 3))
            model = GPT(replace(model.config, n_labels=0)).to(self.device)
        self.problems = problems = Problems(strict=bool(request["strict"]))
        asked = Request(
            request["data"], request["task"], request["columns"], request["validation"], request["limit"],
            request["seed"] or 0,
        )  # fmt: skip
        self.task_data = gather(asked, self.base.tokenizer, self.base.form, model.config.context_length, problems)
        self.form = self.task_data.form
        self.tokenizer = self.form.with_markers(self.base.tokenizer)
        encoder = Encoder(self.form, self.tokenizer, model.config.context_length)
        self.encoded: dict[str, list[Encoded]] = {}
        for part in ("train", "validation"):
            examples: list[Example] = getattr(self.task_data, part)
            both = [(example, encoder.encode(example, problems)) for example in examples]
            examples[:] = [example for example, encoded in both if encoded is not None]
            self.encoded[part] = [encoded for _, encoded in both if encoded is not None]
        for line in problems.lines():
            self.console.warn(line)
        if not self.encoded["train"]:
            raise NextwordError("no example is left to learn from")
        return model

    def _choose(self, width: int) -> None:
        """What the recipe leaves open and the data does not decide alone: the learning rate and the batch."""
        recipe, n = self.recipe, len(self.encoded["train"])
        batch = recipe.tuning.batch_examples or min(32, max(4, n // 8))
        if self.form.task == "chat" and recipe.tuning.batch_examples is None:
            batch = min(8, batch)  # rows, which are packed full
        lr = recipe.training.lr or chosen_lr(width, recipe.lora)
        self.recipe = replace(
            recipe, training=replace(recipe.training, lr=lr), tuning=replace(recipe.tuning, batch_examples=batch)
        )

    def _choose_length(self) -> None:
        """As many steps as the epochs take, where the person has not said a length."""
        recipe = self.recipe
        if recipe.steps is None and recipe.budget is None:
            whole = self.data.steps_per_epoch
            epochs = recipe.tuning.epochs or min(30.0, max(3.0, LEAST_STEPS / whole))
            steps = max(1, math.ceil(epochs * whole))
            self.recipe = replace(recipe, steps=steps, tuning=replace(recipe.tuning, epochs=epochs))
        self.steps_wanted, self.budget = self.recipe.steps, self.recipe.budget

    def _build(self, start: GPT, seed: int, threads: int) -> str:
        """Model, data and settings, all of them functions of the base, the data, the recipe and the seed; a fingerprint of the
        data."""
        torch.set_num_threads(threads)
        recipe, form = self.recipe, self.form
        tuning = recipe.tuning
        assert tuning.batch_examples is not None
        self.training = recipe.training
        self.weights, self.frequent = label_weights(form, self.task_data.train, tuning.balance)
        model = with_vocabulary(start, max(start.config.vocab_size, self.tokenizer.vocab_size), seed_for(seed, 7))
        model = with_head(model, form.n_labels, seed_for(seed, 8))
        # A preference is measured against the model as it was, and would be noise beside it under dropout.
        dropout = 0.0 if form.kind == "preference" else tuning.dropout
        model = GPT.from_weights(replace(model.config, dropout=dropout), model.state_dict())
        self.lora = LoraConfig(rank=tuning.rank, alpha=tuning.alpha) if recipe.lora else None
        if self.lora is not None:
            new_rows = model.config.vocab_size - min(start.config.vocab_size, self.base.tokenizer.vocab_size)
            add_lora(model, self.lora, seed_for(seed, 9), trained_rows=new_rows)
        self.predictor = Predictor(model, self.tokenizer, form)
        reference = self.predictor.log_likelihoods(self.encoded["train"]) if form.kind == "preference" else None
        assert self.tokenizer.pad is not None
        self.data: TaskDataset = TaskDataset(
            self.encoded["train"], tuning.batch_examples, seed, pad=self.tokenizer.pad, kind=form.kind,
            weights=self.weights, reference=None if reference is None else reference.astype(np.float32),
            packed=model.config.context_length if form.task == "chat" else None,
        )  # fmt: skip
        self._choose_length()
        self.model = model
        self.settings = self.make_settings(seed)
        self.objective = make_objective(form, recipe)
        self.console.say(self.describe())
        return fingerprint([*self.encoded["train"], *self.encoded["validation"]])

    @property
    def metric(self) -> str:
        """The score that decides which weights are kept: macro-F1 where labels are balanced; a conversation's is its loss."""
        if self.form.task == "chat":
            return "bits_per_byte"
        return "macro_f1" if self.weights is not None else METRIC[self.form.kind]

    def describe(self) -> str:
        form, data, tuning = self.form, self.task_data, self.recipe.tuning
        columns = " · ".join(f"{role}: {column}" for role, column in form.columns)
        lines = [
            f"task {form.task} ({columns}): {len(data.train):,} examples to learn from, {len(data.validation):,} held out",
        ]
        if form.labels:
            shown = ", ".join(f"{name} {self.frequent[name]:,}" if self.frequent else name for name in form.labels[:12])
            lines.append(f"{len(form.labels)} labels: {shown}" + (", …" if len(form.labels) > 12 else ""))
        if self.weights is not None:
            lines.append(
                "labels are unevenly frequent, so rare ones count more and macro-F1 decides (--tuning.balance no)"
            )
        length = f"{self.steps_wanted:,} steps" if self.steps_wanted else f"{self.budget:.0f} s"
        lines.append(
            f"{'LoRA' if self.lora else 'all weights'}{' from scratch' if self.recipe.scratch else ''}: {length} of "
            f"{tuning.batch_examples} {'rows' if form.task == 'chat' else 'examples'}, learning rate {self.training.lr:.2g}"
        )
        return "\n".join(lines)

    # ------------------------------------------------------------ what the loop asks for

    def judge(self, predictor: Predictor, limit: int | None, written: int) -> Judged:
        """Scores on the held-out examples, or on evenly spread ones; the same at each call."""
        examples, encoded = self.task_data.validation, self.encoded["validation"]
        chosen = spread(len(examples), limit)
        if self.form.kind != "answer":
            return predictor.judge([examples[i] for i in chosen], [encoded[i] for i in chosen])
        measured = predictor.judge([examples[i] for i in chosen], [encoded[i] for i in chosen], write=False)
        if self.form.task == "chat" or not written:
            return measured
        some = spread(len(examples), written)
        metrics = ("chrf",) if limit is not None else ("chrf", "bleu", "rouge1", "rouge2", "rougeL")
        told = predictor.judge([examples[i] for i in some], [encoded[i] for i in some], metrics=metrics)
        return replace(measured, scores=told.scores, predictions=told.predictions)

    def look(self, pace: Pace) -> Look | None:
        """Evenly spread held-out examples: as many as cost about a tenth of the steps between two looks."""
        if not self.task_data.validation:
            return None
        trained = pace.decisions[0].total_steps / self.looks(pace) * self.data.per_batch
        limit = max(LOOKED_AT[0], min(LOOKED_AT[1], int(0.3 * trained)))  # an example costs a third of one in training
        written = max(16, min(WRITTEN_AT, WRITTEN_TOKENS // max(1, self.form.answer_tokens)))
        begin = self.now()
        judged = self._judge_if_possible(self.predictor, limit, written)
        seconds = self.now() - begin
        at_end = len(self.task_data.validation) / min(limit, len(self.task_data.validation))
        if judged.scores and self.form.kind == "answer":
            at_end = max(at_end, min(WRITTEN_AT_END, len(self.task_data.validation)) / written)
        self.judging_seconds = min(self.judging_seconds, seconds * at_end)
        record: dict[str, Any] = {"loss": judged.loss, **{name: s.value for name, s in judged.scores.items()}}
        if judged.bits_per_byte is not None:
            record["bits_per_byte"] = judged.bits_per_byte
        known = judged.scores.get(self.metric)
        score = -judged.loss if known is None else known.value
        shown = [f"validation loss {judged.loss:.4f}"]
        shown += [f"{name.replace('_', ' ')} {s.value:.3f}" for name, s in list(judged.scores.items())[:3]]
        if judged.bits_per_byte is not None:
            shown.append(f"{judged.bits_per_byte:.3f} bits/byte of the answers")
        return Look(score, record, ", ".join(shown))

    def finishing_seconds(self) -> float:
        """Scores on all that is held out, the rules beside them, and what was forgotten; never more than a third of the
        budget: a slow moment of the machine must not end a run."""
        judging = 0.0 if math.isinf(self.judging_seconds) else self.judging_seconds
        seconds = FINISHING_SECONDS + judging
        if self.form.kind not in HEADS and self.base.old_text is not None:
            tokens = sum(one.length * len(one.texts) for one in self.encoded["train"]) / self.data.steps_per_epoch
            seconds += 2 * OLD_TOKENS / max(1.0, tokens) * self.seconds_per_step / 3  # a step is three passes
        return min(seconds, (self.budget or math.inf) / 3)

    def _judge_if_possible(self, predictor: Predictor, limit: int | None, written: int) -> Judged:
        """As `judge`; without the package that scores texts, by the loss alone."""
        try:
            return self.judge(predictor, limit, written)
        except MissingExtra as error:
            self.console.warn(f"{error}. Until then the loss decides which weights are kept")
            return self.judge(predictor, limit, written=0)

    def keep(self, facts: dict[str, Any]) -> None:
        """RUN/model, a stock directory with everything merged, and under LoRA RUN/adapter in PEFT's format."""
        form, model = self.form, self.model
        names = form.labels or (("score",) if form.n_labels else None)

        def more(directory: Path) -> None:
            if form.chat:
                save_template(directory)

        self.run.save_model(
            merge_lora(model) if self.lora else model, self.tokenizer, {**facts, "task": form.to_dict()},
            labels=names, problem_type=form.problem_type, more=more,
        )  # fmt: skip
        if self.lora is not None:
            lora = self.lora
            self.run.save_folder(
                self.run.adapter,
                facts,
                lambda aside: save_adapter(model, lora, aside, str(self.base.directory.resolve())),
            )

    def sample(self, step: int) -> None:
        """Let the model answer the first held-out example, where answers are words."""
        if self.form.kind != "answer" or not self.task_data.validation:
            return
        example = self.task_data.validation[0]
        text = self.predictor.write([example])[0]
        prompt = inputs_of(self.form.task, example)[-1]
        self.run.append({"step": step, "sample": {"prompt": f"{prompt}\n→ ", "text": text}})
        self.console.sample(step, f"{prompt} → ", text)

    def documents(self, index: int) -> list[str]:
        examples = [self.task_data.train[i] for i in self.data.examples_of(index)]
        return [f"{example.path} line {example.line}" for example in examples]

    def got_worse(self, step: int, look: Look) -> None:
        """Nothing is said: a look that is not the best is no news, and patience ends what gets no better."""

    # ------------------------------------------------------------ finish

    def finish(self) -> dict[str, Any]:
        """Score the kept weights on all that is held out, beside what needs no model; write result, card and report."""
        model = load_model(self.run.model, self.device)
        predictor = Predictor(model, self.tokenizer, self.form)
        result: dict[str, Any] = {
            "task": self.form.task, "metric": self.metric, "parameters": model.config.parameters,
            "trained_parameters": self.facts["trained_parameters"], "labels": list(self.form.labels),
        }  # fmt: skip
        if self.task_data.validation:
            judged = self._judge_if_possible(predictor, None, WRITTEN_AT_END)
            result |= {"loss": judged.loss, "bits_per_byte": judged.bits_per_byte, "scores": as_dicts(judged.scores)}
            result |= {name: score.value for name, score in judged.scores.items() if name not in result}
            some = self.task_data.validation
            if self.form.kind == "answer":
                some = [some[i] for i in spread(len(some), WRITTEN_AT_END)]
            try:
                found = baseline_scores(self.form, self.task_data.train, some)
            except MissingExtra:  # said already, when the scores were to be made
                found = {}
            result["baselines"] = {name: as_dicts(scores) for name, scores in found.items()}
            if self.form.kind == "preference":
                result["before"] = as_dicts(self.before(predictor.encoder).scores)
        if self.form.kind not in HEADS:
            result["forgetting"] = forgetting(self.base, model)
        return self.conclude(result)

    def before(self, encoder: Encoder) -> Judged:
        """The scores of the model that the run began with."""
        start = load_model(self.base.directory, self.device)
        start = with_vocabulary(start, self.facts["model"]["vocab_size"], seed_for(self.facts["seed"], 7))
        return self.judge(Predictor(with_head(start, 0, 0), self.tokenizer, self.form), None, 0)


def make_objective(form: Form, recipe: Finetune) -> Objective:
    if form.kind in HEADS:
        return objectives.labelled(form.kind, recipe.tuning.auxiliary)
    return objectives.preference(recipe.tuning.beta) if form.kind == "preference" else objectives.answer


def chosen_lr(width: int, lora: bool) -> float:
    """GPT-1's 6.25e-5 at its width of 768 (Radford et al. 2018, section 4.1), 1.5e-3 at 128 (the best of four on two data
    sets), and a straight line between them on logarithmic axes. An adapter takes more."""
    lr = 6.25e-5 * (768 / width) ** (math.log(24) / math.log(6))
    return min(1.5e-3, lr) * (LORA_LR if lora else 1)


def spread(count: int, limit: int | None) -> list[int]:
    """All of `count` places, or the middle one of each of `limit` equal parts."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def fingerprint(examples: Sequence[Encoded]) -> str:
    """A hash of all tokens and golds, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for text in example.texts:
            digest.update(text.ids.astype("<i8").tobytes() + text.learned.tobytes() + b"\0")
        digest.update(repr(np.asarray(example.gold).tolist()).encode())
    return digest.hexdigest()


def as_dicts(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}
