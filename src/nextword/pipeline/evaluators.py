"""What a training command evaluates: the language model or the task of a run, during its training and at its end.

Also what fine-tuning starts from: its examples, its model and its batches.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.common.fs import build_directory, read_manifest, verify_manifest, write_manifest
from nextword.common.statistics import ScoreWithCI, t_quantile
from nextword.common.text_units import nfc
from nextword.data.chat_format import save_chat_template
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset, derive_seed
from nextword.data.issues import IssueLog, join_names
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine, check_tokenizer
from nextword.inference.perplexity import DocumentLosses, PerplexityResult, evaluate_perplexity
from nextword.inference.sampling import Sampling
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT, with_classification_head, with_context_length, with_resized_vocabulary
from nextword.model.hf import iter_hf_tensors, iter_weights, load_model, save_model
from nextword.model.lora import LoraConfig, add_lora, merge_lora, save_adapter
from nextword.pipeline.language_model import FORGETTING_TOKENS, BaseModel, evaluate_forgetting
from nextword.pipeline.predictor import (
    EvaluationResult,
    Prediction,
    Predictor,
    baseline_predictions,
    compute_calibration,
    compute_metrics,
    head_loss,
    metric_difference,
)
from nextword.tasks.calibration import fit_temperature
from nextword.tasks.dataset import (
    HEAD_KINDS,
    PROBABILITY_KINDS,
    TASK_KINDS,
    TaskData,
    TaskDataset,
    TaskSpec,
    compute_sample_weights,
    load_task_data,
)
from nextword.tasks.examples import hash_inputs, input_texts
from nextword.tasks.linear import LinearClassifier, combine, fit_weight
from nextword.tasks.metrics import (
    GENERATION_METRICS,
    LABEL_F1,
    LOWER_IS_BETTER_METRICS,
    METRIC_ALIASES,
    TEXT_METRICS,
)
from nextword.training.config import FinetuneRecipe, RunConfig
from nextword.training.launch import RunContext, TrainingSetup
from nextword.training.parallel import load_weights_, to_full, unsharded
from nextword.training.step import BestCheckpoint, autocast
from nextword.training.trainer import FINALIZE_SECONDS, ValidationResult

EVAL_EXAMPLES = (200, 500)  # minimum and maximum of validation examples per validation
NUM_FOLDS = 2  # of cross-fitting; with more folds the score varies more
GENERATED_EVAL_EXAMPLES = 64  # answers generated per validation; fewer if answers are long
GENERATED_EVAL_TOKENS = 4096  # tokens of these answers together
FINAL_GENERATED_EXAMPLES = 500
CONTEXT_EXTENSION = 4  # of the context of a base model with rotary positions, where examples need it
MAX_EXTENDED_CONTEXT = 2048
MIN_GENERATED_EXAMPLES = 16  # of any evaluation

# What the scores of a fine-tuning are of.
SELECTED_NOTHING = "the test set, which selected nothing"
SELECTED_TOO = "the validation set, which also selected the weights"
CROSS_FITTED = "the validation set, each half scored by the weights that the other half selects"


# ---------------------------------------------------------------- language models


@dataclass
class LanguageModelEvaluator:
    """Evaluates the model of a pre-training run. All ranks of a distributed run call its methods together.

    Attributes:
        run: The run.
        setup: The model and its step.
        corpus: The prepared text.
        dataset: The batches of the training set.
        config: The options of the run.
        evaluates_base: Whether the base model is evaluated on the validation set at the end, too.
        forward_seconds_per_batch: Time of a forward pass in the last validation.
    """

    run: RunContext
    setup: TrainingSetup
    corpus: Corpus
    dataset: TokenDataset
    config: RunConfig
    evaluates_base: bool = False
    forward_seconds_per_batch: float = math.inf

    def __post_init__(self) -> None:
        self.validation, self.test = self.corpus.tokens("validation"), self.corpus.tokens("test")
        self.final_tokens = (2 if self.evaluates_base else 1) * len(self.validation) + len(self.test)
        self.batch_tokens = self.dataset.batch_size * self.dataset.context_length
        self.prompt_ids = self._sample_prompt()

    def _sample_prompt(self) -> list[int]:
        """The first whole words of the validation set, in whole characters: a document that is cut may begin inside a word."""
        tokenizer = self.corpus.tokenizer
        length = 24 if tokenizer.kind == "char" else 8
        first_ids: list[int] = self.validation.read(0, min(4 * length, len(self.validation))).tolist()
        begins_inside = self.corpus.manifest.get("held_out", {}).get("cut", ())
        spaces = [i for i, id in enumerate(first_ids[: 3 * length]) if tokenizer.token_bytes(id)[:1].isspace()]
        start = spaces[0] if begins_inside and spaces else 0
        prompt_ids = first_ids[start : start + length]
        return tokenizer.whole_characters(prompt_ids) or prompt_ids

    def describe_batch(self, index: int) -> list[str]:
        """Name the documents in a batch."""
        return self.corpus.document_names(self.dataset.token_spans(index))

    def validate(self, steps_between: float) -> ValidationResult | None:
        """Evaluate evenly spaced windows of the validation set: as many as cost about 5 % of the steps between validations."""
        if len(self.validation) < 2:
            return None
        tokens_between = steps_between * self.batch_tokens
        # A forward pass is 1/3 of a step.
        max_windows = max(8, int(0.15 * tokens_between / self.dataset.context_length))
        start = self.run.now()
        result = self.evaluate(max_windows)
        self.forward_seconds_per_batch = (self.run.now() - start) / result.tokens * self.batch_tokens
        return ValidationResult(
            score=-result.loss,
            loss=result.loss,
            metrics={"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens},
            summary=f"validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits/byte "
            f"({result.tokens:,} of {len(self.validation):,} tokens)",
        )

    def evaluate(
        self,
        max_windows: int | None = None,
        split: Literal["validation", "test"] = "validation",
        model: GPT | None = None,
    ) -> PerplexityResult:
        """Evaluate on evenly spaced windows of the validation or test set. Each rank evaluates a part of the windows.

        Args:
            max_windows: Number of windows. Default: the whole set, with its progress shown, and ending early when its part of
                the time budget is used up.
            split: The set.
            model: A model that every rank holds. Default: the model that is trained.
        """
        if model is None:
            with unsharded(self.run.dist, self.setup.eager_step) as trained:
                return self.evaluate(max_windows, split, trained)
        dist, budget, is_final = self.run.dist, self.config.budget, max_windows is None
        tokens, stats = (
            (self.validation, self.corpus.validation) if split == "validation" else (self.test, self.corpus.test)
        )
        context, deadline = dist if dist.world_size > 1 else None, math.inf
        if is_final:
            if budget is not None:
                remaining_seconds = self.run.remaining_seconds(budget) - FINALIZE_SECONDS
                deadline = self.run.now() + remaining_seconds * len(tokens) / self.final_tokens
            self.final_tokens -= len(tokens)

        def is_over() -> bool:
            over = self.run.now() >= deadline
            return bool(dist.all_reduce_max([over])[0]) if dist.forward_is_collective else over

        def show_progress(done: int, total: int) -> None:
            if dist.is_main:
                self.run.console.progress("final evaluation", done, total)

        with autocast(self.run.device, self.setup.step_settings.bf16 and dist.fsdp_per_block):
            result = evaluate_perplexity(
                model,
                tokens,
                stats.seen_bytes,
                bos_id=self.corpus.tokenizer.bos_id,
                max_windows=max_windows,
                dist_context=context,
                should_stop=is_over if math.isfinite(deadline) else None,
                progress=show_progress if is_final else None,
                documents=DocumentLosses(tokens, self.corpus.tokenizer) if is_final else None,
            )
        if is_final:
            self.run.console.close()
        return result

    def save_best(self, metadata: dict[str, Any]) -> None:
        """Write the model to RUN/model. All ranks gather the weights; the main rank writes them."""
        with unsharded(self.run.dist, self.setup.eager_step) as model:
            if self.run.dist.is_main:
                save_model_dir(self.run.run_dir.model_dir, model, self.corpus.tokenizer, metadata)
            else:
                for _ in iter_hf_tensors(model.config, model.state_dict(), to_full):
                    pass

    def loss_to_bits_per_byte(self, loss: float) -> float:
        """Convert nats per token of the training set to bits per byte."""
        train = self.corpus.train
        return loss / math.log(2) * train.tokens / max(1, train.seen_bytes)

    def finalize_seconds(self) -> float:
        """Estimate the time of the final evaluation, at most a tenth of the budget, and of the last files."""
        forward = self.forward_seconds_per_batch
        forward = forward if math.isfinite(forward) else self.setup.seconds_per_step / 3
        num_tokens = self.final_tokens + (2 * FORGETTING_TOKENS if self.evaluates_base else 0)
        seconds = 1.1 * forward * num_tokens / self.batch_tokens
        return FINALIZE_SECONDS + min(seconds, (self.config.budget or math.inf) / 10)

    def log_sample(self, step: int) -> None:
        """Continue the first words of the validation set, unless a forward pass takes several ranks."""
        run = self.run
        if run.dist.forward_is_collective:
            return
        tokenizer, prompt_ids = self.corpus.tokenizer, self.prompt_ids
        with unsharded(run.dist, self.setup.eager_step) as model:
            if not run.dist.is_main:
                return
            engine = Engine(model, tokenizer, seed=0)
            max_tokens = 100 if tokenizer.kind == "char" else 40
            completion = engine.generate([prompt_ids], Sampling(max_tokens=max_tokens))[0]
        prompt = tokenizer.decode(prompt_ids)
        run.log({"step": step, "sample": {"prompt": prompt, "text": completion.text}})
        run.console.log_sample(step, prompt, completion.text)

    def evaluate_best(self) -> dict[str, Any]:
        """Load the weights of RUN/model, and evaluate them on the whole validation set and on the test set."""
        model = self.setup.state.model
        if self.run.dist.is_main:
            verify_manifest(self.run.run_dir.model_dir)
        load_weights_(model, iter_weights(self.run.run_dir.model_dir, model.config), self.run.dist)
        metrics: dict[str, Any] = {
            "parameters": model.config.parameters,
            "prompt": self.corpus.tokenizer.decode(self.prompt_ids).strip().partition("\n")[0],
        }
        if len(self.validation) >= 2:
            result = self.evaluate()
            metrics |= {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "by_position")}
            metrics |= {"validation_tokens": result.tokens, "loss_margin": result.margin or None}
            metrics["interval"] = result.interval
        if len(self.test) >= 2:
            result = self.evaluate(split="test")
            metrics |= {"test_loss": result.loss, "test_bits_per_byte": result.bits_per_byte}
            metrics |= {"test_tokens": result.tokens, "test_loss_margin": result.margin or None}
            metrics["test_interval"] = result.interval
        return metrics


def save_model_dir(
    target: Path, model: GPT, tokenizer: Tokenizer, metadata: dict[str, Any], task_spec: TaskSpec | None = None
) -> None:
    """Write a Hugging Face directory with a manifest, in place of an existing one.

    Sharded weights are gathered: the other ranks iterate over `iter_hf_tensors` meanwhile.

    Args:
        target: The directory.
        model: The model.
        tokenizer: Its tokenizer.
        metadata: Stored in the manifest.
        task_spec: The task that the model was fine-tuned for.
    """
    task = {} if task_spec is None else {"task": task_spec.to_dict()}

    def build(directory: Path) -> None:
        save_model(
            model,
            directory,
            end_of_text_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            labels=(task_spec and task_spec.output_names) or None,
            problem_type=task_spec and task_spec.problem_type,
            eos_token_ids=sorted(tokenizer.eos_ids),
            gather=to_full,
        )
        tokenizer.save(directory, model.config.context_length)
        if task_spec is not None and task_spec.chat:
            save_chat_template(directory)
        write_manifest(directory, {**metadata, **task, "model": model.config.to_dict()})

    build_directory(target, build)


# ---------------------------------------------------------------- fine-tuning


def split_options(request: dict[str, Any], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a run as those of `load_task_data`. A run of an earlier version keeps its split."""
    names = ("task", "columns", "validation", "test", "validation_fraction", "limit", "label_map")
    options = {name: request.get(name) for name in names}
    if metadata is None:
        return options
    return options | {"split_version": metadata["data"].get("split_version", 2 if "test" in metadata["data"] else 1)}


