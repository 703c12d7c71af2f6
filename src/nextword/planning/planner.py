"""A plan for real: the text is read, the machine tried at the sizes that come into question, the choice made."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextword.common.console import Console
from nextword.common.energy import Meter
from nextword.common.errors import NextwordError, UsageError
from nextword.common.fs import MANIFEST
from nextword.common.run_dir import peak_memory
from nextword.data.corpus import Corpus, find_sources, prepare
from nextword.data.dataset import TokenDataset, TokenSource
from nextword.data.documents import Problems, Source
from nextword.data.tokenizer import vocab_size_for
from nextword.model import fused
from nextword.model.config import SIZES, ConfigError, ModelConfig, build_config
from nextword.model.gpt import GPT
from nextword.planning.cluster_estimate import (
    GPUS,
    PER_PARAMETER,
    UTILISATION,
    Cluster,
    on_paper,
    shape_for,
)
from nextword.planning.scaling_law import difficulty
from nextword.planning.size_selection import Length, Plan, Speed, Text, choose, flops_of
from nextword.training.config import Recipe, count
from nextword.training.losses import next_word
from nextword.training.optimizer import Optimizer
from nextword.training.step import (
    StepSettings,
    TrainState,
    available_memory,
    build_step_module,
    bytes_of_weights,
    bytes_per_row,
    fit_micro_batch,
    probe,
)
from nextword.training.trainer import FINISHING_SECONDS

SAMPLE = 2**25  # bytes of a large corpus that are looked at: some ten seconds' work
EXPANDED = 3  # bytes of text in a byte of a packed file, about
TRIED_TOKENS = 2048  # of the steps by which a CPU's speed is measured
PAPER_VOCABULARY = 50_000  # of a model that is planned without its text
STEP_TOKENS = 4096  # of a run whose length is said in steps, where nothing else is said


# ---------------------------------------------------------------- the machine


class Trials:
    """This machine, which is asked how fast it trains a size: with real steps on the real text, from fresh weights."""

    def __init__(self, tokens: TokenSource, recipe: Recipe, device: torch.device, bf16: bool, processes: int = 1):
        self.tokens, self.recipe, self.device, self.bf16, self.processes = tokens, recipe, device, bf16, processes
        self.rate = matmul_rate(device)
        self.memory = peak_memory(device)  # with all that is imported

    def speed(self, config: ModelConfig, batch_tokens: int) -> Speed:
        if self.processes > 1 and 16 * config.parameters > 0.5 * available_memory(self.device):
            return self._assumed(config)
        model = GPT(config).to(self.device)
        recompute = self.recipe.training.checkpoint_activations
        kind = "fused" if fused.available(model) and not recompute else "plain"
        step, _ = build_step_module(model, next_word, kind, recompute)
        data = self._dataset(config, batch_tokens)
        settings = StepSettings(bf16=self.bf16)
        rows = self.recipe.training.micro_batch_rows or fit_micro_batch(step, data, settings)
        memory = self.memory + bytes_of_weights(model) + rows * bytes_per_row(step, data, settings)
        few = self._dataset(config, min(batch_tokens, TRIED_TOKENS)) if self.device.type == "cpu" else data
        state = TrainState(model, optimizer_of(model, self.recipe))
        seconds = probe(state, step, few, replace(settings, micro_batch_rows=rows))
        seconds = seconds / tokens_of(few) + optimizer_seconds(state) / tokens_of(data)
        return Speed(seconds / self.processes, memory)

    def _assumed(self, config: ModelConfig) -> Speed:
        """Of a model that one process alone has no memory to try: what the matrix products would take at the usual share of
        their rate, and its part of the weights, the gradients and the averages."""
        seconds = flops_of(config) / (UTILISATION * self.rate)
        return Speed(seconds / self.processes, self.memory + 16 * config.parameters // self.processes)

    def _dataset(self, config: ModelConfig, batch_tokens: int) -> TokenDataset:
        rows = max(1, round(batch_tokens / config.context_length))
        return TokenDataset(self.tokens, config.context_length, rows, seed=0)


def tokens_of(data: TokenDataset) -> int:
    """Tokens of a batch."""
    return data.rows_per_batch * data.context_length


def optimizer_of(model: GPT, recipe: Recipe) -> Optimizer:
    t = recipe.training
    return Optimizer(model, kind=t.optimizer, lr=t.lr or 1.0, weight_decay=t.weight_decay, momentum=t.momentum)


def optimizer_seconds(state: TrainState) -> float:
    """Of one step of the optimizer, by the faster of two."""
    seconds, device = [], state.model.unembedding.device
    for _ in range(2):
        for p in state.model.parameters():
            p.grad = torch.zeros_like(p)
        start = time.perf_counter()
        state.optimizer.step(0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second that this device does in a matrix product of the kind that training is made of."""
    n = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):  # the best of five, since others may use the machine as well
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------- the choice


