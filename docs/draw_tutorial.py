"""Draw the tutorial's pictures from a run folder: python docs/draw_tutorial.py [RUN] [FOLDER]

RUN is a finished run (nextword-demo where not given), FOLDER where the pictures go (docs/images). Everything that is drawn
is the run's own: its measurements, and its model at work. The attention weights are computed here once more, by the
formula, and compared with what the model itself does before anything is drawn.
"""

import io
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image
from torch import Tensor, nn

import nextword
from nextword.common.fs import read_json, read_jsonl
from nextword.inference.sampling import Sampling, probabilities
from nextword.model.gpt import GPT, Attention, Block, apply_rotary_embedding, sinusoidal_table
from nextword.reporting.charts import moving_average
from nextword.training.config import RECIPES
from nextword.training.optimizer import lr_multiplier

SENTENCE = "Return the value of the key if the key is in the dictionary, and None if the key is not."
PROMPT = "Return True if the"

# The report's own colours, on white, so that a picture is legible on a light page and on a dark one.
INK, SOFT, LINE, WARM, COOL, GREEN = "#24231f", "#6a675f", "#e4e0d6", "#c0672f", "#1f628f", "#5f7f4f"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.facecolor": "white",
    "legend.edgecolor": "white",
    "legend.framealpha": 1.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#a9c8de", COOL, "#0d2c42"])
WAVES = LinearSegmentedColormap.from_list("waves", [COOL, "#f7f5f0", WARM])


def save(figure: Figure, path: Path) -> None:
    """As PNG of 224 colours, at twice the size at which it is shown; the same data gives the same file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(224, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1024:.0f} KB)")


def thousands(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}"


# ---------------------------------------------------------------- from the formula alone


def draw_position_table(path: Path) -> None:
    """PE as a picture: a row for each position, a column for each number of its vector."""
    table = sinusoidal_table(128, 128).numpy()
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes, waves = figure.subplots(1, 2, width_ratios=[1.15, 1])
    image = axes.imshow(table, cmap=WAVES, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="column", ylabel="position", title="The table, each number a colour")
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], shrink=0.6, pad_token_id=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    for column, color in ((0, WARM), (16, COOL), (40, GREEN)):
        waves.plot(table[:, column], color=color, label=f"column {column}")
    waves.set(xlabel="position", title="Three of the columns")
    waves.set_yticks([-1, 0, 1])
    waves.set_ylim(-1.1, 1.5)
    waves.legend(loc="upper center", ncols=3, fontsize=8, handlelength=1.2, columnspacing=1.2)
    save(figure, path)


def draw_schedules(path: Path) -> None:
    """The learning rate's factor over a run, for recipes that are in the package."""
    figure = Figure(figsize=(7.6, 2.7), layout="constrained")
    axes = figure.subplots()
    progress = np.linspace(0.001, 1, 1000)
    for name, color in (("default", WARM), ("plain", COOL), ("post-norm", GREEN)):
        t = RECIPES[name].training
        factors = [lr_multiplier(p, t.schedule, t.warmup, t.final_lr) for p in progress]
        axes.plot(progress, factors, color=color, label=f"{name}: {t.schedule}, warm-up {100 * t.warmup:.0f} %")
    axes.set(xlabel="share of the run that is done", ylabel="share of the peak rate")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.08)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.legend(loc="lower left", bbox_to_anchor=(0.2, 0.0))
    save(figure, path)


# ---------------------------------------------------------------- from the run's measurements


def draw_loss(path: Path, run: Path) -> None:
    """Training loss, every step faint and smoothed strong, and the loss on held-out text."""
    records = read_jsonl(run / "metrics.jsonl")
    train = [(line["step"], line["loss"]) for line in records if "loss" in line and math.isfinite(line["loss"])]
    held_out = [(line["step"], line["validation"]["loss"]) for line in records if "validation" in line]
    looks = [line["validation"] for line in records if "validation" in line]
    bits = looks[-1]["bits_per_byte"] / looks[-1]["loss"]
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color=WARM, alpha=0.25, linewidth=0.7)
    axes.plot(*zip(*moving_average(train), strict=True), color=WARM, label="training, smoothed")
    axes.plot(*zip(*held_out, strict=True), color=COOL, marker="o", markersize=3.5, label="held-out text")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlim(0, train[-1][0] * 1.01)
    right = axes.secondary_yaxis("right", functions=(lambda y: y * bits, lambda y: y / bits))
    right.set_ylabel("bits per byte")
    right.spines["right"].set_visible(False)
    axes.legend(loc="upper right")
    save(figure, path)


def draw_positions(path: Path, run: Path) -> None:
    """How the loss falls as more words of the window are known."""
    losses = read_json(run / "result.json")["by_position"]
    # Neighbours share a point: one position each at the start, then spans that grow with the position.
    edges = np.unique(np.geomspace(1, len(losses) + 1, 4 * len(losses).bit_length()).round().astype(int))
    spans = list(itertools.pairwise(edges.tolist()))
    middle = [math.sqrt(first * (end - 1)) for first, end in spans]
    mean = [float(np.mean(losses[first - 1 : end - 1])) for first, end in spans]
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color=COOL, alpha=0.3, linewidth=0.8)
    axes.plot(middle, mean, color=COOL, marker="o", markersize=3.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.xaxis.set_major_locator(LogLocator(2, numticks=16))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="position in the window", ylabel="loss, nats per token")
    save(figure, path)


# ---------------------------------------------------------------- from the model at work


