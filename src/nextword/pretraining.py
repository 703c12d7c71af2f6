"""A pre-training run from its recipe to its report: begin or go on, train, look, save, finish."""

import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nextword import files
from nextword.console import Console, duration
from nextword.errors import MissingExtra, UsageError
from nextword.evaluation.likelihood import Likelihood, likelihood
from nextword.evaluation.report import write_card, write_report
from nextword.inference.engine import Engine
from nextword.inference.sampling import Sampling
from nextword.model.config import ConfigError, ModelConfig, build_config
from nextword.model.gpt import GPT
from nextword.model.stock import load_model
from nextword.recipes import Recipe
from nextword.runs import Interrupted, RunFolder, catching_signals, machine, versions
from nextword.text.batches import TokenDataset, seed_for
from nextword.text.corpus import Corpus
from nextword.training import checkpoint, plan
from nextword.training.objectives import next_word
from nextword.training.optimizer import Optimizer
from nextword.training.pace import Clock, Decision, Pace, read_decisions
from nextword.training.train import (
    StepMetrics,
    StepSettings,
    TrainState,
    build_step_module,
    fit_micro_batch,
    probe,
    steps,
    worth_compiling,
)

SAMPLED = (1, 2, 4, 8, 12, 16, 20)  # the evaluations after which the model writes something
SAVE_SECONDS = 60.0  # between checkpoints, and never more than a thirtieth of the time goes into them
STEP_TOKENS = 4096  # of a run whose length is said in steps, where nothing else is said
FINISHING_SECONDS = 2.5  # the report, the card and the last files


@dataclass
class Best:
    """The best evaluation so far; `since` counts the ones after it."""

    loss: float | None = None
    step: int = 0
    since: int = 0