def sizes_for(recipe: Recipe, vocab_size: int, device: torch.device) -> dict[str, ModelConfig]:
    """The models that come into question, by size: of a recipe that names one, that one; else all that memory holds.

    Raises:
        UsageError: the recipe's settings make no model.
    """
    found: dict[str, ModelConfig] = {}
    refused: ConfigError | None = None
    room = 0.5 * available_memory(device)
    for size in [recipe.size] if recipe.size else SIZES:
        try:
            config = build_config(recipe.preset, size, vocab_size=vocab_size, **recipe.model)
        except ConfigError as error:
            refused = refused or error
            continue
        if found and 16 * config.parameters > room:
            break
        found[size] = config
    if not found:
        raise UsageError(str(refused)) from refused
    return found


def plan_corpus(
    corpus: Corpus, recipe: Recipe, device: torch.device, *, seconds: float | None = None, scale: float = 1.0,
    processes: int = 1,
) -> Plan:  # fmt: skip
    """The plan of a run on a prepared corpus.

    Args:
        seconds: what is left of a budget, from now to the end.
        scale: how many times larger the whole text is than this corpus of it.
        processes: how many do the work of one step together, each as fast as this one.
    """
    parts = corpus.train.tokens, corpus.train.bytes, corpus.validation.tokens
    tokens, n_bytes, held_out = (round(scale * count) for count in parts)
    if seconds is not None:
        length = Length(seconds=max(1.0, seconds - FINISHING_SECONDS))
    elif recipe.flops is not None:
        length = Length(flops=recipe.flops)
    else:
        said = (recipe.steps or 0) * (recipe.training.batch_tokens or STEP_TOKENS)
        length = Length(tokens=recipe.tokens or said)
    batch = recipe.training.batch_tokens or (STEP_TOKENS if recipe.steps else None)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    hard = difficulty(corpus)
    return choose(
        Text(tokens, n_bytes, hard.bits, held_out, hard.doubt), length,
        sizes_for(recipe, corpus.tokenizer.vocab_size, device), Trials(corpus.tokens("train"), recipe, device, bf16, processes),
        batch=batch, lr=recipe.training.lr, optimizer=recipe.training.optimizer,
    )  # fmt: skip


# ---------------------------------------------------------------- machines that are not here