@dataclass(frozen=True)
class Look:
    """What the heads of one layer looked at: weights [H, T, T]."""

    layer: int
    weights: Tensor


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor) -> list[Look]:
    """softmax(Q Kᵀ / √d_k) of every layer, in float64 from the model's own queries and keys, for one text [1, T].

    Raises:
        AssertionError: these weights, applied to the model's own values, do not give what its attention gave.
    """
    looks: list[Look] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        seen = watched(block.attention, lambda: model(tokens))
        looks.append(Look(block.attention.layer, weights_of(block.attention, seen)))
    return looks


def watched(attention: Attention, forward: Callable[[], object]) -> dict[str, Any]:
    """What goes through one attention layer in a forward pass: queries, keys, values, rotation, heads."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    handles = [
        attention.register_forward_pre_hook(
            lambda module, inputs: seen.__setitem__("rotation", inputs[1].rotary_cos_sin)
        ),
        attention.query.register_forward_hook(keep("query")),
        attention.key.register_forward_hook(keep("key")),
        attention.value.register_forward_hook(keep("value")),
        attention.output.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("heads", inputs[0])),
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def weights_of(attention: Attention, seen: dict[str, Any]) -> Tensor:
    """The formula, [H, T, T], and the proof that it is what the model computed."""
    query = attention.query_norm(attention.split_heads(seen["query"]))
    key, value = attention.key_norm(attention.split_heads(seen["key"])), attention.split_heads(seen["value"])
    if seen["rotation"] is not None:
        query, key = apply_rotary_embedding(query, *seen["rotation"]), apply_rotary_embedding(key, *seen["rotation"])
    shared = query.shape[1] // key.shape[1]  # query heads for each key-value head
    query, key, value = (x[0].double() for x in (query, key, value))
    key, value = key.repeat_interleave(shared, dim=0), value.repeat_interleave(shared, dim=0)
    scores = query @ key.mT / math.sqrt(attention.config.head_dim)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    ours, its_own = (weights @ value).transpose(0, 1).flatten(1), seen["heads"][0].double()
    torch.testing.assert_close(ours, its_own, atol=1e-5, rtol=1e-4)
    return weights


def shown(tokenizer: nextword.Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as a label: its spaces and line ends made visible."""
    return [tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") or "?" for token in ids]


def telling_heads(looks: list[Look]) -> list[tuple[str, int, int]]:
    """Four heads of different kinds, each the clearest of its kind: what it does, its layer, its head."""
    weights = torch.stack([look.weights for look in looks])  # [layers, H, T, T]
    length = weights.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    weighted = weights[:, :, 1:]  # the first position has only itself to look at
    kinds = {
        "the token before": weighted.diagonal(dim1=-2, dim2=-1),  # row t + 1, column t
        "itself": weights.diagonal(dim1=-2, dim2=-1)[..., 1:],
        "the first token": weighted[..., 0],
        "far back": (weighted * distance[1:]).sum(-1) * (1 - weighted[..., 0]) / length,
    }
    chosen: list[tuple[str, int, int]] = []
    for name, scores in kinds.items():
        for place in scores.mean(-1).flatten().argsort(descending=True).tolist():
            layer, head = divmod(place, weights.shape[1])
            if (layer, head) not in [(a, b) for _, a, b in chosen]:
                chosen.append((name, layer, head))
                break
    return chosen


def draw_attention(path: Path, model: nextword.Model) -> None:
    """Four heads on one sentence: a row for each token that looks, a column for each that is looked at."""
    ids = model.tokenizer.encode(SENTENCE)[: model.gpt.config.context_length]
    labels = shown(model.tokenizer, ids)
    looks = attention_weights(model.gpt, torch.tensor([ids]))
    heads = telling_heads(looks)
    figure = Figure(figsize=(7.6, 7.9), layout="constrained")
    grid: Sequence[Axes] = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
    for axes, (kind, layer, head) in zip(grid, heads, strict=False):
        axes.imshow(looks[layer].weights[head].numpy(), cmap=SHADES, norm=PowerNorm(0.6, 0, 1), interpolation="nearest")
        axes.set_title(f"layer {layer + 1}, head {head + 1}: {kind}")
        axes.set_xticks(range(len(ids)), labels, rotation=90, fontsize=7.5)
        axes.set_yticks(range(len(ids)), labels, fontsize=7.5)
        axes.grid(visible=False)
    save(figure, path)


@torch.no_grad()
def draw_next_word(path: Path, model: nextword.Model) -> None:
    """The likeliest next tokens after a prompt, at three temperatures."""
    ids = torch.tensor([model.tokenizer.encode(PROMPT)])
    logits = model.gpt.unembed(model.gpt(ids)[0, -1])[: model.tokenizer.vocab_size]
    best = logits.topk(12).indices
    labels = shown(model.tokenizer, best.tolist())
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    axes = figure.subplots()
    for n, (temperature, color) in enumerate(((0.5, COOL), (1.0, WARM), (1.5, "#d9c9a8"))):
        p = probabilities(logits, Sampling(temperature=temperature))[best].numpy()
        axes.bar(np.arange(len(best)) + 0.27 * (n - 1), p, 0.25, color=color, label=f"temperature {temperature}")
    axes.set_xticks(range(len(best)), labels)
    axes.tick_params(axis="x", labelcolor=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.grid(visible=False, axis="x")
    axes.set_title(f"What follows “{PROMPT}”", loc="left")
    axes.legend(loc="upper right")
    save(figure, path)


def main(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = nextword.load(run, device="cpu")
    with matplotlib.rc_context(STYLE):
        draw_position_table(folder / "position-table.png")
        draw_attention(folder / "attention.png", model)
        draw_schedules(folder / "schedules.png")
        draw_loss(folder / "loss.png", run)
        draw_positions(folder / "loss-by-position.png", run)
        draw_next_word(folder / "next-word.png", model)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(given[0] if given else Path("nextword-demo"), given[1] if len(given) > 1 else Path(__file__).parent / "images")
