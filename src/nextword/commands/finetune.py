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

from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.common.run_dir import RunDir
from nextword.data.chat_format import save_chat_template
from nextword.data.dataset import derive_seed
from nextword.data.issues import IssueLog
from nextword.model.gpt import GPT, with_classification_head, with_resized_vocabulary
from nextword.model.hf import load_model
from nextword.model.lora import LoraConfig, add_lora, merge_lora, save_adapter
from nextword.pipeline.base_model import FORGETTING_TOKENS, BaseModel, evaluate_forgetting
from nextword.pipeline.predictor import SELECTION_METRIC, EvaluationResult, Predictor, baseline_scores
from nextword.tasks.dataset import HEAD_KINDS, EncodedExample, ExampleEncoder, TaskDataset, TaskSpec
from nextword.tasks.examples import Example, input_texts
from nextword.tasks.metrics import Score
from nextword.tasks.task_data import DataRequest, compute_sample_weights, load_task_data
from nextword.training import losses
from nextword.training.config import FinetuneRecipe
from nextword.training.losses import LossFn
from nextword.training.step_budget import StepSchedule
from nextword.training.trainer import FINALIZE_SECONDS, Trainer, ValidationResult

EVAL_EXAMPLES = (100, 500)  # held-out examples at each look: at least, at most
GENERATED_EVAL_EXAMPLES = 64  # and how many of those are answered in words, fewer where answers are long
GENERATED_EVAL_TOKENS = 4096  # of those answers together
FINAL_GENERATED_EXAMPLES = 500
LORA_LR_MULTIPLIER = 3.0  # how many times an adapter's learning rate is that of full weights
MIN_STEPS = 300  # a fine-tuning of few examples goes over them more often


