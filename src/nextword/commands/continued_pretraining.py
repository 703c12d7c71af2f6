"""Pre-training that goes on: more text of one's own domain, and a measurement of what was forgotten of the old."""

from dataclasses import replace
from typing import Any

import torch

from nextword.commands.pretrain import PretrainTrainer
from nextword.common.console import Console
from nextword.common.run_dir import RunDir
from nextword.data.corpus import Corpus
from nextword.model.gpt import GPT
from nextword.model.hf import load_model
from nextword.pipeline.base_model import BaseModel, evaluate_forgetting
from nextword.planning.planner import DEFAULT_BATCH_TOKENS
from nextword.planning.size_selection import default_peak_lr
from nextword.training.config import Recipe
from nextword.training.parallel import unsharded


class ContinuedPretrainTrainer(PretrainTrainer):
    """As `Pretraining`, from a model that is there already, with its tokenizer."""

    def __init__(
        self, run_dir: RunDir, base_model: BaseModel, corpus: Corpus, recipe: Recipe, console: Console, device: torch.device,
        start_time: float,
    ):  # fmt: skip
        super().__init__(run_dir, corpus, recipe, console, device, start_time)
        self.base_model = base_model

    def resolve_config(self) -> None:
        """The model's own shape; the dropout is the recipe's, and the learning rate a third of what a fresh one takes."""
        config, t = load_model(self.base_model.directory).config, self.recipe.training
        batch_tokens = t.batch_tokens or DEFAULT_BATCH_TOKENS
        lr = t.lr or default_peak_lr(config.d_model, batch_tokens, t.optimizer) / 3
        self.recipe = replace(self.recipe, training=replace(t, batch_tokens=batch_tokens, lr=lr))
        self.model_config = replace(config, n_labels=0, dropout=self.recipe.model.get("dropout", 0.0))

    def _build_initial_model(self) -> GPT:
        weights = load_model(self.base_model.directory, self.device).state_dict()
        return GPT.from_weights(self.model_config, {name: w for name, w in weights.items() if name != "score.weight"})

    def metadata(self) -> dict[str, Any]:
        return {"task": {"task": "continue"}, **self.base_model.metadata()}

    def metrics(self) -> dict[str, Any]:
        """The loss on the new text before it was learned, and on the old text before and after."""
        metrics: dict[str, Any] = {"task": "continue"}
        if len(self.corpus.tokens("validation")) >= 2:
            base_result = self.evaluate_replicated(load_model(self.base_model.directory, self.device))
            metrics["before"] = {"loss": base_result.loss, "bits_per_byte": base_result.bits_per_byte}
        with unsharded(self.world, self.eager_step) as model:
            return {**metrics, "forgetting": evaluate_forgetting(self.base_model, model)}
