"""GGUF: every tensor under llama.cpp's name with its own numbers, the tokenizer's tokens and merges, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nextword
from nextword import exporting
from nextword.errors import MissingExtra, NextwordError, UsageError
from nextword.inference.quantize import pack
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.stock import save_model
from nextword.text.tokenizer import Tokenizer, train_bpe, train_char

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
TEXT = ["The house on the hill. Wër, ñu ngi dem ca àll ba. 日本語 🙂\n"] * 3


def directory(path: Path, preset: str = "modern", tokenizer: Tokenizer | None = None, **overrides: Any) -> Path:
    tokenizer = tokenizer or train_bpe(TEXT, 300)
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 16, **overrides}
    model = GPT(build_config(preset, vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    path.mkdir()
    save_model(model, path, end_of_text=tokenizer.end_of_text, pad=tokenizer.pad)
    tokenizer.save(path, model.config.context_length)
    return path


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}, fields


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("gpt2", {}), ("modern", {"n_kv_heads": 2}), ("modern", {"tied": False}), ("modern", {"qk_norm": False})],
    ids=["gpt2", "qwen3", "untied", "llama"],
)
def test_every_number_is_there(tmp_path: Path, preset: str, overrides: dict[str, Any]) -> None:
    model = directory(tmp_path / "model", preset, **overrides)
    out = nextword.export(model)
    assert out == tmp_path / "model.gguf"
    found, fields = read(out)
    gpt, tokenizer = nextword.load(model).gpt, Tokenizer.open(model)
    assert sum(array.size for array in found.values()) == gpt.config.parameters
    assert np.array_equal(found["token_embd.weight"], gpt.token_embedding.weight.detach().numpy())
    last = gpt.blocks[1]
    assert np.array_equal(found["blk.1.ffn_down.weight"], last.feed_forward.down.weight.detach().numpy())
    architecture = {"gpt2": "gpt2", "modern": "llama" if overrides.get("qk_norm") is False else "qwen3"}[preset]
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.context_length"] == 16
    assert fields[f"{architecture}.block_count"] == 2
    query = last.attention.query.weight.detach().numpy()
    if preset == "gpt2":
        assert np.array_equal(found["blk.1.attn_qkv.weight"][:64], query)
        assert np.array_equal(found["blk.1.attn_qkv.bias"][128:], last.attention.value.bias.detach().numpy())
    elif architecture == "llama":  # the pairs that a rotation turns stand side by side
        assert np.array_equal(found["blk.1.attn_q.weight"][:4], query[[0, 8, 1, 9]])
    else:
        assert np.array_equal(found["blk.1.attn_q.weight"], query)
    assert ("output.weight" in found) == (gpt.head is not None)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens == [tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert fields["tokenizer.ggml.pre"] == "qwen35"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text
    types = fields["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    assert {i for i, kind in enumerate(types) if kind == 3} == set(tokenizer.markers.values())


@pytest.mark.parametrize(("precision", "bound"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_fewer_bits(tmp_path: Path, precision: str, bound: float) -> None:
    model = directory(tmp_path / "model", "modern")
    found, _ = read(nextword.export(model, out=tmp_path / "small.gguf", precision=precision))  # pyright: ignore[reportArgumentType]
    weight = nextword.load(model).gpt.blocks[0].feed_forward.up.weight.detach()
    error = np.abs(found["blk.0.ffn_up.weight"] - weight.numpy()).max()
    assert 0 < error <= bound * float(weight.abs().max())
    # Norms are whole; the embedding has eight bits at least.
    assert np.array_equal(
        found["output_norm.weight"], nextword.load(model).gpt.get_parameter("final_norm.weight").detach().numpy()
    )
    embedding = nextword.load(model).gpt.token_embedding.weight.detach()
    assert np.abs(found["token_embd.weight"] - embedding.numpy()).max() <= float(embedding.abs().max()) / 127
    assert pack(weight, "int4").scale is not None


def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    for name, made, message in (
        ("post", directory(tmp_path / "post", "gpt1", d_ff=256), "no architecture for gpt1"),
        ("char", directory(tmp_path / "char", tokenizer=train_char(TEXT)), "cannot cut text into words"),
    ):
        with pytest.raises(NextwordError, match=message):
            nextword.export(made)
        assert not list(tmp_path.glob(f"*{name}.gguf*"))
    with pytest.raises(UsageError, match="no format 'tflite'"):
        nextword.export(tmp_path / "char", "tflite")  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"nextword\[gguf\]"):
        exporting.write_gguf(tmp_path / "post", tmp_path / "x.gguf")
