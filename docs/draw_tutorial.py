"""Draw the figures of the tutorial from a run directory: python docs/draw_tutorial.py [RUN] [FOLDER]

RUN is a finished run (default: nextword-demo) and FOLDER receives the figures (default: docs/images). The figures show the
metrics of the run and the activations of its model. Attention weights are recomputed by the formula, and checked against
the output of the model before they are drawn.
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

# The colors of the report, on white, so that a figure is legible on a light and on a dark page.
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
    """Save a figure as a PNG with 224 colors, at twice the displayed size. Equal data give equal files."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(224, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1024:.0f} KB)")


def thousands(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}"


# ---------------------------------------------------------------- formulas


def draw_position_table(path: Path) -> None:
    """The sinusoidal position table as a heat map: rows are positions, columns are dimensions."""
    table = sinusoidal_table(128, 128).numpy()
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes, waves = figure.subplots(1, 2, width_ratios=[1.15, 1])
    image = axes.imshow(table, cmap=WAVES, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="column", ylabel="position", title="Position table")
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], shrink=0.6, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    for column, color in ((0, WARM), (16, COOL), (40, GREEN)):
        waves.plot(table[:, column], color=color, label=f"column {column}")
    waves.set(xlabel="position", title="Three columns")
    waves.set_yticks([-1, 0, 1])
    waves.set_ylim(-1.1, 1.5)
    waves.legend(loc="upper center", ncols=3, fontsize=8, handlelength=1.2, columnspacing=1.2)
    save(figure, path)


def draw_schedules(path: Path) -> None:
    """The learning rate over a run as a fraction of its peak, for three built-in recipes."""
    figure = Figure(figsize=(7.6, 2.7), layout="constrained")
    axes = figure.subplots()
    progress = np.linspace(0.001, 1, 1000)
    for name, color in (("default", WARM), ("plain", COOL), ("post-norm", GREEN)):
        t = RECIPES[name].training
        factors = [lr_multiplier(p, t.schedule, t.warmup, t.final_lr) for p in progress]
        axes.plot(progress, factors, color=color, label=f"{name}: {t.schedule}, warmup {100 * t.warmup:.0f} %")
    axes.set(xlabel="progress of the run", ylabel="learning rate / peak")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.08)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.legend(loc="lower left", bbox_to_anchor=(0.2, 0.0))
    save(figure, path)


# ---------------------------------------------------------------- metrics of the run


def draw_loss(path: Path, run: Path) -> None:
    """Training loss of every step, its moving average, and the validation loss."""
    records = read_jsonl(run / "metrics.jsonl")
    train = [(line["step"], line["loss"]) for line in records if "loss" in line and math.isfinite(line["loss"])]
    validation = [(line["step"], line["validation"]["loss"]) for line in records if "validation" in line]
    last = next(line["validation"] for line in reversed(records) if "validation" in line)
    bits = last["bits_per_byte"] / last["loss"]
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color=WARM, alpha=0.25, linewidth=0.7)
    axes.plot(*zip(*moving_average(train), strict=True), color=WARM, label="training (moving average)")
    axes.plot(*zip(*validation, strict=True), color=COOL, marker="o", markersize=3.5, label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlim(0, train[-1][0] * 1.01)
    right = axes.secondary_yaxis("right", functions=(lambda y: y * bits, lambda y: y / bits))
    right.set_ylabel("bits per byte")
    right.spines["right"].set_visible(False)
    axes.legend(loc="upper right")
    save(figure, path)


def draw_positions(path: Path, run: Path) -> None:
    """Validation loss by position in the window."""
    losses = read_json(run / "result.json")["by_position"]
    # Neighboring positions are averaged, in spans that grow with the position.
    edges = np.unique(np.geomspace(1, len(losses) + 1, 4 * len(losses).bit_length()).round().astype(int))
    spans = list(itertools.pairwise(edges.tolist()))
    centers = [math.sqrt(first * (end - 1)) for first, end in spans]
    mean = [float(np.mean(losses[first - 1 : end - 1])) for first, end in spans]
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color=COOL, alpha=0.3, linewidth=0.8)
    axes.plot(centers, mean, color=COOL, marker="o", markersize=3.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.xaxis.set_major_locator(LogLocator(2, numticks=16))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="position in the window", ylabel="loss, nats per token")
    save(figure, path)


# ---------------------------------------------------------------- activations of the model


@dataclass(frozen=True)
class LayerAttention:
    """Attention weights of the heads of one layer, [H, T, T]."""

    layer: int
    weights: Tensor


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor) -> list[LayerAttention]:
    """softmax(Q Kᵀ / √d_k) of every layer, in float64 from the queries and keys of the model, for one text [1, T].

    Raises:
        AssertionError: These weights, applied to the values of the model, do not give the output of its attention.
    """
    layers: list[LayerAttention] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        activations = capture(block.attention, lambda: model(tokens))
        layers.append(LayerAttention(block.attention.layer, checked_weights(block.attention, activations)))
    return layers


