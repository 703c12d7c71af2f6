"""GGUF: every tensor under llama.cpp's name with equal values, the tokens and merges of the tokenizer, rejected models. ONNX:
the model's own logits. Each is read back where the program is installed that it is for.
"""

import contextlib
import json
import signal
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nextword
from nextword.commands import cli
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.data.tokenizer import WHOLE_WORD_PATTERNS, Tokenizer, normalized, train_bpe, train_byte_bpe, train_char
from nextword.export import formats
from nextword.export.formats import write_gguf, write_onnx
from nextword.inference.quantization import quantize
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import save_model

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
TEXT = ["The house on the hill. Wër, ñu ngi dem ca àll ba. 日本語 🙂\n"] * 3


def directory(path: Path, preset: str = "modern", tokenizer: Tokenizer | None = None, **overrides: Any) -> Path:
    tokenizer = tokenizer or train_bpe(TEXT, 300)
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 16, **overrides}
    model = GPT(build_config(preset, vocab_size=tokenizer.vocab_size, **sizes))  # pyright: ignore[reportArgumentType]
    path.mkdir()
    save_model(model, path, end_of_text_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
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
def test_all_tensors_and_metadata_are_written(tmp_path: Path, preset: str, overrides: dict[str, Any]) -> None:
    model = directory(tmp_path / "model", preset, **overrides)
    out = nextword.export(model)
    assert out.file == tmp_path / "model.gguf"
    found, fields = read(out.file)
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
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    types = fields["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    assert {i for i, kind in enumerate(types) if kind == 3} == set(tokenizer.special_tokens.values())


@pytest.mark.parametrize(("precision", "bound"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_quantization(tmp_path: Path, precision: str, bound: float) -> None:
    model = directory(tmp_path / "model", "modern")
    found, _ = read(nextword.export(model, out=tmp_path / "small.gguf", precision=precision).file)  # pyright: ignore[reportArgumentType]
    weight = nextword.load(model).gpt.blocks[0].feed_forward.up.weight.detach()
    error = np.abs(found["blk.0.ffn_up.weight"] - weight.numpy()).max()
    assert 0 < error <= bound * float(weight.abs().max())
    # Norms are whole; the embedding has eight bits at least.
    assert np.array_equal(
        found["output_norm.weight"], nextword.load(model).gpt.get_parameter("final_norm.weight").detach().numpy()
    )
    embedding = nextword.load(model).gpt.token_embedding.weight.detach()
    assert np.abs(found["token_embd.weight"] - embedding.numpy()).max() <= float(embedding.abs().max()) / 127
    assert quantize(weight, "int4").scale is not None


def test_the_patterns_of_whole_words_have_a_name(tmp_path: Path) -> None:
    words = directory(tmp_path / "words", tokenizer=train_byte_bpe(TEXT, 300, WHOLE_WORD_PATTERNS))
    _, fields = read(nextword.export(words).file)
    assert fields["tokenizer.ggml.pre"] == "viking"


def test_unsupported_models_are_refused_without_a_file(tmp_path: Path, monkeypatch) -> None:
    for name, made, message in (
        ("post", directory(tmp_path / "post", "gpt1", d_ff=256), "no architecture for gpt1"),
        ("char", directory(tmp_path / "char", tokenizer=train_char(TEXT)), "does not support the pre-tokenization"),
        ("nfc", directory(tmp_path / "nfc", tokenizer=normalized(train_bpe(TEXT, 300), True)), "without --normalize"),
    ):
        with pytest.raises(NextwordError, match=message):
            nextword.export(made)
        assert not list(tmp_path.glob(f"*{name}.gguf*"))
    with pytest.raises(UsageError, match="unknown format"):
        nextword.export(tmp_path / "char", "tflite")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="ONNX files are float32, not int8"):
        nextword.export(tmp_path / "char", "onnx", precision="int8")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"nextword\[gguf\]"):
        write_gguf(tmp_path / "post", tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"nextword\[onnx\]"):
        write_onnx(tmp_path / "post", tmp_path / "x.onnx")


# ---------------------------------------------------------------- read back

SPOKEN = [
    ("tutorial", {"d_ff": 256}),
    ("gpt1", {"d_ff": 256}),
    ("gpt2", {}),
    ("modern", {"n_kv_heads": 2}),
    ("modern", {"tied": False, "qk_norm": False}),
]


def sure(model: Path) -> Path:
    """The same model, surer of what it says, so that what is rounded shows."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    weights = {name: tensor * 3 if tensor.ndim == 2 else tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    (model / "nextword.json").unlink(missing_ok=True)  # its manifest is of the weights before
    return model


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        pytest.param(*case, marks=[] if name in ("gpt2", "qwen3") else pytest.mark.needs("more time"), id=name)
        for name, case in zip(("tutorial", "gpt1", "gpt2", "qwen3", "llama"), SPOKEN, strict=True)
    ],
)
def test_onnx_runtime_logits_equal_the_model(tmp_path: Path, preset: str, overrides: dict[str, Any]) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = sure(directory(tmp_path / "model", preset, **overrides))
    made = nextword.export(model, "onnx")
    assert made.file == tmp_path / "model.onnx" and made.max_difference is not None and 0 < made.max_difference < 1e-3
    assert "verified with onnxruntime" in str(made) and [p.name for p in tmp_path.iterdir()] == ["model", "model.onnx"]
    gpt = nextword.load(model).gpt
    session = runtime.InferenceSession(made.file)
    for shape in ((1, 1), (3, 5), (2, 16)):
        ids = torch.randint(300, shape, generator=torch.Generator().manual_seed(1))
        found = session.run(["logits"], {"input_ids": ids.numpy()})[0]
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(found), gpt.unembed(gpt(ids)), atol=1e-3, rtol=0)
    here = str(Path(nextword.__file__).parent)
    assert here.encode() not in made.file.read_bytes()


def test_a_file_that_does_not_match_the_model_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = directory(tmp_path / "model", "gpt2")

    class Wrong(formats.LogitsModel):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) + 0.01

    monkeypatch.setattr(formats, "LogitsModel", Wrong)
    with pytest.raises(NextwordError, match="does not match the model: in ONNX Runtime"):
        nextword.export(model, "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert formats.max_abs_difference(torch.zeros(2), torch.tensor([0.0, torch.nan])) == float("inf")


def test_a_file_is_not_verified_without_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = directory(tmp_path / "model", "gpt2")
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert cli.run(["export", str(model)]) == 0
    assert "not verified: install llama-cpp-python" in capsys.readouterr().out
    assert cli.run(["export", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "file": str(tmp_path / "model.gguf"),
        "bytes": (tmp_path / "model.gguf").stat().st_size,
        "reader": "llama-cpp-python",
        "difference": None,
    }


def test_test_lines_are_deterministic_and_in_many_scripts() -> None:
    lines = formats.sample_lines(1000)
    assert len(lines) == 1000 and len(set(lines)) > 950 and lines == formats.sample_lines(1000)
    scripts = ["LATIN", "GREEK", "CYRILLIC", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL", "THAI"]
    for script in [*scripts, "GEORGIAN", "ARMENIAN", "ETHIOPIC"]:
        assert sum(any(unicodedata.name(c, "").startswith(script) for c in line) for line in lines) > 50, script


def test_the_comparison_with_llama_cpp_detects_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where llama-cpp-python is not installed, its part is played here; the test below has the real one."""
    model = directory(tmp_path / "model", "gpt2")
    played: dict[str, Any] = {"wrong_tokens": False, "shift": 0.0, "mode": contextlib.nullcontext}

    def read_back(file: Path, lines: list[str], sequences: list[list[int]]) -> tuple[list[list[int]], list[np.ndarray]]:
        assert file.read_bytes()[:4] == b"GGUF" and [len(ids) for ids in sequences] == [16, 16]
        loaded = nextword.load(model)
        tokens = [[*loaded.tokenizer.encode(line), *(played["wrong_tokens"] * [5])] for line in lines]
        with torch.inference_mode(), played["mode"]():
            logits = [loaded.gpt.unembed(loaded.gpt(torch.tensor([ids])))[0].numpy() for ids in sequences]
        # What is added to all changes no probability.
        return tokens, [found + 2.0 + played["shift"] * (np.arange(300) == 7) for found in logits]

    monkeypatch.setattr(formats, "find_spec", lambda name: object())
    monkeypatch.setattr(formats, "read_with_llama_cpp", read_back)
    for precision in ("float32", "int8"):
        made = nextword.export(model, out=tmp_path / "a.gguf", precision=precision)
        assert made.max_difference is not None and made.max_difference < 1e-5
    kind = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made.file).tensors}["blk.0.ffn_up.weight"]
    assert kind == "Q8_0"
    for name, value, words in (
        ("shift", 0.01, "does not match the model"),
        ("wrong_tokens", True, "tokenizes .* differently"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(played, name, value)
            with pytest.raises(NextwordError, match=words):
                nextword.export(model, out=tmp_path / "b.gguf")
    # A difference that GELU in half precision explains, and nothing else would.
    played["mode"] = formats.HalfPrecisionGELU
    with pytest.raises(NextwordError, match=r"rounds GELU to half precision .*--tolerance \de-0\d"):
        nextword.export(model, out=tmp_path / "b.gguf", tolerance=1e-5)
    made = nextword.export(model, out=tmp_path / "c.gguf")
    assert made.max_difference is not None and 1e-5 < made.max_difference < 1e-3
    made.file.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "model"]


FAKE_LLAMA_CPP = """
import os, signal
import numpy as np

GGML_TYPE_F32 = 0

class Llama:
    def __init__(self, path, **settings):
        assert open(path, "rb").read(4) == b"GGUF" and settings["n_ctx"] == settings["n_batch"] == 3
        if os.environ.get("FAKE_LLAMA_CPP") == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        if os.environ.get("FAKE_LLAMA_CPP") == "error":
            raise ValueError("Failed to load model")
        self.scores = np.zeros((3, 4), np.float32)
    def tokenize(self, text, add_bos, special):
        return list(text)
    def reset(self):
        self.scores[:] = 0
    def eval(self, tokens):
        for i, token in enumerate(tokens):
            self.scores[i] = token
        print("noise on the standard output")
    def close(self):
        pass
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no signals")
def test_llama_cpp_runs_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes comes back whole; where it ends by a signal, or fails, there is a message and no other harm."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "llama_cpp.py").write_text(FAKE_LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    tokens, logits = formats.read_with_llama_cpp(file, ["é", ""], [[1, 2, 3], [4, 5]])
    assert tokens == [list("é".encode()), []]
    assert [found.tolist() for found in logits] == [[[1.0] * 4, [2.0] * 4, [3.0] * 4], [[4.0] * 4, [5.0] * 4]]
    for failure, words in (("signal", "-11"), ("error", "1: ValueError: Failed to load model")):
        monkeypatch.setenv("FAKE_LLAMA_CPP", failure)
        with pytest.raises(NextwordError, match=f"could not read the file back .exit code {words}"):
            formats.read_with_llama_cpp(file, [], [[1, 2, 3]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "modules"]


def test_gelu_is_rounded_as_llama_cpp_does_it() -> None:
    """A table of half-precision numbers of half-precision numbers; past ten the number itself, below minus ten nothing."""
    x = torch.linspace(-12, 12, 4001)
    table = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(all="ignore"):
        gelu = (0.5 * table * (1 + np.tanh(np.sqrt(2 / np.pi) * (table + 0.044715 * table**3)))).astype(np.float16)
    expected = gelu[x.numpy().astype(np.float16).view(np.uint16)].astype(np.float32)
    expected = np.where(x <= -10, 0, np.where(x >= 10, x, expected))
    with formats.HalfPrecisionGELU():
        found = torch.nn.functional.gelu(x, approximate="tanh")
        assert torch.equal(torch.relu(x), x.clamp(min=0)), "nothing else is changed"
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=1e-3, atol=1e-6
    )  # the last bit of a half, and tanh in float32
    assert (found != torch.nn.functional.gelu(x, approximate="tanh")).any()


@pytest.mark.needs("llama.cpp")
@pytest.mark.parametrize(("preset", "overrides"), SPOKEN[2:], ids=["gpt2", "qwen3", "llama"])
def test_llama_cpp_generates_the_same_text(tmp_path: Path, preset: str, overrides: dict[str, Any]) -> None:
    """Greedily, over 200 tokens; where two are as likely as each other, to within 1e-3, either."""
    model = directory(tmp_path / "model", preset, context_length=256, **overrides)
    if preset != "gpt2":  # whose GELU llama.cpp rounds: the test below
        model = sure(model)
    made = nextword.export(model)
    assert made.max_difference is not None and made.max_difference < 1e-3
    loaded = nextword.load(model)
    ids = loaded.tokenizer.encode("The house")
    first = len(ids) - 1
    with torch.inference_mode():
        for _ in range(200):
            ids.append(int(loaded.gpt.unembed(loaded.gpt(torch.tensor([ids]))[0, -1]).argmax()))
        ours = loaded.gpt.unembed(loaded.gpt(torch.tensor([ids])))[0].log_softmax(-1)
    for precision in ("float32", "int8", "int4"):  # read back in a process of its own, which these may end
        file = nextword.export(model, out=tmp_path / f"{precision}.gguf", precision=precision).file
        try:
            _, [logits] = formats.read_with_llama_cpp(file, [], [ids])
        except NextwordError as error:
            assert precision != "float32" and "exit code -" in str(error)
            continue
        theirs = torch.tensor(logits).argmax(-1)
        assert np.isfinite(logits).all()
        if precision == "float32":
            assert (ours.max(-1).values - ours.gather(1, theirs[:, None])[:, 0])[first:].max() <= 1e-3


@pytest.mark.needs("llama.cpp")
def test_rounding_of_llama_cpp_is_rejected_unless_tolerated(tmp_path: Path) -> None:
    model = sure(directory(tmp_path / "model", "gpt2", context_length=256))
    with pytest.raises(
        NextwordError, match="rounds GELU to half precision"
    ) as refused:  # by how much, the processor decides
        nextword.export(model, out=tmp_path / "a.gguf", tolerance=5e-4)
    assert not (tmp_path / "a.gguf").exists()
    accepted = float(str(refused.value).partition("--tolerance ")[2].split()[0])
    made = nextword.export(model, out=tmp_path / "a.gguf", tolerance=accepted)
    assert made.max_difference is not None and 5e-4 < made.max_difference <= accepted <= 2e-3
