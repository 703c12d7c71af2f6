"""Evaluation of a language model during its training: validation, samples, the best model and the final result."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common.fs import build_directory, map_disk_errors, verify_manifest, write_manifest
from nextword.data.chat_format import save_chat_template
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset
from nextword.data.tokenizer import Tokenizer
from nextword.inference.engine import Engine
from nextword.inference.perplexity import PerplexityResult, evaluate_perplexity
from nextword.inference.sampling import Sampling
from nextword.model.gpt import GPT
from nextword.model.hf import iter_hf_tensors, iter_weights, save_model
from nextword.tasks.dataset import TaskSpec
from nextword.training.config import RunConfig
from nextword.training.launch import RunContext, TrainingSetup
from nextword.training.parallel import load_weights_, to_full, unsharded
from nextword.training.step import autocast
from nextword.training.trainer import FINALIZE_SECONDS, ValidationResult


@dataclass
class LanguageModelEvaluator:
    """Evaluates the model of a pre-training run. All ranks of a distributed run call its methods together.

    Attributes:
        run: The run.
        setup: The model and its step.
        corpus: The prepared text.
        dataset: The batches of the training set.
        config: The options of the run.
        forward_seconds_per_batch: Time of a forward pass, the fastest so far.
    """

    run: RunContext
    setup: TrainingSetup
    corpus: Corpus
    dataset: TokenDataset
    config: RunConfig
    forward_seconds_per_batch: float = math.inf

    def __post_init__(self) -> None:
        self.validation = self.corpus.tokens("validation")
        self.batch_tokens = self.dataset.batch_size * self.dataset.context_length

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
        seconds = (self.run.now() - start) / result.tokens * self.batch_tokens
        self.forward_seconds_per_batch = min(self.forward_seconds_per_batch, seconds)
        return ValidationResult(
            score=-result.loss,
            metrics={"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens},
            summary=f"validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits/byte "
            f"({result.tokens:,} of {len(self.validation):,} tokens)",
        )

    def evaluate(self, max_windows: int | None = None) -> PerplexityResult:
        """Evaluate the model on the validation set, or on evenly spaced windows of it."""
        with unsharded(self.run.dist, self.setup.eager_step) as model:
            return self.evaluate_replicated(model, max_windows)

    def evaluate_replicated(self, model: GPT, max_windows: int | None = None) -> PerplexityResult:
        """Evaluate a model that every rank holds. Each rank evaluates a part of the windows."""
        dist = self.run.dist
        context, num_bytes = dist if dist.world_size > 1 else None, self.corpus.validation.bytes
        with autocast(self.run.device, self.setup.step_settings.bf16 and dist.fsdp_per_block):
            return evaluate_perplexity(model, self.validation, num_bytes, max_windows=max_windows, dist_context=context)

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
        return loss / math.log(2) * train.tokens / max(1, train.bytes)

    def finalize_seconds(self) -> float:
        """Estimate the time of the final evaluation, at most a third of the budget.

        The fastest evaluation so far counts, so that a slow moment does not end a run.
        """
        forward = min(self.forward_seconds_per_batch, self.setup.seconds_per_step / 3)
        seconds = FINALIZE_SECONDS + 1.1 * forward * len(self.validation) / self.batch_tokens
        return min(seconds, (self.config.budget or math.inf) / 3)

    def log_sample(self, step: int) -> None:
        """Continue the first words of the validation set, unless a forward pass takes several ranks."""
        run = self.run
        if run.dist.forward_is_collective:
            return
        tokenizer, prompt_ids = self.corpus.tokenizer, self.prompt_ids()
        with unsharded(run.dist, self.setup.eager_step) as model:
            if not run.dist.is_main:
                return
            engine = Engine(model, tokenizer, seed=0)
            max_tokens = 100 if tokenizer.kind == "char" else 40
            completion = engine.generate([prompt_ids], Sampling(max_tokens=max_tokens))[0]
        prompt = tokenizer.decode(prompt_ids)
        run.log({"step": step, "sample": {"prompt": prompt, "text": completion.text}})
        run.console.log_sample(step, prompt, completion.text)

    def prompt_ids(self) -> list[int]:
        """The first tokens of the validation set."""
        num_tokens = 24 if self.corpus.tokenizer.kind == "char" else 8
        return self.validation.read(0, min(num_tokens, len(self.validation))).tolist()

    def evaluate_best(self) -> dict[str, Any]:
        """Load the weights of RUN/model and evaluate them on the whole validation set."""
        model = self.setup.state.model
        if self.run.dist.is_main:
            verify_manifest(self.run.run_dir.model_dir)
        load_weights_(model, iter_weights(self.run.run_dir.model_dir, model.config), self.run.dist)
        metrics: dict[str, Any] = {
            "parameters": model.config.parameters,
            "prompt": self.corpus.tokenizer.decode(self.prompt_ids()).strip().partition("\n")[0],
        }
        if len(self.validation) >= 2:
            result = self.evaluate()
            metrics |= {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "by_position")}
            metrics["validation_tokens"] = result.tokens
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

    with map_disk_errors(target):
        build_directory(target, build)