def capture(attention: Attention, forward: Callable[[], object]) -> dict[str, Any]:
    """Queries, keys, values, rotation and heads of one attention layer in a forward pass."""
    activations: dict[str, Any] = {}

    def store(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: activations.__setitem__(name, output)

    def store_input(name: str, value: Callable[[Any], Any]) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: activations.__setitem__(name, value(inputs))

    handles = [
        attention.register_forward_pre_hook(store_input("rotation", lambda inputs: inputs[1].rotary_cos_sin)),
        attention.query.register_forward_hook(store("query")),
        attention.key.register_forward_hook(store("key")),
        attention.value.register_forward_hook(store("value")),
        attention.output.register_forward_pre_hook(store_input("heads", lambda inputs: inputs[0])),
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return activations


def checked_weights(attention: Attention, activations: dict[str, Any]) -> Tensor:
    """The weights by the formula, [H, T, T], checked against the output of the model."""
    query = attention.query_norm(attention.split_heads(activations["query"]))
    key = attention.key_norm(attention.split_heads(activations["key"]))
    value = attention.split_heads(activations["value"])
    if activations["rotation"] is not None:
        query, key = (apply_rotary_embedding(x, *activations["rotation"]) for x in (query, key))
    group_size = query.shape[1] // key.shape[1]  # query heads that share a key-value head
    query, key, value = (x[0].double() for x in (query, key, value))
    key, value = key.repeat_interleave(group_size, dim=0), value.repeat_interleave(group_size, dim=0)
    scores = query @ key.mT / math.sqrt(attention.config.head_dim)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    recomputed, output = (weights @ value).transpose(0, 1).flatten(1), activations["heads"][0].double()
    torch.testing.assert_close(recomputed, output, atol=1e-5, rtol=1e-4)
    return weights


def token_labels(tokenizer: nextword.Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as a label, with visible spaces and line ends."""
    return [tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") or "?" for token in ids]


def select_heads(layers: list[LayerAttention]) -> list[tuple[str, int, int]]:
    """The head with the clearest instance of each of four patterns: (pattern, layer, head)."""
    weights = torch.stack([layer.weights for layer in layers])  # [layers, H, T, T]
    length = weights.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    weighted = weights[:, :, 1:]  # the first position can attend only to itself
    patterns = {
        "previous token": weighted.diagonal(dim1=-2, dim2=-1),  # row t + 1, column t
        "same token": weights.diagonal(dim1=-2, dim2=-1)[..., 1:],
        "first token": weighted[..., 0],
        "distant tokens": (weighted * distance[1:]).sum(-1) * (1 - weighted[..., 0]) / length,
    }
    chosen: list[tuple[str, int, int]] = []
    for name, scores in patterns.items():
        for index in scores.mean(-1).flatten().argsort(descending=True).tolist():
            layer, head = divmod(index, weights.shape[1])
            if (layer, head) not in [(a, b) for _, a, b in chosen]:
                chosen.append((name, layer, head))
                break
    return chosen


def draw_attention(path: Path, model: nextword.LanguageModel) -> None:
    """Attention weights of four heads on one sentence: rows are queries, columns are keys."""
    ids = model.tokenizer.encode(SENTENCE)[: model.gpt.config.context_length]
    labels = token_labels(model.tokenizer, ids)
    layers = attention_weights(model.gpt, torch.tensor([ids]))
    heads = select_heads(layers)
    figure = Figure(figsize=(7.6, 7.9), layout="constrained")
    grid: Sequence[Axes] = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
    for axes, (pattern, layer, head) in zip(grid, heads, strict=False):
        axes.imshow(
            layers[layer].weights[head].numpy(), cmap=SHADES, norm=PowerNorm(0.6, 0, 1), interpolation="nearest"
        )
        axes.set_title(f"layer {layer + 1}, head {head + 1}: {pattern}")
        axes.set_xticks(range(len(ids)), labels, rotation=90, fontsize=7.5)
        axes.set_yticks(range(len(ids)), labels, fontsize=7.5)
        axes.grid(visible=False)
    save(figure, path)


@torch.no_grad()
def draw_next_word(path: Path, model: nextword.LanguageModel) -> None:
    """The most likely next tokens after a prompt, at three temperatures."""
    ids = torch.tensor([model.tokenizer.encode(PROMPT)])
    logits = model.gpt.unembed(model.gpt(ids)[0, -1])[: model.tokenizer.vocab_size]
    best = logits.topk(12).indices
    labels = token_labels(model.tokenizer, best.tolist())
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    axes = figure.subplots()
    for n, (temperature, color) in enumerate(((0.5, COOL), (1.0, WARM), (1.5, "#d9c9a8"))):
        p = probabilities(logits, Sampling(temperature=temperature))[best].numpy()
        axes.bar(np.arange(len(best)) + 0.27 * (n - 1), p, 0.25, color=color, label=f"temperature {temperature}")
    axes.set_xticks(range(len(best)), labels)
    axes.tick_params(axis="x", labelcolor=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.grid(visible=False, axis="x")
    axes.set_title(f"Next token after “{PROMPT}”", loc="left")
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
    paths = [Path(argument) for argument in sys.argv[1:]]
    main(paths[0] if paths else Path("nextword-demo"), paths[1] if len(paths) > 1 else Path(__file__).parent / "images")