def plan_on_paper(
    recipe: Recipe, gpu: str, *, machines: int = 1, gpus_per_machine: int = 8, parameters: str | None = None,
    price: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a recipe would need and give on GPUs that are known by their datasheets, and of which model.

    Args:
        parameters: about how many, as people write it ("7B"); else the recipe's size; else what is best for as many operations.
        price: of a GPU hour.

    Raises:
        UsageError: no such GPU, no model, or none that fits.
    """
    if gpu.lower() not in GPUS:
        raise UsageError(f"--gpu {gpu}: no datasheet of it here; known are {', '.join(GPUS)}")
    if machines < 1 or gpus_per_machine < 1:
        raise UsageError("--machines and --gpus-per-machine must be at least 1")
    if parameters is not None and recipe.size is not None:
        raise UsageError("--parameters and --size exclude each other: say one")
    cluster = Cluster(GPUS[gpu.lower()], machines, gpus_per_machine)
    flops = recipe.flops
    if flops is None and recipe.tokens is None and recipe.budget is not None:
        flops = recipe.budget * cluster.size * cluster.gpu.flops * UTILISATION
    wanted = None if parameters is None else float(count(parameters))
    if wanted is None and recipe.size is None:
        # Best for so many operations C = 6 N D is D = 20 N; for so many tokens, a twentieth of them.
        wanted = math.sqrt(flops / 6 / PER_PARAMETER) if flops else (recipe.tokens or 0) / PER_PARAMETER
        if wanted < 1e5:
            raise UsageError(
                "say how large the model is to be (--parameters 7B), or how long it is to be trained (--tokens 2T)"
            )
    config = config_on_paper(recipe, wanted)
    tokens = recipe.tokens or (flops / flops_of(config) if flops else PER_PARAMETER * config.parameters)
    found = on_paper(config, tokens, cluster, batch_tokens=recipe.training.batch_tokens, price=price)
    return {
        **found.to_dict(),
        "gpu": gpu.lower(),
        "gpus": cluster.size,
        "machines": machines,
        "model": config.to_dict(),
    }


def config_on_paper(recipe: Recipe, parameters: float | None) -> ModelConfig:
    """The model of a recipe, at about so many parameters where they are said. Raises `UsageError` where there is none."""
    settings = dict(recipe.model)
    if parameters is not None:
        n_layers, n_heads, d_model = shape_for(parameters)
        settings = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "context_length": 4096, **settings}
    try:
        return build_config(
            recipe.preset, recipe.size or "125m", vocab_size=recipe.vocab_size or PAPER_VOCABULARY, **settings
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error


# ---------------------------------------------------------------- a text that is not prepared yet


@dataclass(frozen=True)
class Glance:
    """A corpus that was prepared to be looked at: the whole of a small text, a sample of a large one."""

    corpus: Corpus
    scale: float  # how many times larger the text is
    seconds: float  # that its preparation will take, about


def glance(
    corpora: Sequence[str], folder: Path, recipe: Recipe, text_column: str | None, strict: bool, console: Console
) -> Glance:
    """Prepare a text, or evenly chosen beginnings of its files, in a folder.

    Raises:
        NextwordError: there is no text; UsageError: a path is not there.
    """
    if any((Path(path) / MANIFEST).is_file() for path in corpora):
        return Glance(Corpus.open(Path(corpora[0])), 1.0, 0.0)
    sources = find_sources(corpora, Problems(strict), text_column)
    size, started, scale = sum(map(text_bytes, sources)), time.monotonic(), 1.0
    vocab_size, texts = recipe.vocab_size, list(corpora)
    if size > SAMPLE:
        sample = folder / "sample.jsonl"
        scale = size / write_sample(sources, size, sample)
        texts, text_column = [str(sample)], None
        vocab_size = vocab_size or (vocab_size_for(size) if recipe.tokenizer == "bpe" else None)
    corpus = prepare(
        texts, folder / "shards", tokenizer=recipe.tokenizer, vocab_size=vocab_size, text_column=text_column,
        strict=strict, progress=console.progress, say=console.say,
    )  # fmt: skip
    return Glance(corpus, scale, scale * (time.monotonic() - started))


def text_bytes(source: Source) -> int:
    """About how many bytes of text a file holds."""
    packed = source.path.suffix in (".gz", ".zst", ".parquet")
    try:
        return source.path.stat().st_size * (EXPANDED if packed else 1)
    except OSError:  # its reader says so
        return 0


def write_sample(sources: Iterable[Source], size: int, path: Path) -> int:
    """The same share of every file, from its beginning, as JSON Lines; how many bytes of text that is."""
    written = owed = 0.0
    with path.open("w", encoding="utf-8") as file:
        for source in sources:
            owed += SAMPLE * text_bytes(source) / size
            for document in source.read(Problems()):
                if written >= owed:
                    break
                text = "".join(_up_to(document.pieces, int(owed - written)))
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
    if not written:
        raise NextwordError("no text was found in the beginnings of the files")
    return int(written)


def _up_to(pieces: Iterable[str], characters: int) -> Iterable[str]:
    for piece in pieces:
        yield piece[:characters]
        characters -= len(piece)
        if characters <= 0:
            return


def plan_text(
    corpora: Sequence[str], recipe: Recipe, device: torch.device, *, text_column: str | None, strict: bool, console: Console
) -> dict[str, Any]:  # fmt: skip
    """What a run of this recipe on these texts would be: the plan, what was found of the text, energy and preparation."""
    with TemporaryDirectory(prefix="nextword-plan-") as folder:
        seen = glance(corpora, Path(folder), recipe, text_column, strict, console)
        console.say("trying sizes on this machine …")
        meter = Meter(device)
        left = None if recipe.budget is None else recipe.budget - seen.seconds
        if left is not None and left < FINISHING_SECONDS:
            raise UsageError(
                f"a budget of {recipe.budget:.0f} s is too short: to prepare this text takes about {seen.seconds:.0f} s"
            )
        plan = plan_corpus(seen.corpus, recipe, device, seconds=left, scale=seen.scale)
        train = seen.corpus.train
        text = {
            "tokens": round(seen.scale * train.tokens), "bytes": round(seen.scale * train.bytes),
            "documents": round(seen.scale * seen.corpus.documents), "vocab_size": seen.corpus.tokenizer.vocab_size,
            "sampled": seen.scale > 1,
        }  # fmt: skip
        whole = plan.seconds + seen.seconds + (FINISHING_SECONDS if left is not None else 0.0)
        return {
            **plan.to_dict(), "seconds": recipe.budget or whole, "preparation_seconds": seen.seconds, "text": text,
            "energy": meter.power().to_dict(recipe.budget or whole),
        }  # fmt: skip
