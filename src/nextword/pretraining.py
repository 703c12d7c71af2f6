"""A pre-training run from its recipe to its report: what it trains, on which text, and how it looks at held-out text."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from nextword.console import Console
from nextword.errors import UsageError
from nextword.evaluation.likelihood import Likelihood, likelihood
from nextword.files import check_seal
from nextword.inference.engine import Engine
from nextword.inference.sampling import Sampling
from nextword.job import FINISHING_SECONDS, Job, Look
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT
from nextword.model.stock import weights_in
from nextword.planning import plan_corpus
from nextword.recipes import Recipe
from nextword.runs import RunFolder, differences
from nextword.text.batches import TokenDataset, seed_for
from nextword.text.corpus import Corpus
from nextword.training.objectives import next_word
from nextword.training.pace import Pace
from nextword.training.plan import Plan
from nextword.training.sharing import between_steps, fill, refuse_uneven, whole
from nextword.training.train import precision


class Pretraining(Job):
    """From nothing to a GPT. `begin` or `go_on` first, then `train`, then `finish`."""

    in_company = True
    can_spike = True

    def __init__(
        self, run: RunFolder, corpus: Corpus, recipe: Recipe, console: Console, device: torch.device, started: float
    ):
        super().__init__(run, console, device, started)
        self.corpus, self.recipe = corpus, recipe
        self.turned = False
        self.forward_seconds = math.inf  # of one batch of tokens through the model, the fastest so far

    # ------------------------------------------------------------ begin, or go on

    def begin(self, command: list[str], request: dict[str, Any]) -> None:
        seed = request["seed"] or 0
        train = self.corpus.tokens("train")
        if len(train) < 2:
            raise UsageError(f"{self.corpus.path}: the training part has {len(train)} tokens, too few to learn from")
        self.world.form_groups(self.recipe.training.tensor)
        plan = self.choose_model()
        refuse_uneven(self.config, self.world.tensor_size)
        t = self.recipe.training
        assert t.batch_tokens is not None
        shares = self.world.data_size
        rows = shares * max(1, round(t.batch_tokens / self.config.context_length / shares))
        if plan is not None and (self.recipe.tokens is not None or self.recipe.flops is not None):
            self.recipe = replace(self.recipe, steps=-(-plan.tokens // (rows * self.config.context_length)))
        self._build(seed, rows, threads=torch.get_num_threads())
        if plan is not None:
            self.seconds_per_step = plan.seconds_per_token * self.batch_tokens
        self.facts = {
            "command": " ".join(command),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "recipe": self.recipe.to_dict(),
            **({} if plan is None else {"plan": plan.to_dict()}),
            **self.own_facts(),
            "model": self.config.to_dict(),
            "parameters": self.config.parameters,
            "training": asdict(t),
            "seed": seed,
            "data": data_facts(self.corpus),
            "shards": "data" if self.corpus.path == self.run.data else str(self.corpus.path.resolve()),
            "fixed": {"rows": rows, **self.placed()},
            **self.common_facts(),
        }

    def go_on(self) -> None:
        self.facts = self.run.facts()
        self.recipe = Recipe.from_dict(self.facts["recipe"])
        self.config = ModelConfig.from_dict(self.facts["model"])
        if self.facts["data"]["fingerprint"] != self.corpus.fingerprint:
            changed = differences(self.facts["data"], data_facts(self.corpus), "data")
            raise UsageError(
                f"{self.run.path}: the text is not the one that this run began with, so going on would mix two runs:\n  "
                + "\n  ".join(changed)
                + "\nBegin a new one with another --out"
            )
        wanted = self.recipe.training.tensor
        self.world.form_groups(math.gcd(wanted, self.world.size))
        if (found := self.world.tensor_size) != wanted:
            self.console.warn(
                f"--training.tensor {wanted} does not divide {self.world.size} processes: {found} in its place"
            )
        fixed, shares = self.facts["fixed"], self.world.data_size
        if fixed["rows"] % shares:
            raise UsageError(f"{self.run.path}: a step of {fixed['rows']} windows cannot be shared equally by {shares}")
        self._build(self.facts["seed"], fixed["rows"], self.threads())
        self.find_checkpoint()

    def choose_model(self) -> Plan | None:
        """Settle what the recipe leaves open, size, batch, learning rate and dropout, by the plan that is given back."""
        recipe = self.recipe
        left = None if recipe.budget is None else recipe.budget - (self.now() - self.started)
        plan = plan_corpus(self.corpus, recipe, self.device, seconds=left, processes=self.world.size)
        for line in plan.in_words():
            self.console.say(line)
        training = replace(recipe.training, batch_tokens=plan.batch_tokens, lr=plan.lr)
        self.recipe = replace(recipe, size=plan.size, training=training)
        self.config = ModelConfig.from_dict({**plan.model, "dropout": recipe.model.get("dropout", plan.dropout)})
        return plan

    def _build(self, seed: int, rows: int, threads: int) -> None:
        """Model, data and settings, all of them functions of the recipe and the seed."""
        self.training, self.steps_wanted, self.budget = self.recipe.training, self.recipe.steps, self.recipe.budget
        self.batch_tokens = rows * self.config.context_length
        torch.set_num_threads(threads)
        self.model = self._first_model()
        self.objective = next_word
        self.data = TokenDataset(self.corpus.tokens("train"), self.config.context_length, rows, seed)
        self.settings = self.make_settings(seed)

    def _first_model(self) -> GPT:
        """The model before its first step; hollow, so that no process of several needs the memory for the whole of it."""
        return GPT.hollow(self.config)

    def first_weights(self) -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(seed_for(self.settings.seed, 3))
        return self.model.first_weights()

    def own_facts(self) -> dict[str, Any]:
        """What run.json says of this kind of run besides."""
        return {"preset": self.recipe.preset, "size": self.recipe.size}

    # ------------------------------------------------------------ what the loop asks for

    def look(self, pace: Pace) -> Look | None:
        """Evenly spread windows of the held-out text: as many as cost about a twentieth of the steps between two looks."""
        validation = self.corpus.tokens("validation")
        if len(validation) < 2:
            return None
        trained = pace.decisions[0].total_steps / self.looks(pace) * self.batch_tokens
        windows = max(8, int(0.15 * trained / self.config.context_length))  # a token costs a third of one in training
        begin = self.now()
        found = self.measure(windows)
        seconds = (self.now() - begin) / found.tokens * self.batch_tokens
        self.forward_seconds = min(self.forward_seconds, seconds)
        return Look(
            score=-found.loss,
            record={"loss": found.loss, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens},
            text=f"validation loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits/byte "
            f"(on {found.tokens:,} of {len(validation):,} tokens)",
        )

    def measure(self, windows: int | None = None) -> Likelihood:
        """The model's loss on the validation part, the whole of it or evenly spread windows; by all processes together."""
        with between_steps(self.world, self.plain_step) as model:
            return self.measure_alike(model, windows)

    def measure_alike(self, model: GPT, windows: int | None = None) -> Likelihood:
        """The same of any model that all processes have."""
        n_bytes = self.corpus.validation.bytes
        company = self.world if self.world.size > 1 else None
        with precision(self.device, self.settings.bf16 and self.world.by_block):
            return likelihood(model, self.corpus.tokens("validation"), n_bytes, limit_windows=windows, company=company)

    def keep(self, facts: dict[str, Any]) -> None:
        with between_steps(self.world, self.plain_step) as model:
            self.run.save_model(model, self.corpus.tokenizer, facts, gather=whole)

    def documents(self, index: int) -> list[str]:
        return self.corpus.names_in(self.data.spans(index))

    def got_worse(self, step: int, look: Look) -> None:
        best = self.best.score or look.score
        if not self.turned and self.best.since >= 2 and -look.score > 1.01 * -best:
            self.turned = True
            self.message(
                step,
                f"held-out text gets worse since step {self.best.step:,}, while training goes on to improve: the model "
                "begins to memorise. The weights of that step are kept; more text, --model.dropout or a smaller size help",
            )

    def bits_per_byte(self, loss: float) -> float:
        train = self.corpus.train
        return loss / math.log(2) * train.tokens / max(1, train.bytes)

    def finishing_seconds(self) -> float:
        """The whole validation part, at the fastest rate so far, and never more than a third of the budget: a slow
        moment of the machine must not end a run."""
        forward = min(self.forward_seconds, self.seconds_per_step / 3)  # a step is three passes
        batches = len(self.corpus.tokens("validation")) / self.batch_tokens
        return min(FINISHING_SECONDS + 1.1 * forward * batches, (self.budget or math.inf) / 3)

    def sample(self, step: int) -> None:
        """Let the model go on from the first words of the held-out text, where a process has the whole of it."""
        if self.world.in_step:
            return
        tokenizer, start = self.corpus.tokenizer, self._opening()
        with between_steps(self.world, self.plain_step) as model:
            if not self.world.leads:
                return
            engine = Engine(model, tokenizer, seed=0)
            completion = engine.generate([start], Sampling(max_tokens=100 if tokenizer.kind == "char" else 40))[0]
        prompt = tokenizer.decode(start)
        self.run.append({"step": step, "sample": {"prompt": prompt, "text": completion.text}})
        self.console.sample(step, prompt, completion.text)

    def _opening(self) -> list[int]:
        """The first few words of the held-out text."""
        validation = self.corpus.tokens("validation")
        words = 24 if self.corpus.tokenizer.kind == "char" else 8
        return validation.read(0, min(words, len(validation))).tolist()

    # ------------------------------------------------------------ finish

    def finish(self) -> dict[str, Any]:
        """Measure the kept weights on the whole validation part, and write result, card and report."""
        if self.world.leads:
            check_seal(self.run.model)
        fill(self.model, weights_in(self.run.model, self.config), self.world)
        result: dict[str, Any] = {
            "parameters": self.config.parameters,
            "prompt": self.corpus.tokenizer.decode(self._opening()).strip().partition("\n")[0],
        }
        if len(self.corpus.tokens("validation")) >= 2:
            measured = self.measure()
            result |= {
                "loss": measured.loss,
                "perplexity": measured.perplexity,
                "bits_per_byte": measured.bits_per_byte,
                "validation_tokens": measured.tokens,
                "by_position": measured.by_position,
            }
        return self.conclude(result | self.own_results())

    def own_results(self) -> dict[str, Any]:
        """What this kind of run measures besides, of the weights that were kept."""
        return {}


def data_facts(corpus: Corpus) -> dict[str, Any]:
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
