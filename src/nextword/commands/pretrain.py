"""A pre-training run from its recipe to its report: what it trains, on which text, and how it looks at held-out text."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from nextword.common.console import Console
from nextword.common.errors import UsageError
from nextword.common.fs import verify_manifest
from nextword.common.run_dir import RunDir, diff_settings
from nextword.data.corpus import Corpus
from nextword.data.dataset import TokenDataset, derive_seed
from nextword.inference.engine import Engine
from nextword.inference.perplexity import Likelihood, evaluate_perplexity
from nextword.inference.sampling import Sampling
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT
from nextword.model.hf import iter_weights
from nextword.planning.planner import plan_corpus
from nextword.planning.size_selection import TrainingPlan
from nextword.training.config import Recipe
from nextword.training.losses import causal_lm_loss
from nextword.training.parallel import check_tp_divisibility, load_weights_, to_full, unsharded
from nextword.training.step import autocast
from nextword.training.step_budget import StepSchedule
from nextword.training.trainer import FINALIZE_SECONDS, Trainer, ValidationResult


class PretrainTrainer(Trainer):
    """From nothing to a GPT. `begin` or `go_on` first, then `train`, then `finish`."""

    supports_distributed = True
    detects_loss_spikes = True

    def __init__(
        self, run_dir: RunDir, corpus: Corpus, recipe: Recipe, console: Console, device: torch.device, start_time: float
    ):
        super().__init__(run_dir, console, device, start_time)
        self.corpus, self.recipe = corpus, recipe
        self.overfitting_reported = False
        self.forward_seconds_per_batch = math.inf  # of one batch of tokens through the model, the fastest so far

    # ------------------------------------------------------------ begin, or go on

    def initialize(self, command: list[str], request: dict[str, Any]) -> None:
        seed = request["seed"] or 0
        train_tokens = self.corpus.tokens("train")
        if len(train_tokens) < 2:
            raise UsageError(
                f"{self.corpus.path}: the training part has {len(train_tokens)} tokens, too few to learn from"
            )
        self.world = self.world.with_tensor_parallel(self.recipe.training.tensor)
        plan = self.resolve_config()
        check_tp_divisibility(self.model_config, self.world.tp_size)
        training = self.recipe.training
        assert training.batch_tokens is not None
        data_parallel_size = self.world.dp_size
        batch_rows = data_parallel_size * max(
            1, round(training.batch_tokens / self.model_config.context_length / data_parallel_size)
        )
        if plan is not None and (self.recipe.tokens is not None or self.recipe.flops is not None):
            self.recipe = replace(self.recipe, steps=-(-plan.tokens // (batch_rows * self.model_config.context_length)))
        self._build(seed, batch_rows, num_threads=torch.get_num_threads())
        if plan is not None:
            self.seconds_per_step = plan.seconds_per_token * self.batch_tokens
        self.run_metadata = {
            "command": " ".join(command),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "recipe": self.recipe.to_dict(),
            **({} if plan is None else {"plan": plan.to_dict()}),
            **self.metadata(),
            "model": self.model_config.to_dict(),
            "parameters": self.model_config.parameters,
            "training": asdict(training),
            "seed": seed,
            "data": data_metadata(self.corpus),
            "shards": "data" if self.corpus.path == self.run_dir.data_dir else str(self.corpus.path.resolve()),
            "fixed": {"rows": batch_rows, **self.reproducibility_metadata()},
            **self.environment_metadata(),
        }

    def resume(self) -> None:
        self.run_metadata = self.run_dir.metadata()
        self.recipe = Recipe.from_dict(self.run_metadata["recipe"])
        self.model_config = ModelConfig.from_dict(self.run_metadata["model"])
        if self.run_metadata["data"]["fingerprint"] != self.corpus.fingerprint:
            differences_found = diff_settings(self.run_metadata["data"], data_metadata(self.corpus), "data")
            raise UsageError(
                f"{self.run_dir.path}: the text is not the one that this run began with, so going on would mix two runs:\n  "
                + "\n  ".join(differences_found)
                + "\nBegin a new one with another --out"
            )
        requested_size = self.recipe.training.tensor
        self.world = self.world.with_tensor_parallel(math.gcd(requested_size, self.world.world_size))
        if (actual_size := self.world.tp_size) != requested_size:
            self.console.warn(
                f"--training.tensor {requested_size} does not divide {self.world.world_size} processes: {actual_size} in its place"
            )
        fixed, data_parallel_size = self.run_metadata["fixed"], self.world.dp_size
        if fixed["rows"] % data_parallel_size:
            raise UsageError(
                f"{self.run_dir.path}: a step of {fixed['rows']} windows cannot be shared equally by {data_parallel_size}"
            )
        self._build(self.run_metadata["seed"], fixed["rows"], self.resume_num_threads())
        self.select_checkpoint()

    def resolve_config(self) -> TrainingPlan | None:
        """Settle what the recipe leaves open, size, batch, learning rate and dropout, by the plan that is given back."""
        recipe = self.recipe
        seconds_left = None if recipe.budget is None else recipe.budget - (self.now() - self.start_time)
        plan = plan_corpus(self.corpus, recipe, self.device, seconds=seconds_left, num_processes=self.world.world_size)
        for line in plan.summary_lines():
            self.console.info(line)
        training = replace(recipe.training, batch_tokens=plan.batch_tokens, lr=plan.lr)
        self.recipe = replace(recipe, size=plan.size, training=training)
        self.model_config = ModelConfig.from_dict({**plan.model, "dropout": recipe.model.get("dropout", plan.dropout)})
        return plan

    def _build(self, seed: int, batch_rows: int, num_threads: int) -> None:
        """Model, data and settings, all of them functions of the recipe and the seed."""
        self.training, self.target_steps, self.budget_seconds = (
            self.recipe.training,
            self.recipe.steps,
            self.recipe.budget,
        )
        self.batch_tokens = batch_rows * self.model_config.context_length
        torch.set_num_threads(num_threads)
        self.model = self._build_initial_model()
        self.loss_fn = causal_lm_loss
        self.dataset = TokenDataset(self.corpus.tokens("train"), self.model_config.context_length, batch_rows, seed)
        self.step_settings = self.build_step_settings(seed)

    def _build_initial_model(self) -> GPT:
        """The model before its first step; hollow, so that no process of several needs the memory for the whole of it."""
        return GPT.on_meta(self.model_config)

    def iter_init_weights(self) -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(derive_seed(self.step_settings.seed, 3))
        return self.model.first_weights()

    def metadata(self) -> dict[str, Any]:
        """What run.json says of this kind of run besides."""
        return {"preset": self.recipe.preset, "size": self.recipe.size}

    # ------------------------------------------------------------ what the loop asks for

    def validate(self, step_schedule: StepSchedule) -> ValidationResult | None:
        """Evenly spread windows of the held-out text: as many as cost about a twentieth of the steps between two looks."""
        validation = self.corpus.tokens("validation")
        if len(validation) < 2:
            return None
        tokens_between_validations = (
            step_schedule.decisions[0].total_steps / self.num_validations(step_schedule) * self.batch_tokens
        )
        max_windows = max(
            8, int(0.15 * tokens_between_validations / self.model_config.context_length)
        )  # a token costs a third of one in training
        eval_start = self.now()
        result = self.evaluate_validation(max_windows)
        seconds = (self.now() - eval_start) / result.tokens * self.batch_tokens
        self.forward_seconds_per_batch = min(self.forward_seconds_per_batch, seconds)
        return ValidationResult(
            score=-result.loss,
            metrics={"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens},
            summary=f"validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits/byte "
            f"(on {result.tokens:,} of {len(validation):,} tokens)",
        )

    def evaluate_validation(self, max_windows: int | None = None) -> Likelihood:
        """The model's loss on the validation part, the whole of it or evenly spread windows; by all processes together."""
        with unsharded(self.world, self.eager_step) as model:
            return self.evaluate_replicated(model, max_windows)

    def evaluate_replicated(self, model: GPT, max_windows: int | None = None) -> Likelihood:
        """The same of any model that all processes have."""
        n_bytes = self.corpus.validation.bytes
        dist_context = self.world if self.world.world_size > 1 else None
        with autocast(self.device, self.step_settings.bf16 and self.world.fsdp_per_block):
            return evaluate_perplexity(
                model, self.corpus.tokens("validation"), n_bytes, max_windows=max_windows, dist_context=dist_context
            )

    def save_best_model(self, metadata: dict[str, Any]) -> None:
        with unsharded(self.world, self.eager_step) as model:
            self.run_dir.save_model(model, self.corpus.tokenizer, metadata, gather=to_full)

    def documents_in_batch(self, batch_index: int) -> list[str]:
        return self.corpus.document_names(self.dataset.spans(batch_index))

    def on_no_improvement(self, step: int, result: ValidationResult) -> None:
        best = self.best.score or result.score
        if not self.overfitting_reported and self.best.since >= 2 and -result.score > 1.01 * -best:
            self.overfitting_reported = True
            self.log_event(
                step,
                f"held-out text gets worse since step {self.best.step:,}, while training goes on to improve: the model "
                "begins to memorise. The weights of that step are kept; more text, --model.dropout or a smaller size help",
            )

    def loss_to_bits_per_byte(self, loss: float) -> float:
        train = self.corpus.train
        return loss / math.log(2) * train.tokens / max(1, train.bytes)

    def estimate_finalize_seconds(self) -> float:
        """The whole validation part, at the fastest rate so far, and never more than a third of the budget: a slow
        moment of the machine must not end a run."""
        forward = min(self.forward_seconds_per_batch, self.seconds_per_step / 3)  # a step is three passes
        batches = len(self.corpus.tokens("validation")) / self.batch_tokens
        return min(FINALIZE_SECONDS + 1.1 * forward * batches, (self.budget_seconds or math.inf) / 3)

    def log_sample(self, step: int) -> None:
        """Let the model go on from the first words of the held-out text, where a process has the whole of it."""
        if self.world.forward_is_collective:
            return
        tokenizer, prompt_ids = self.corpus.tokenizer, self._sample_prompt_ids()
        with unsharded(self.world, self.eager_step) as model:
            if not self.world.is_main:
                return
            engine = Engine(model, tokenizer, seed=0)
            completion = engine.generate([prompt_ids], Sampling(max_tokens=100 if tokenizer.kind == "char" else 40))[0]
        prompt = tokenizer.decode(prompt_ids)
        self.run_dir.append_metrics({"step": step, "sample": {"prompt": prompt, "text": completion.text}})
        self.console.log_sample(step, prompt, completion.text)

    def _sample_prompt_ids(self) -> list[int]:
        """The first few words of the held-out text."""
        validation = self.corpus.tokens("validation")
        num_tokens = 24 if self.corpus.tokenizer.kind == "char" else 8
        return validation.read(0, min(num_tokens, len(validation))).tolist()

    # ------------------------------------------------------------ finish

    def finalize(self) -> dict[str, Any]:
        """Measure the kept weights on the whole validation part, and write result, card and report."""
        if self.world.is_main:
            verify_manifest(self.run_dir.model_dir)
        load_weights_(self.model, iter_weights(self.run_dir.model_dir, self.model_config), self.world)
        result: dict[str, Any] = {
            "parameters": self.model_config.parameters,
            "prompt": self.corpus.tokenizer.decode(self._sample_prompt_ids()).strip().partition("\n")[0],
        }
        if len(self.corpus.tokens("validation")) >= 2:
            evaluation = self.evaluate_validation()
            result |= {
                "loss": evaluation.loss,
                "perplexity": evaluation.perplexity,
                "bits_per_byte": evaluation.bits_per_byte,
                "validation_tokens": evaluation.tokens,
                "by_position": evaluation.by_position,
            }
        return self.write_results(result | self.metrics())

    def metrics(self) -> dict[str, Any]:
        """What this kind of run measures besides, of the weights that were kept."""
        return {}


def data_metadata(corpus: Corpus) -> dict[str, Any]:
    """What run.json says of the text."""
    return {
        "fingerprint": corpus.fingerprint,
        "documents": corpus.documents,
        "duplicates": corpus.duplicates,
        "train": asdict(corpus.train),
        "validation": asdict(corpus.validation),
        "problems": corpus.problems["total"],
        "tokenizer": {"kind": corpus.tokenizer.kind, "vocab_size": corpus.tokenizer.vocab_size},
    }
