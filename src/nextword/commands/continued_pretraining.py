"""Pre-training that goes on: more text of one's own domain, and a measurement of what was forgotten of the old."""

from dataclasses import replace
from typing import Any

import torch

from nextword.commands.pretrain import Pretraining
from nextword.common.console import Console
from nextword.common.run_dir import RunFolder
from nextword.data.corpus import Corpus
from nextword.model.gpt import GPT
from nextword.model.hf import load_model
from nextword.pipeline.base_model import Base, forgetting
from nextword.planning.planner import STEP_TOKENS
from nextword.planning.size_selection import peak_lr
from nextword.training.config import Recipe
from nextword.training.parallel import between_steps


class Continuing(Pretraining):
    """As `Pretraining`, from a model that is there already, with its tokenizer."""

    def __init__(
        self, run: RunFolder, base: Base, corpus: Corpus, recipe: Recipe, console: Console, device: torch.device,
        started: float,
    ):  # fmt: skip
        super().__init__(run, corpus, recipe, console, device, started)
        self.base = base

    def choose_model(self) -> None:
        """The model's own shape; the dropout is the recipe's, and the learning rate a third of what a fresh one takes."""
        config, t = load_model(self.base.directory).config, self.recipe.training
        batch_tokens = t.batch_tokens or STEP_TOKENS
        lr = t.lr or peak_lr(config.d_model, batch_tokens, t.optimizer) / 3
        self.recipe = replace(self.recipe, training=replace(t, batch_tokens=batch_tokens, lr=lr))
        self.config = replace(config, n_labels=0, dropout=self.recipe.model.get("dropout", 0.0))

    def _first_model(self) -> GPT:
        weights = load_model(self.base.directory, self.device).state_dict()
        return GPT.from_weights(self.config, {name: w for name, w in weights.items() if name != "score.weight"})

    def own_facts(self) -> dict[str, Any]:
        return {"task": {"task": "continue"}, **self.base.facts()}

    def own_results(self) -> dict[str, Any]:
        """The loss on the new text before it was learned, and on the old text before and after."""
        found: dict[str, Any] = {"task": "continue"}
        if len(self.corpus.tokens("validation")) >= 2:
            before = self.measure_alike(load_model(self.base.directory, self.device))
            found["before"] = {"loss": before.loss, "bits_per_byte": before.bits_per_byte}
        with between_steps(self.world, self.plain_step) as model:
            return {**found, "forgetting": forgetting(self.base, model)}