class Pretraining:
    """One run in progress. `begin` or `go_on` first, then `train`, then `finish`."""

    def __init__(
        self, run: RunFolder, corpus: Corpus, recipe: Recipe, console: Console, device: torch.device, started: float
    ):
        self.run, self.corpus, self.recipe, self.console, self.device = run, corpus, recipe, console, device
        self.started = started
        self.spent = 0.0
        self.best = Best()
        self.clock: Clock | None = None
        self.turned = self.stopped = False
        self.forward_seconds = math.inf  # of one batch of tokens through the model, the fastest so far
        self.curves: Any = None  # TensorBoard's writer, where it is asked for

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step, which the recipe names once the run has begun."""
        assert self.recipe.training.batch_tokens is not None
        return self.recipe.training.batch_tokens

    # ------------------------------------------------------------ begin, or go on

    def begin(self, seed: int, command: list[str], request: dict[str, Any]) -> None:
        """Decide once what the run fixes, and write it down."""
        train = self.corpus.tokens("train")
        if len(train) < 2:
            raise UsageError(f"{self.corpus.path}: the training part has {len(train)} tokens, too few to learn from")
        self.config = self._choose_config(len(train))
        recipe, t = self.recipe, self.recipe.training
        rows = max(1, round(self.batch_tokens / self.config.context_length))
        self._build(seed, rows, threads=torch.get_num_threads())
        self.settings = replace(
            self.settings,
            micro_batch_rows=t.micro_batch_rows or fit_micro_batch(self.plain_step, self.data, self.settings),
        )
        # The first guess of a step's time, from gradients that are thrown away; then whether to compile.
        self.seconds_per_step = probe(self.state, self.plain_step, self.data, self.settings)
        steps_wanted = recipe.steps
        if recipe.tokens is not None:
            steps_wanted = -(-recipe.tokens // (rows * self.config.context_length))
        length = recipe.budget if recipe.budget is not None else (steps_wanted or 0) * self.seconds_per_step
        compiled, why = (t.compile == "yes", "") if t.compile != "auto" else worth_compiling(self.device, length)
        if why:
            self.console.say(why)
        self.compile(compiled)
        self.facts = {
            "command": " ".join(command),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "recipe": replace(recipe, steps=steps_wanted).to_dict(),
            "preset": recipe.preset,
            "size": recipe.size,
            "model": self.config.to_dict(),
            "parameters": self.config.parameters,
            "training": asdict(t),
            "seed": seed,
            "data": data_facts(self.corpus),
            "shards": "data" if self.corpus.path == self.run.data else str(self.corpus.path.resolve()),
            # Bit-equality is promised where these stay the same, so a resume takes them from here.
            "fixed": {
                "rows": rows,
                "micro_batch_rows": self.settings.micro_batch_rows,
                "compiled": compiled,
                "threads": torch.get_num_threads(),
                "world_size": 1,
                "device": self.device.type,
            },
            "versions": versions(),
            "machine": machine(self.device),
        }
        self.recipe = replace(recipe, steps=steps_wanted)
        self.run.write_facts(self.facts)
        files.write_durably(self.run.metrics, "")

    def go_on(self) -> None:
        """Take everything from the run folder, and stand where its newest whole checkpoint stands."""
        self.facts = self.run.facts()
        self.recipe = Recipe.from_dict(self.facts["recipe"])
        self.config = ModelConfig.from_dict(self.facts["model"])
        if self.facts["data"]["fingerprint"] != self.corpus.fingerprint:
            raise UsageError(
                f"{self.run.path}: the text is not the one that this run began with, so going on would mix two runs. "
                "Begin a new one with another --out"
            )
        fixed = self.facts["fixed"]
        if fixed["device"] != self.device.type:
            self.console.warn(
                f"this run began on {fixed['device']} and goes on on {self.device.type}: equal within rounding, not bit for bit"
            )
        if self.facts["versions"]["torch"] != torch.__version__:
            self.console.warn(
                f"this run began with torch {self.facts['versions']['torch']} and goes on with {torch.__version__}: "
                "equal within rounding, not bit for bit"
            )
        self._build(self.facts["seed"], fixed["rows"], fixed["threads"])
        self.settings = replace(self.settings, micro_batch_rows=fixed["micro_batch_rows"])
        whole = checkpoint.newest_whole(self.run.path, self.console.warn)
        step = 0
        if whole is not None:
            weights, optimizer, facts = checkpoint.load(whole, self.device)
            self.state.model.load_state_dict(weights)
            self.state.optimizer.load_state_tensors(optimizer)
            saved = facts["state"]
            self.state.step, self.state.tokens, self.state.bad = saved["step"], saved["tokens"], saved["bad"]
            self.best, self.stopped, step = Best(**saved["best"]), saved["stopped"], saved["step"]
        self.spent = self.run.cut_back(step)
        self.compile(fixed["compiled"])
        self.seconds_per_step = probe(self.state, self.step_module, self.data, self.settings)
        self.console.say(f"going on from step {step:,}, {duration(self.spent)} in")

    def _choose_config(self, unique_tokens: int) -> ModelConfig:
        recipe, vocab_size = self.recipe, self.corpus.tokenizer.vocab_size
        operations = None
        if recipe.budget is not None:
            left = max(1.0, recipe.budget - (time.time() - self.started) - FINISHING_SECONDS)
            operations = left * 0.5 * plan.matmul_rate(self.device)  # half of a product's rate is what a step reaches
        tokens = recipe.tokens or (recipe.steps or 0) * (recipe.training.batch_tokens or STEP_TOKENS)
        choice = plan.choose(
            recipe.preset, vocab_size, unique_tokens, operations=operations, tokens=tokens, size=recipe.size
        )
        overrides = {"dropout": choice.dropout, **recipe.model}
        if not {"n_layers", "d_model"} & set(recipe.model):
            self.console.say(choice.why)
        batch_tokens = recipe.training.batch_tokens or (STEP_TOKENS if recipe.steps else choice.batch_tokens)
        training = replace(recipe.training, batch_tokens=batch_tokens)
        self.recipe = recipe = replace(recipe, size=choice.size, training=training)
        try:
            return build_config(recipe.preset, choice.size, vocab_size=vocab_size, **overrides)
        except ConfigError as error:
            raise UsageError(str(error)) from error

    def _build(self, seed: int, rows: int, threads: int) -> None:
        """Model, optimizer, data and step, all of them functions of the recipe and the seed."""
        t = self.recipe.training
        torch.set_num_threads(threads)
        torch.manual_seed(seed_for(seed, 3))
        model = GPT(self.config).to(self.device)
        optimizer = Optimizer(
            model, kind=t.optimizer, lr=t.lr, matrix_lr=t.matrix_lr, betas=(t.beta1, t.beta2),
            weight_decay=t.weight_decay, momentum=t.momentum,
        )  # fmt: skip
        self.state = TrainState(model, optimizer)
        self.data = TokenDataset(self.corpus.tokens("train"), self.config.context_length, rows, seed)
        self.settings = StepSettings(
            seed=seed, clip=t.clip, schedule=t.schedule, warmup=t.warmup, final_lr=t.final_lr,
            bf16=self.device.type == "cuda" and torch.cuda.is_bf16_supported(),
        )  # fmt: skip
        self.plain_step, self.step_module = build_step_module(model, next_word, compiled=False)

    def compile(self, wanted: bool) -> None:
        if wanted:
            self.plain_step, self.step_module = build_step_module(self.state.model, next_word, compiled=True)

    # ------------------------------------------------------------ train

    def seconds(self) -> float:
        """Wall time that the run has used, in all of its processes."""
        return time.time() - self.started + self.spent

    def train(self, tensorboard: bool = False) -> None:
        """The loop: a step, its line, and now and then a look at held-out text, a sample, a checkpoint.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            Diverged: see `steps`.
        """
        recipe = self.recipe
        self.curves = open_tensorboard(self.run.path) if tensorboard else None
        if recipe.steps is not None:
            pace = Pace([Decision(0, recipe.steps)])
        else:
            assert recipe.budget is not None
            pace = Pace(read_decisions(self.run.decisions))
            self.clock = Clock(recipe.budget, self.run.decisions, started=self.started, spent=self.spent)
            self.clock.reserve = self._finishing_seconds(self.seconds_per_step / 3)  # a step is three passes
        saved_at, save_seconds = time.monotonic(), 0.0
        before, tokens_before = time.monotonic(), self.state.tokens
        with catching_signals() as caught:
            if self.stopped:
                return
            loop = steps(
                self.state, self.data, self.step_module, self.settings, pace, self.clock, self.seconds_per_step
            )
            for metrics in loop:
                rate = (self.state.tokens - tokens_before) / max(1e-9, time.monotonic() - before)
                self._record(metrics, rate)
                self._evaluate_when_due(metrics, pace)
                last = metrics.progress >= 1 or self.stopped
                due = (
                    metrics.step % recipe.training.save_every == 0
                    if recipe.training.save_every
                    else time.monotonic() - saved_at > max(SAVE_SECONDS, 30 * save_seconds)
                )
                if due or last or caught:
                    begin = time.monotonic()
                    self._save()
                    saved_at, save_seconds = time.monotonic(), time.monotonic() - begin
                if caught and not last:
                    raise Interrupted(
                        f"stopped at step {metrics.step:,}, and saved. Go on with the same command and --resume",
                        caught[0],
                    )
                if self.stopped:
                    break
                before, tokens_before = time.monotonic(), self.state.tokens

    def _record(self, metrics: StepMetrics, rate: float) -> None:
        seconds = self.seconds()
        self.run.append(
            {
                "step": metrics.step,
                "loss": metrics.loss,
                "lr": metrics.lr,
                "tokens": metrics.tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(rate, 1),
                "gradient_norm": metrics.gradient_norm,
                "skipped": metrics.skipped,
            }
        )
        if self.curves is not None:
            for name in ("loss", "lr", "gradient_norm"):
                self.curves.add_scalar(f"training/{name}", getattr(metrics, name), metrics.step)
        if metrics.skipped:
            self.message(metrics.step, f"step {metrics.step:,}: the loss is not finite; this step is left out")
        if self.recipe.budget is not None:
            left = self.recipe.budget - seconds
        else:
            left = seconds / metrics.progress * (1 - metrics.progress)
        train = self.corpus.train
        bits = metrics.loss / math.log(2) * train.tokens / max(1, train.bytes)
        self.console.training(metrics, bits_per_byte=bits, tokens_per_second=rate, seconds_left=max(0.0, left))

    def _evaluate_when_due(self, metrics: StepMetrics, pace: Pace) -> None:
        """A look at part of the held-out text at equal parts of the run; the best weights are kept as RUN/model."""
        wanted = self._looks(pace)
        index = metrics.step - 1
        number = math.floor(metrics.progress * wanted + 1e-9)
        if number == math.floor((pace.progress(index - 1) if index else 0.0) * wanted + 1e-9):
            return
        validation = self.corpus.tokens("validation")
        if len(validation) < 2:  # nothing is held out: the newest weights are the ones that are kept
            self._save_best(metrics.step, None)
            return
        begin = time.perf_counter()
        look = self.look(self.state.model, windows=self._windows_per_look(pace))
        rate = (time.perf_counter() - begin) / look.tokens
        if self.clock is not None:
            self.clock.reserve = self._finishing_seconds(rate * self.batch_tokens)
        self.run.append(
            {
                "step": metrics.step,
                "validation": {"loss": look.loss, "bits_per_byte": look.bits_per_byte, "tokens": look.tokens},
            }
        )
        if self.curves is not None:
            self.curves.add_scalar("validation/loss", look.loss, metrics.step)
        self.console.say(
            f"step {metrics.step:,}: validation loss {look.loss:.4f}, {look.bits_per_byte:.4f} bits/byte "
            f"(on {look.tokens:,} of {len(validation):,} tokens)"
        )
        if math.isfinite(look.loss) and (self.best.loss is None or look.loss < self.best.loss):
            self._save_best(metrics.step, look.loss)
        else:
            self.best.since += 1
            self._watch_for_memorisation(metrics.step, look.loss)
        if round(20 * number / wanted) in SAMPLED:
            self._write_sample(metrics.step)

    def _save_best(self, step: int, loss: float | None) -> None:
        self.best = Best(loss, step)
        self.run.save_model(self.state.model, self.corpus.tokenizer, {"step": step, "validation_loss": loss})

    def _watch_for_memorisation(self, step: int, loss: float) -> None:
        patience = self.recipe.training.patience
        if patience is not None and self.best.since >= patience:
            self.stopped = True
            self.message(
                step, f"no better evaluation in {self.best.since}: stopped early, step {self.best.step:,} is kept"
            )
        elif not self.turned and self.best.since >= 2 and loss > 1.01 * (self.best.loss or loss):
            self.turned = True
            self.message(
                step,
                f"held-out text gets worse since step {self.best.step:,}, while training goes on to improve: the model "
                "begins to memorise. The weights of that step are kept; more text, --model.dropout or a smaller size help",
            )

    def message(self, step: int, text: str) -> None:
        self.run.append({"step": step, "message": text})
        self.console.say(text)

    def look(self, model: GPT, windows: int | None = None) -> Likelihood:
        """The loss on the validation part, the whole of it or evenly spread windows."""
        n_bytes = self.corpus.validation.bytes
        return likelihood(model, self.corpus.tokens("validation"), n_bytes, limit_windows=windows)

    def _looks(self, pace: Pace) -> int:
        """How many evaluations: as many as the recipe says, but at least ten steps apart."""
        return min(self.recipe.training.evaluations, max(1, pace.decisions[0].total_steps // 10))

    def _windows_per_look(self, pace: Pace) -> int:
        """As many windows as cost about a twentieth of the steps between two looks; the same at each, so that they compare."""
        trained = pace.decisions[0].total_steps / self._looks(pace) * self.batch_tokens
        return max(
            8, int(0.15 * trained / self.config.context_length)
        )  # a token costs a third of what it does in training

    def _finishing_seconds(self, forward_seconds: float) -> float:
        """What is to be done after the last step: the whole validation part, at `forward_seconds` a batch of tokens.

        The fastest rate so far counts, and never more than a third of the budget: a slow moment of the machine must not
        end a run.
        """
        self.forward_seconds = min(self.forward_seconds, forward_seconds)
        batches = len(self.corpus.tokens("validation")) / self.batch_tokens
        return min(FINISHING_SECONDS + 1.1 * self.forward_seconds * batches, (self.recipe.budget or math.inf) / 3)

    def _write_sample(self, step: int) -> None:
        """Let the model go on from the first words of the held-out text."""
        tokenizer, start = self.corpus.tokenizer, self._opening()
        engine = Engine(self.state.model, tokenizer, seed=0)
        completion = engine.generate([start], Sampling(max_tokens=100 if tokenizer.kind == "char" else 40))[0]
        prompt = tokenizer.decode(start)
        self.run.append({"step": step, "sample": {"prompt": prompt, "text": completion.text}})
        self.console.sample(step, prompt, completion.text)

    def _opening(self) -> list[int]:
        """The first few words of the held-out text."""
        validation = self.corpus.tokens("validation")
        words = 24 if self.corpus.tokenizer.kind == "char" else 8
        return validation.read(0, min(words, len(validation))).tolist()

    def _save(self) -> None:
        state = self.state
        facts = {**state.facts(), "best": asdict(self.best), "stopped": self.stopped}
        weights = dict(state.model.state_dict())
        checkpoint.save(self.run.path, state.step, weights, state.optimizer.state_tensors(), facts)

    # ------------------------------------------------------------ finish

    def finish(self) -> dict[str, Any]:
        """Measure the kept weights on the whole validation part, and write result, card and report."""
        model = load_model(self.run.model, self.device)
        result: dict[str, Any] = {
            "run": str(self.run.path),
            "model": str(self.run.model),
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "best_step": self.best.step,
            "parameters": self.config.parameters,
            "prompt": self.corpus.tokenizer.decode(self._opening()).strip().partition("\n")[0],
        }
        if len(self.corpus.tokens("validation")) >= 2:
            measured = self.look(model)
            result |= {
                "loss": measured.loss,
                "perplexity": measured.perplexity,
                "bits_per_byte": measured.bits_per_byte,
                "validation_tokens": measured.tokens,
                "by_position": measured.by_position,
            }
        result["seconds"] = round(self.seconds(), 3)
        files.write_durably(self.run.result, files.to_json(result))
        write_card(self.run.path)
        write_report(self.run.path)
        return result


def open_tensorboard(run: Path) -> Any:
    """A writer of TensorBoard's event files. Raises `MissingExtra` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("--tensorboard", "tensorboard") from error
    return SummaryWriter(run / "tensorboard")


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


def choose_device(name: str) -> torch.device:
    """The device by name; "auto" is the GPU where there is one. Raises `UsageError` where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