class FinetuneTrainer(Trainer):
    """From a model to one that does a task. `begin` or `go_on` first, then `train`, then `finish`."""

    dynamic_shapes = True

    def __init__(
        self,
        run_dir: RunDir,
        base_model: BaseModel,
        config: FinetuneRecipe,
        console: Console,
        device: torch.device,
        start_time: float,
    ):
        super().__init__(run_dir, console, device, start_time)
        self.base_model, self.config = base_model, config
        self.evaluation_seconds = math.inf  # of all that is held out, the fastest so far

    # ------------------------------------------------------------ begin, or go on

    def initialize(self, command: list[str], request: dict[str, Any]) -> None:
        seed = request["seed"] or 0
        base = self._load_data(request)
        self._resolve_hyperparameters(base.config.d_model)
        data_hash = self._build(base, seed, torch.get_num_threads())
        task_spec, data = self.task_spec, self.task_data
        self.run_metadata = {
            "command": " ".join(command),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "recipe": self.config.to_dict(),
            "task": task_spec.to_dict(),
            **self.base_model.metadata(),
            "model": self.model.config.to_dict(),
            "parameters": self.model.config.parameters,
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "training": asdict(self.training),
            "tuning": asdict(self.config.tuning),
            "metric": self.metric,
            "seed": seed,
            "data": {
                "fingerprint": data_hash,
                "train": {"examples": len(data.train)},
                "validation": {"examples": len(data.validation)},
                "available": data.num_available,
                "labels": self.label_counts,
                "problems": self.issue_log.total,
            },
            "fixed": self.reproducibility_metadata(),
            **self.environment_metadata(),
        }

    def resume(self) -> None:
        self.run_metadata = self.run_dir.metadata()
        self.config = FinetuneRecipe.from_dict(self.run_metadata["recipe"])
        if self.run_metadata["base"]["weights"] != self.base_model.fingerprint():
            raise UsageError(
                f"{self.base_model.source_path}: not the model that this run began with. Begin a new run with another --out"
            )
        base = self._load_data(self.run_metadata["request"])
        fixed = self.run_metadata["fixed"]
        if self._build(base, self.run_metadata["seed"], fixed["threads"]) != self.run_metadata["data"]["fingerprint"]:
            raise UsageError(
                f"{self.run_dir.path}: the examples are not those that this run began with, so going on would mix two runs. "
                "Begin a new one with another --out"
            )
        self.select_checkpoint()

    def _load_data(self, request: dict[str, Any]) -> GPT:
        """The data, the tokenizer and the encoder; the model as it begins, without what the task adds."""
        model = load_model(self.base_model.directory, self.device)
        if self.config.scratch:
            torch.manual_seed(derive_seed(request["seed"] or 0, 3))
            model = GPT(replace(model.config, n_labels=0)).to(self.device)
        self.issue_log = issue_log = IssueLog(strict=bool(request["strict"]))
        data_request = DataRequest(
            request["data"], request["task"], request["columns"], request["validation"], request["limit"],
            request["seed"] or 0,
        )  # fmt: skip
        self.task_data = load_task_data(
            data_request, self.base_model.tokenizer, self.base_model.task_spec, model.config.context_length, issue_log
        )
        self.task_spec = self.task_data.task_spec
        self.tokenizer = self.task_spec.with_special_tokens(self.base_model.tokenizer)
        encoder = ExampleEncoder(self.task_spec, self.tokenizer, model.config.context_length)
        self.encoded_examples: dict[str, list[EncodedExample]] = {}
        for split in ("train", "validation"):
            examples: list[Example] = getattr(self.task_data, split)
            pairs = [(example, encoder.encode(example, issue_log)) for example in examples]
            examples[:] = [example for example, encoded in pairs if encoded is not None]
            self.encoded_examples[split] = [encoded for _, encoded in pairs if encoded is not None]
        for line in issue_log.summary_lines():
            self.console.warn(line)
        if not self.encoded_examples["train"]:
            raise NextwordError("no example is left to learn from")
        return model

    def _resolve_hyperparameters(self, d_model: int) -> None:
        """What the recipe leaves open and the data does not decide alone: the learning rate and the batch."""
        recipe, num_examples = self.config, len(self.encoded_examples["train"])
        batch_size = recipe.tuning.batch_examples or min(32, max(4, num_examples // 8))
        if self.task_spec.task == "chat" and recipe.tuning.batch_examples is None:
            batch_size = min(8, batch_size)  # rows, which are packed full
        lr = recipe.training.lr or default_lr(d_model, recipe.lora)
        self.config = replace(
            recipe, training=replace(recipe.training, lr=lr), tuning=replace(recipe.tuning, batch_examples=batch_size)
        )

    def _resolve_run_length(self) -> None:
        """As many steps as the epochs take, where the person has not said a length."""
        recipe = self.config
        if recipe.steps is None and recipe.budget is None:
            steps_per_epoch = self.dataset.steps_per_epoch
            epochs = recipe.tuning.epochs or min(30.0, max(3.0, MIN_STEPS / steps_per_epoch))
            steps = max(1, math.ceil(epochs * steps_per_epoch))
            self.config = replace(recipe, steps=steps, tuning=replace(recipe.tuning, epochs=epochs))
        self.target_steps, self.budget_seconds = self.config.steps, self.config.budget

    def _build(self, base: GPT, seed: int, num_threads: int) -> str:
        """Model, data and settings, all of them functions of the base, the data, the recipe and the seed; a fingerprint of the
        data."""
        torch.set_num_threads(num_threads)
        recipe, task_spec = self.config, self.task_spec
        tuning = recipe.tuning
        assert tuning.batch_examples is not None
        self.training = recipe.training
        self.example_weights, self.label_counts = compute_sample_weights(
            task_spec, self.task_data.train, tuning.balance
        )
        model = with_resized_vocabulary(
            base, max(base.config.vocab_size, self.tokenizer.vocab_size), derive_seed(seed, 7)
        )
        model = with_classification_head(model, task_spec.n_labels, derive_seed(seed, 8))
        # A preference is measured against the model as it was, and would be noise beside it under dropout.
        dropout = 0.0 if task_spec.kind == "preference" else tuning.dropout
        model = GPT.from_weights(replace(model.config, dropout=dropout), model.state_dict())
        self.lora_config = LoraConfig(rank=tuning.rank, alpha=tuning.alpha) if recipe.lora else None
        if self.lora_config is not None:
            num_new_tokens = model.config.vocab_size - min(base.config.vocab_size, self.base_model.tokenizer.vocab_size)
            add_lora(model, self.lora_config, derive_seed(seed, 9), num_trainable_rows=num_new_tokens)
        self.predictor = Predictor(model, self.tokenizer, task_spec)
        reference_logprobs = (
            self.predictor.log_likelihoods(self.encoded_examples["train"]) if task_spec.kind == "preference" else None
        )
        assert self.tokenizer.pad_id is not None
        self.dataset: TaskDataset = TaskDataset(
            self.encoded_examples["train"], tuning.batch_examples, seed, pad_token_id=self.tokenizer.pad_id, kind=task_spec.kind,
            sample_weights=self.example_weights, reference_logprobs=None if reference_logprobs is None else reference_logprobs.astype(np.float32),
            pack_length=model.config.context_length if task_spec.task == "chat" else None,
        )  # fmt: skip
        self._resolve_run_length()
        self.model = model
        self.step_settings = self.build_step_settings(seed)
        self.loss_fn = build_loss_fn(task_spec, recipe)
        self.console.info(self.summary())
        return fingerprint_examples([*self.encoded_examples["train"], *self.encoded_examples["validation"]])

    @property
    def metric(self) -> str:
        """The score that decides which weights are kept: macro-F1 where labels are balanced; a conversation's is its loss."""
        if self.task_spec.task == "chat":
            return "bits_per_byte"
        return "macro_f1" if self.example_weights is not None else SELECTION_METRIC[self.task_spec.kind]

    def summary(self) -> str:
        task_spec, data, tuning = self.task_spec, self.task_data, self.config.tuning
        columns = " · ".join(f"{role}: {column}" for role, column in task_spec.columns)
        lines = [
            f"task {task_spec.task} ({columns}): {len(data.train):,} examples to learn from, {len(data.validation):,} held out",
        ]
        if task_spec.labels:
            label_list = ", ".join(
                f"{name} {self.label_counts[name]:,}" if self.label_counts else name for name in task_spec.labels[:12]
            )
            lines.append(
                f"{len(task_spec.labels)} labels: {label_list}" + (", …" if len(task_spec.labels) > 12 else "")
            )
        if self.example_weights is not None:
            lines.append(
                "labels are unevenly frequent, so rare ones count more and macro-F1 decides (--tuning.balance no)"
            )
        run_length = f"{self.target_steps:,} steps" if self.target_steps else f"{self.budget_seconds:.0f} s"
        lines.append(
            f"{'LoRA' if self.lora_config else 'all weights'}{' from scratch' if self.config.scratch else ''}: {run_length} of "
            f"{tuning.batch_examples} {'rows' if task_spec.task == 'chat' else 'examples'}, learning rate {self.training.lr:.2g}"
        )
        return "\n".join(lines)

    # ------------------------------------------------------------ what the loop asks for

    def evaluate(self, predictor: Predictor, max_examples: int | None, max_generated: int) -> EvaluationResult:
        """Scores on the held-out examples, or on evenly spread ones; the same at each call."""
        examples, encoded = self.task_data.validation, self.encoded_examples["validation"]
        indices = evenly_spaced(len(examples), max_examples)
        if self.task_spec.kind != "answer":
            return predictor.evaluate([examples[i] for i in indices], [encoded[i] for i in indices])
        result = predictor.evaluate([examples[i] for i in indices], [encoded[i] for i in indices], generate=False)
        if self.task_spec.task == "chat" or not max_generated:
            return result
        generated_indices = evenly_spaced(len(examples), max_generated)
        metrics = ("chrf",) if max_examples is not None else ("chrf", "bleu", "rouge1", "rouge2", "rougeL")
        generated = predictor.evaluate(
            [examples[i] for i in generated_indices], [encoded[i] for i in generated_indices], metrics=metrics
        )
        return replace(result, scores=generated.scores, predictions=generated.predictions)

    def validate(self, step_schedule: StepSchedule) -> ValidationResult | None:
        """Evenly spread held-out examples: as many as cost about a tenth of the steps between two looks."""
        if not self.task_data.validation:
            return None
        examples_between_validations = (
            step_schedule.decisions[0].total_steps / self.num_validations(step_schedule) * self.dataset.batch_size
        )
        max_examples = max(
            EVAL_EXAMPLES[0], min(EVAL_EXAMPLES[1], int(0.3 * examples_between_validations))
        )  # an example costs a third of one in training
        max_generated = max(
            16, min(GENERATED_EVAL_EXAMPLES, GENERATED_EVAL_TOKENS // max(1, self.task_spec.answer_tokens))
        )
        eval_start = self.now()
        result = self._evaluate_or_loss_only(self.predictor, max_examples, max_generated)
        seconds = self.now() - eval_start
        final_cost_ratio = len(self.task_data.validation) / min(max_examples, len(self.task_data.validation))
        if result.scores and self.task_spec.kind == "answer":
            final_cost_ratio = max(
                final_cost_ratio, min(FINAL_GENERATED_EXAMPLES, len(self.task_data.validation)) / max_generated
            )
        self.evaluation_seconds = min(self.evaluation_seconds, seconds * final_cost_ratio)
        record: dict[str, Any] = {"loss": result.loss, **{name: s.value for name, s in result.scores.items()}}
        if result.bits_per_byte is not None:
            record["bits_per_byte"] = result.bits_per_byte
        selection_score = result.scores.get(self.metric)
        score = -result.loss if selection_score is None else selection_score.value
        summary_parts = [f"validation loss {result.loss:.4f}"]
        summary_parts += [f"{name.replace('_', ' ')} {s.value:.3f}" for name, s in list(result.scores.items())[:3]]
        if result.bits_per_byte is not None:
            summary_parts.append(f"{result.bits_per_byte:.3f} bits/byte of the answers")
        return ValidationResult(score, record, ", ".join(summary_parts))

    def estimate_finalize_seconds(self) -> float:
        """Scores on all that is held out, the rules beside them, and what was forgotten; never more than a third of the
        budget: a slow moment of the machine must not end a run."""
        evaluation_seconds = 0.0 if math.isinf(self.evaluation_seconds) else self.evaluation_seconds
        seconds = FINALIZE_SECONDS + evaluation_seconds
        if self.task_spec.kind not in HEAD_KINDS and self.base_model.pretraining_corpus is not None:
            tokens_per_step = (
                sum(one.max_length * len(one.sequences) for one in self.encoded_examples["train"])
                / self.dataset.steps_per_epoch
            )
            seconds += (
                2 * FORGETTING_TOKENS / max(1.0, tokens_per_step) * self.seconds_per_step / 3
            )  # a step is three passes
        return min(seconds, (self.budget_seconds or math.inf) / 3)

    def _evaluate_or_loss_only(
        self, predictor: Predictor, max_examples: int | None, max_generated: int
    ) -> EvaluationResult:
        """As `judge`; without the package that scores texts, by the loss alone."""
        try:
            return self.evaluate(predictor, max_examples, max_generated)
        except MissingDependencyError as error:
            self.console.warn(f"{error}. Until then the loss decides which weights are kept")
            return self.evaluate(predictor, max_examples, max_generated=0)

    def save_best_model(self, metadata: dict[str, Any]) -> None:
        """RUN/model, a stock directory with everything merged, and under LoRA RUN/adapter in PEFT's format."""
        task_spec, model = self.task_spec, self.model
        label_names = task_spec.labels or (("score",) if task_spec.n_labels else None)

        def write_extra_files(directory: Path) -> None:
            if task_spec.chat:
                save_chat_template(directory)

        self.run_dir.save_model(
            merge_lora(model) if self.lora_config else model, self.tokenizer, {**metadata, "task": task_spec.to_dict()},
            labels=label_names, problem_type=task_spec.problem_type, write_extra_files=write_extra_files,
        )  # fmt: skip
        if self.lora_config is not None:
            lora = self.lora_config
            self.run_dir.save_dir(
                self.run_dir.adapter_dir,
                metadata,
                lambda aside: save_adapter(model, lora, aside, str(self.base_model.directory.resolve())),
            )

    def log_sample(self, step: int) -> None:
        """Let the model answer the first held-out example, where answers are words."""
        if self.task_spec.kind != "answer" or not self.task_data.validation:
            return
        example = self.task_data.validation[0]
        text = self.predictor.generate_answers([example])[0]
        prompt = input_texts(self.task_spec.task, example)[-1]
        self.run_dir.append_metrics({"step": step, "sample": {"prompt": f"{prompt}\n→ ", "text": text}})
        self.console.log_sample(step, f"{prompt} → ", text)

    def documents_in_batch(self, batch_index: int) -> list[str]:
        examples = [self.task_data.train[i] for i in self.dataset.examples_in_batch(batch_index)]
        return [f"{example.path} line {example.line}" for example in examples]

    def on_no_improvement(self, step: int, result: ValidationResult) -> None:
        """Nothing is said: a look that is not the best is no news, and patience ends what gets no better."""

    # ------------------------------------------------------------ finish

    def finalize(self) -> dict[str, Any]:
        """Score the kept weights on all that is held out, beside what needs no model; write result, card and report."""
        model = load_model(self.run_dir.model_dir, self.device)
        predictor = Predictor(model, self.tokenizer, self.task_spec)
        result: dict[str, Any] = {
            "task": self.task_spec.task, "metric": self.metric, "parameters": model.config.parameters,
            "trained_parameters": self.run_metadata["trained_parameters"], "labels": list(self.task_spec.labels),
        }  # fmt: skip
        if self.task_data.validation:
            evaluation = self._evaluate_or_loss_only(predictor, None, FINAL_GENERATED_EXAMPLES)
            result |= {
                "loss": evaluation.loss,
                "bits_per_byte": evaluation.bits_per_byte,
                "scores": scores_to_dict(evaluation.scores),
            }
            result |= {name: score.value for name, score in evaluation.scores.items() if name not in result}
            baseline_examples = self.task_data.validation
            if self.task_spec.kind == "answer":
                baseline_examples = [
                    baseline_examples[i] for i in evenly_spaced(len(baseline_examples), FINAL_GENERATED_EXAMPLES)
                ]
            try:
                baselines = baseline_scores(self.task_spec, self.task_data.train, baseline_examples)
            except MissingDependencyError:  # said already, when the scores were to be made
                baselines = {}
            result["baselines"] = {name: scores_to_dict(scores) for name, scores in baselines.items()}
            if self.task_spec.kind == "preference":
                result["before"] = scores_to_dict(self.evaluate_base(predictor.encoder).scores)
        if self.task_spec.kind not in HEAD_KINDS:
            result["forgetting"] = evaluate_forgetting(self.base_model, model)
        return self.write_results(result)

    def evaluate_base(self, encoder: ExampleEncoder) -> EvaluationResult:
        """The scores of the model that the run began with."""
        base = load_model(self.base_model.directory, self.device)
        base = with_resized_vocabulary(
            base, self.run_metadata["model"]["vocab_size"], derive_seed(self.run_metadata["seed"], 7)
        )
        return self.evaluate(Predictor(with_classification_head(base, 0, 0), self.tokenizer, self.task_spec), None, 0)


def build_loss_fn(task_spec: TaskSpec, config: FinetuneRecipe) -> LossFn:
    if task_spec.kind in HEAD_KINDS:
        return losses.classification_loss(task_spec.kind, config.tuning.auxiliary)
    return losses.dpo_loss(config.tuning.beta) if task_spec.kind == "preference" else losses.completion_loss


def default_lr(d_model: int, use_lora: bool) -> float:
    """GPT-1's 6.25e-5 at its width of 768 (Radford et al. 2018, section 4.1), 1.5e-3 at 128 (the best of four on two data
    sets), and a straight line between them on logarithmic axes. An adapter takes more."""
    lr = 6.25e-5 * (768 / d_model) ** (math.log(24) / math.log(6))
    return min(1.5e-3, lr) * (LORA_LR_MULTIPLIER if use_lora else 1)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """All of `count` places, or the middle one of each of `limit` equal parts."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def fingerprint_examples(examples: Sequence[EncodedExample]) -> str:
    """A hash of all tokens and golds, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for text in example.sequences:
            digest.update(text.ids.astype("<i8").tobytes() + text.loss_mask.tobytes() + b"\0")
        digest.update(repr(np.asarray(example.target).tolist()).encode())
    return digest.hexdigest()


def scores_to_dict(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}