def load_finetune_data(run: RunContext, base: BaseModel, context_length: int) -> tuple[TaskData, int]:
    """Read and encode the examples of a run. Rows with problems are reported and left out.

    Returns:
        The examples, and the number of rows with problems.

    Raises:
        NextwordError: no training example is left.
    """
    request, issues = run.request, IssueLog(strict=run.strict and run.metadata is None)
    options, seed = split_options(request, run.metadata), request["seed"] or 0
    data = load_task_data(request["data"], base.tokenizer, base.task_spec, context_length, issues, seed=seed, **options)
    for line in issues.summary_lines():
        run.warn(line)
    if not data.train:
        raise NextwordError(f"{', '.join(request['data'])}: no training example is left")
    return data, issues.total


def max_context_length(config: ModelConfig) -> int:
    """The longest context that a model can be fine-tuned at: rotary positions are extended, learned ones are not."""
    if config.positions != "rope":
        return config.context_length
    return max(config.context_length, min(CONTEXT_EXTENSION * config.context_length, MAX_EXTENDED_CONTEXT))


def with_context_for(model: GPT, data: TaskData, run: RunContext) -> GPT:
    """A model with the context that the examples need, if its positions can be extended. The choice is printed."""
    encoded = [*data.encoded_train, *data.encoded_validation, *data.encoded_test]
    needed = max(example.max_length for example in encoded)
    context_length = min(-(-needed // 64) * 64, max_context_length(model.config))
    if context_length <= model.config.context_length:
        return model
    before = model.config.context_length
    run.info(
        f"context of {context_length:,} tokens instead of the base model's {before:,}: the longest example has {needed:,}"
    )
    return with_context_length(model, context_length)


def load_start_model(base: BaseModel, from_scratch: bool, seed: int, device: torch.device) -> GPT:
    """Load the base model, or create one of the same shape with fresh weights."""
    model = load_model(base.directory, device)
    check_tokenizer(model, base.tokenizer)
    if not from_scratch:
        return model
    torch.manual_seed(derive_seed(seed, 3))  # pyright: ignore[reportUnknownMemberType]  # without annotations in torch
    return GPT(replace(model.config, n_labels=0)).to(device)


def build_finetune_model(
    start: GPT, base: BaseModel, data: TaskData, config: FinetuneRecipe, seed: int
) -> tuple[GPT, LoraConfig | None]:
    """Add special tokens, the classification head and LoRA to the model that a run starts from."""
    tuning, spec = config.tuning, data.task_spec
    vocab_size = max(start.config.vocab_size, data.tokenizer.vocab_size)
    model = with_resized_vocabulary(start, vocab_size, derive_seed(seed, 7))
    model = with_classification_head(model, spec.n_labels, derive_seed(seed, 8))
    # DPO compares with the log-probabilities of the start model, to which dropout would add noise.
    dropout = 0.0 if spec.kind == "preference" else tuning.dropout
    model = GPT.from_weights(replace(model.config, dropout=dropout), model.state_dict())
    if not config.lora:
        return model, None
    lora_config = LoraConfig(rank=tuning.rank, alpha=tuning.alpha)
    new_rows = model.config.vocab_size - min(start.config.vocab_size, base.tokenizer.vocab_size)
    add_lora(model, lora_config, derive_seed(seed, 9), num_trainable_rows=new_rows)
    return model, lora_config


def build_task_dataset(
    model: GPT, data: TaskData, config: FinetuneRecipe, seed: int
) -> tuple[TaskDataset, dict[str, int], bool]:
    """The batches of a fine-tuning run, the number of examples of each label, and whether rare labels have more weight."""
    spec = data.task_spec
    assert config.tuning.batch_examples is not None and data.tokenizer.pad_id is not None
    sample_weights, label_counts = compute_sample_weights(spec, data.train, config.tuning.balance)
    reference = None
    if spec.kind == "preference":
        predictor = Predictor(model, data.tokenizer, spec)
        reference = predictor.log_likelihoods(data.encoded_train).astype(np.float32)
    dataset = TaskDataset(
        data.encoded_train,
        config.tuning.batch_examples,
        seed,
        pad_token_id=data.tokenizer.pad_id,
        kind=spec.kind,
        sample_weights=sample_weights,
        reference_logprobs=reference,
        pack_length=model.config.context_length if spec.task == "chat" else None,
    )
    return dataset, label_counts, sample_weights is not None


def selection_metric(spec: TaskSpec, is_balanced: bool, name: str | None = None) -> str:
    """The metric that selects the best weights: by default macro-F1 if rare labels count more; of a chat, bits per byte.

    Args:
        spec: The task.
        is_balanced: Whether rare labels count more.
        name: The requested metric.

    Raises:
        UsageError: The task has no such metric.
    """
    if name is None:
        if spec.task == "chat":
            return "bits_per_byte"
        return "macro_f1" if is_balanced else TASK_KINDS[spec.kind].metric
    metric = METRIC_ALIASES.get(name, nfc(name))
    known = ["bits_per_byte"] if spec.task == "chat" else list(TASK_KINDS[spec.kind].metrics)
    if spec.kind == "label" and metric.startswith("f1"):
        known += [f"{LABEL_F1}{label}" for label in spec.labels]
    if metric not in [*known, "loss"]:
        shown = join_names([*known, "loss"] + ([f"{LABEL_F1}LABEL"] if spec.kind == "label" else []))
        raise UsageError(f"--metric {name}: the task {spec.task} has no such metric. Choose one of {shown}")
    return metric


@contextlib.contextmanager
def scaled_head(model: GPT, temperature: float) -> Generator[None]:
    """Divide the weights of the classification head by a temperature, within a context."""
    if model.score is None or temperature == 1:
        yield
        return
    weight = model.score.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.div_(temperature)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(original)


@dataclass
class TaskEvaluator:
    """Evaluates the model of a fine-tuning run.

    Attributes:
        run: The run.
        setup: The model and its step.
        base: The model that the run started from.
        data: The examples.
        dataset: The batches of the training set.
        config: The options of the run.
        metric: The metric that selects the best weights.
        lora_config: The LoRA adapter; None if all weights are trained.
        evaluation_seconds: Time to evaluate the validation and the test set, the fastest estimate so far.
        temperature: Temperature of the probabilities, fitted at the last validation.
    """

    run: RunContext
    setup: TrainingSetup
    base: BaseModel
    data: TaskData
    dataset: TaskDataset
    config: FinetuneRecipe
    metric: str
    lora_config: LoraConfig | None
    evaluation_seconds: float = math.inf
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.spec, self.model = self.data.task_spec, self.setup.state.model
        data = self.data
        self.sets = {"validation": (data.validation, data.encoded_validation), "test": (data.test, data.encoded_test)}
        self.validation = data.validation
        self.num_held_out = len(data.validation) + len(data.test)
        self.predictor = Predictor(self.model, self.data.tokenizer, self.spec)

    def loss_to_bits_per_byte(self, loss: float) -> None:
        """The loss of a task has no meaning in bits per byte."""

    def describe_batch(self, index: int) -> list[str]:
        """File and line of the examples in a batch."""
        examples = [self.data.train[i] for i in self.dataset.examples_in_batch(index)]
        return [f"{example.path} line {example.line}" for example in examples]

    def validate(self, steps_between: float) -> ValidationResult | None:
        """Evaluate evenly spaced validation examples: as many as cost about 10 % of the steps between validations."""
        total = len(self.validation)
        if not total:
            return None
        examples_between = steps_between * self.dataset.batch_size
        minimum, maximum = EVAL_EXAMPLES
        limit = max(minimum, min(maximum, int(0.3 * examples_between)))  # a forward pass is 1/3 of a step
        generated = max(
            MIN_GENERATED_EXAMPLES,
            min(GENERATED_EVAL_EXAMPLES, GENERATED_EVAL_TOKENS // max(1, self.spec.answer_tokens)),
        )
        start = self.run.now()
        metrics_during_training = (self.metric,) if self.metric in TEXT_METRICS else ("chrf",)
        result = self.evaluate(self.predictor, limit, generated, metrics_during_training)
        seconds = self.run.now() - start
        scale = self.num_held_out / min(limit, total)
        if result.scores and self.spec.kind == "answer":
            scale = max(scale, min(FINAL_GENERATED_EXAMPLES, self.num_held_out) / generated)
        self.evaluation_seconds = min(self.evaluation_seconds, seconds * scale)
        values = {name: score.value for name, score in result.scores.items()}
        metrics: dict[str, Any] = {"loss": result.loss, **values}
        summary = [f"validation loss {result.loss:.4f}"]
        summary += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in list(values.items())[:3]]
        if result.bits_per_byte is not None:
            metrics["bits_per_byte"] = result.bits_per_byte
            summary.append(f"{result.bits_per_byte:.3f} bits/byte of the answers")
        loss, predictions = self._calibrate(result, limit), None
        if self.spec.kind in PROBABILITY_KINDS:
            metrics |= {"calibrated_loss": loss, "temperature": self.temperature}
        if limit >= total and self.spec.kind in HEAD_KINDS:
            field = TASK_KINDS[self.spec.kind].prediction_field
            predictions = [prediction[field] for prediction in result.predictions]
        return ValidationResult(
            score=-loss if self.metric == "loss" else values.get(self.metric, -loss),
            loss=loss,
            metrics=metrics,
            summary=", ".join(summary),
            predictions=predictions,
            is_constant=self.spec.kind == "label" and len({p["label"] for p in result.predictions}) == 1,
            standard_error=self._standard_error(result.scores),
        )

    def _standard_error(self, scores: Mapping[str, ScoreWithCI]) -> float:
        """The standard error of the selection metric, approximate without an interval; 0 for generated answers and losses."""
        if self.spec.kind not in HEAD_KINDS or self.metric not in scores:
            return 0.0
        score = scores[self.metric]
        if score.low is None or score.high is None:
            return 0.5 / math.sqrt(score.n or 1)
        return (score.high - score.low) / (2 * t_quantile(math.inf))

    def _calibrate(self, result: EvaluationResult, limit: int) -> float:
        """Fit the temperature to a validation. Returns the loss at that temperature, which overconfidence does not raise."""
        if self.spec.kind not in PROBABILITY_KINDS or result.logits is None:
            return result.loss
        encoded = self.sets["validation"][1]
        targets = [encoded[i].target for i in evenly_spaced(len(encoded), limit)]
        self.temperature = fit_temperature(result.logits, targets)
        scaled = (logits / self.temperature for logits in result.logits)
        return float(np.mean([head_loss(self.spec.kind, row, y) for row, y in zip(scaled, targets, strict=True)]))

    def _final_sample(self, total: int, split: str) -> tuple[int | None, int]:
        """The number of examples (None: all) and of generated answers of the final evaluation on a set of `total`.

        All, unless the budget has no time for them at the speed of the last evaluations.
        """
        if self.config.budget is None:
            return None, FINAL_GENERATED_EXAMPLES
        share = (self.run.remaining_seconds(self.config.budget) - FINALIZE_SECONDS) / self.evaluation_seconds
        if share >= 1 or not math.isfinite(self.evaluation_seconds):
            return None, FINAL_GENERATED_EXAMPLES
        limit = min(total, max(EVAL_EXAMPLES[0], int(share * total)))
        generated = max(MIN_GENERATED_EXAMPLES, int(share * FINAL_GENERATED_EXAMPLES))
        self.run.warn(
            f"the budget has no time for all {total:,} {split} examples: {limit:,} of them are evaluated. nextword evaluate "
            "reads all"
        )
        return limit, generated

    def evaluate(
        self,
        predictor: Predictor,
        limit: int | None,
        generated: int,
        metrics: Sequence[str] = (),
        split: Literal["validation", "test"] = "validation",
    ) -> EvaluationResult:
        """Evaluate a model on examples of the validation or test set.

        Args:
            predictor: The model.
            limit: Number of examples, evenly spaced; None for all.
            generated: Number of examples with a generated answer. Without the package for the text metrics there are none.
            metrics: Metrics of the generated answers, and F1 scores of single labels.
            split: The set that the examples are from.
        """
        all_examples, all_encoded = self.sets[split]

        def evaluate(count: int | None, **options: Any) -> EvaluationResult:
            chosen = evenly_spaced(len(all_examples), count)
            return predictor.evaluate([all_examples[i] for i in chosen], [all_encoded[i] for i in chosen], **options)

        is_text = self.spec.kind == "answer"
        result = evaluate(limit, generate=not is_text, metrics=(self.metric, *metrics))
        if not is_text or self.spec.task == "chat" or not generated:
            return result
        try:
            texts = evaluate(generated, metrics=metrics)
        except MissingDependencyError as error:
            self.run.warn(f"{error}. Without it, the loss selects the best weights")
            return result
        return replace(result, scores=texts.scores, predictions=texts.predictions, num_unfinished=texts.num_unfinished)

    def finalize_seconds(self) -> float:
        """Estimate the time of the final evaluation, at most a third of the budget.

        The fastest evaluation so far counts, so that a slow moment does not end a run.
        """
        seconds = FINALIZE_SECONDS + (self.evaluation_seconds if math.isfinite(self.evaluation_seconds) else 0.0)
        if self.spec.kind not in HEAD_KINDS and self.base.pretraining_corpus is not None:
            num_tokens = sum(e.max_length * len(e.sequences) for e in self.data.encoded_train)
            tokens_per_step = num_tokens / self.dataset.steps_per_epoch
            forward_seconds = self.setup.seconds_per_step / 3
            seconds += 2 * FORGETTING_TOKENS / max(1.0, tokens_per_step) * forward_seconds
        return min(seconds, (self.config.budget or math.inf) / 3)

    def save_best(self, metadata: dict[str, Any]) -> None:
        """Write RUN/model with the LoRA weights merged, and RUN/adapter in PEFT's format if there are any.

        The weights of the classification head are divided by the temperature, so that every program that reads the model
        computes calibrated probabilities.
        """
        if self.spec.kind in PROBABILITY_KINDS:
            metadata = {**metadata, "temperature": self.temperature}
        with scaled_head(self.model, self.temperature):
            self._save_best(metadata)

    def _save_best(self, metadata: dict[str, Any]) -> None:
        lora_config = self.lora_config
        model = self.model if lora_config is None else merge_lora(self.model)
        save_model_dir(self.run.run_dir.model_dir, model, self.data.tokenizer, metadata, self.spec)
        if lora_config is not None:
            base_path = str(self.base.directory.resolve())

            def build(directory: Path) -> None:
                save_adapter(self.model, lora_config, directory, base_path)
                write_manifest(directory, metadata)

            build_directory(self.run.run_dir.adapter_dir, build)

    def log_sample(self, step: int) -> None:
        """Answer the first validation example, if answers are texts."""
        if self.spec.kind != "answer" or not self.validation:
            return
        example = self.validation[0]
        text = self.predictor.generate_answers([example])[0].text.strip()
        prompt = input_texts(self.spec.task, example)[-1]
        self.run.log({"step": step, "sample": {"prompt": f"{prompt}\n→ ", "text": text}})
        self.run.console.log_sample(step, f"{prompt} → ", text)

    def evaluate_best(self) -> dict[str, Any]:
        """Evaluate RUN/model on the test set or else on the validation set, beside simple baselines and the base model."""
        spec = self.spec
        split: Literal["validation", "test"] = "test" if self.data.test else "validation"
        model_dir = self.run.run_dir.model_dir
        model = load_model(model_dir, self.run.device)
        metrics: dict[str, Any] = {
            "task": spec.task,
            "metric": self.metric,
            "parameters": model.config.parameters,
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "labels": list(spec.labels),
        }
        if self.validation:
            predictor, (examples, _) = Predictor(model, self.data.tokenizer, spec), self.sets[split]
            limit, generated = self._final_sample(len(examples), split)
            self.run.info(f"evaluating on the {split} set …")
            metric_names = (self.metric, *GENERATION_METRICS)
            result = on_validation = self.evaluate(predictor, limit, 0 if split == "test" else generated, metric_names)
            if split == "test":
                metrics |= {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
                result = self.evaluate(predictor, limit, generated, metric_names, split)
            chosen = [examples[i] for i in evenly_spaced(len(examples), limit)]
            if spec.kind == "answer" and result.predictions:
                metrics["unfinished"] = {
                    "count": result.num_unfinished,
                    "n": len(result.predictions),
                    "max_tokens": spec.answer_tokens,
                }
            if calibration := compute_calibration(spec, chosen, result.predictions):
                metrics["calibration"] = asdict(calibration) | {
                    "temperature": read_manifest(model_dir).get("temperature", 1.0)
                }
            prefix = "test_" if split == "test" else ""
            metrics |= {f"{prefix}loss": result.loss, f"{prefix}bits_per_byte": result.bits_per_byte}
            scores, basis = result.scores, SELECTED_NOTHING if split == "test" else SELECTED_TOO
            predictions = result.predictions
            if split == "validation" and limit is None and (cross_fitted := self._cross_fit()):
                predictions, basis = cross_fitted, CROSS_FITTED
                scores = compute_metrics(spec, chosen, predictions, metric_names)
            metrics |= {"scores": scores_to_dict(scores), "scored_on": basis}
            metrics |= {name: score.value for name, score in scores.items() if name not in metrics}
            count = generated if spec.kind == "answer" else limit
            examples = [examples[i] for i in evenly_spaced(len(examples), count)]
            systems = baseline_predictions(spec, self.data.train, examples)
            if (linear := self._fit_linear(on_validation, limit)) is not None:
                texts = [input_texts(spec.task, example)[0] for example in examples]
                probabilities = linear[0].probabilities(texts)
                pooled = combine(np.array(result.logits), probabilities, linear[1])

                def most_likely(table: np.ndarray) -> list[Prediction]:
                    return [{"label": label} for label in np.array(spec.labels)[table.argmax(1)].tolist()]

                systems["TF-IDF"] = most_likely(probabilities)
                ensemble = compute_metrics(spec, examples, most_likely(pooled), metric_names)
                metrics["ensemble"] = {"weight": linear[1], "scores": scores_to_dict(ensemble)}
            try:
                baselines = {
                    name: compute_metrics(spec, examples, answers, metric_names) for name, answers in systems.items()
                }
            except MissingDependencyError:  # reported during validation
                baselines = {}
            metrics["baselines"] = {name: scores_to_dict(values) for name, values in baselines.items()}
            values = {name: entry[self.metric].value for name, entry in baselines.items() if self.metric in entry}
            if self.metric in scores and values:
                sign = -1 if self.metric in LOWER_IS_BETTER_METRICS else 1
                best = max(values, key=lambda name: sign * values[name])
                difference = metric_difference(spec, examples, predictions, systems[best], self.metric)
                metrics["baseline_difference"] = {
                    "baseline": best,
                    "value": scores[self.metric].value - values[best],
                    **({} if difference is None else difference.to_dict()),
                }
            if spec.kind == "preference":
                metrics["before"] = scores_to_dict(self._evaluate_base(split).scores)
            elif spec.task == "chat":
                metrics["before"] = {"bits_per_byte": self._evaluate_base("validation", limit).bits_per_byte}
        if spec.kind not in HEAD_KINDS:
            metrics["forgetting"] = evaluate_forgetting(self.base, model)
        return metrics

    def _fit_linear(self, result: EvaluationResult, limit: int | None) -> tuple[LinearClassifier, float] | None:
        """Fit the linear classifier on the training set, and its weight in an ensemble on the validation set; save both.

        Args:
            result: The evaluation on the validation set.
            limit: The number of its examples; None for all.

        Returns:
            The classifier and its weight; None for other tasks than the classification of texts with one label.
        """
        if self.spec.task != "classify" or self.spec.kind != "label":
            return None
        validation = [self.validation[i] for i in evenly_spaced(len(self.validation), limit)]
        train, held_out = (
            ([input_texts("classify", e)[0] for e in examples], [e.fields["label"] for e in examples])
            for examples in (self.data.train, validation)
        )
        is_balanced = bool((self.dataset.sample_weights != 1).any())
        classifier = LinearClassifier.fit(*train, self.spec.labels, is_balanced)
        if classifier is None:
            return None
        targets = [self.spec.labels.index(label) for label in held_out[1]]
        weight = fit_weight(np.array(result.logits), classifier.probabilities(held_out[0]), targets)
        classifier.save(self.run.run_dir.linear_dir, weight)
        return classifier, weight

    def _cross_fit(self) -> list[Prediction]:
        """The cross-fitted predictions for the validation set.

        Returns:
            The predictions; empty if not all validations were on the whole validation set, or there are too few examples.
        """
        records = self.run.run_dir.read_metrics()
        evaluations = [record["predictions"] for record in records if "predictions" in record]
        validations = [record["validation"] for record in records if "validation" in record]
        losses = [values.get("calibrated_loss", values["loss"]) for values in validations]
        folds = np.array([hash_inputs(self.spec.task, example) % NUM_FOLDS for example in self.validation])
        if not evaluations or len(evaluations) < len(validations) or len(np.unique(folds)) < NUM_FOLDS:
            return []
        field = TASK_KINDS[self.spec.kind].prediction_field

        def compute(predictions: Sequence[Any], indices: Sequence[int]) -> dict[str, ScoreWithCI]:
            examples = [self.validation[i] for i in indices]
            return compute_metrics(self.spec, examples, [{field: predictions[i]} for i in indices], (self.metric,))

        def select(indices: Sequence[int]) -> int:
            best = BestCheckpoint()
            for i, (predictions, loss) in enumerate(zip(evaluations, losses, strict=True)):
                scores = compute(predictions, indices)
                score = scores[self.metric].value if self.metric in scores else -loss
                best.update(i, score, loss, self._standard_error(scores))
            return best.step

        return [{field: value} for value in cross_fitted(evaluations, folds, select)]

    def _evaluate_base(self, split: Literal["validation", "test"], limit: int | None = None) -> EvaluationResult:
        """Evaluate the model that the run started from, on all or some examples."""
        seed = self.setup.step_settings.seed
        base = with_context_length(load_model(self.base.directory, self.run.device), self.model.config.context_length)
        base = with_resized_vocabulary(base, self.model.config.vocab_size, derive_seed(seed, 7))
        predictor = Predictor(with_classification_head(base, 0, 0), self.data.tokenizer, self.spec)
        return self.evaluate(predictor, limit, 0, split=split)


def cross_fitted(
    evaluations: Sequence[Sequence[Any]], folds: np.ndarray, select: Callable[[Sequence[int]], int]
) -> list[Any]:
    """Predictions for examples that did not select them, so that the best of several evaluations is not their score.

    The examples of each fold have the predictions of the weights that the other folds select (Stone 1974, "Cross-validatory
    choice and assessment of statistical predictions").

    Args:
        evaluations: The predictions for all examples at each validation [V][E].
        folds: The fold of each example [E].
        select: The validation [V] that is the best for the examples of some indices.
    """
    chosen: list[Any] = [None] * len(folds)
    for fold in np.unique(folds):
        others: list[int] = np.flatnonzero(folds != fold).tolist()
        best = evaluations[select(others)]
        for i in np.flatnonzero(folds == fold).tolist():
            chosen[i] = best[i]
    return chosen


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """All of `count` indices, or the center of each of `limit` equal parts."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def scores_to_dict(scores: dict[str, ScoreWithCI]) -> dict[str, Any]:
    """Scores as result.json stores them."""
    return {name: score.to_dict() for name, score in scores.items()}
