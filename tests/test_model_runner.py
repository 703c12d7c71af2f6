"""Model runners: the native one equals `GPT.forward`, for every batch and all chunks; so does the one in PyTorch."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextword.common.native_build import load_native_library
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.model_runner import SOURCE, NativeRunner, TokenChunk, TorchRunner, build_runner, fake_quantize
from nextword.inference.quantization import Precision, quantize
from nextword.model.config import PRESETS, build_config
from nextword.model.gpt import GPT
from processes import PATIENCE

CONTEXT, VOCABULARY = 40, 61
WHY = load_native_library(SOURCE)[1]  # a build that fails is a test that fails
compiled = pytest.mark.skipif(WHY.startswith(("no C++ compiler", "this processor")), reason=f"no compiled code: {WHY}")


def tiny(preset: str = "modern", **overrides: object) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": CONTEXT, **overrides}
    torch.manual_seed(0)
    model = GPT(build_config(preset, vocab_size=VOCABULARY, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS = [
    *((preset, {}) for preset in PRESETS),
    ("modern", {"n_kv_heads": 1}),
    ("modern", {"n_kv_heads": 4, "head_dim": 24, "d_ff": 40, "tied": False}),
    ("modern", {"qk_norm": False}),  # Llama
]


@pytest.fixture(params=MODELS, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
def model(request: pytest.FixtureRequest) -> GPT:
    preset, overrides = request.param
    return tiny(preset, **overrides)


def text(length: int = CONTEXT, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def whole(model: GPT, tokens: list[int]) -> Tensor:
    """Logits [T, V] without a cache."""
    return model.unembed(model(torch.tensor([tokens])))[0]


def one_by_one(reading: NativeRunner | TorchRunner, tokens: list[int], slot: int = 0) -> Tensor:
    cache = KeyValueCache(reading.model.config)
    return torch.cat([reading.forward(cache, [TokenChunk(slot, at, [token])])[0] for at, token in enumerate(tokens)])


@compiled
def test_native_runner_equals_the_model(model: GPT) -> None:
    tokens = text()
    assert torch.allclose(one_by_one(NativeRunner(model), tokens), whole(model, tokens), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_torch_runner_equals_the_model(model: GPT) -> None:
    tokens = text()
    assert torch.allclose(one_by_one(TorchRunner(model), tokens), whole(model, tokens), atol=1e-5, rtol=1e-4)


@compiled
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_native_logits_do_not_depend_on_batch_or_chunks(model: GPT, precision: Precision) -> None:
    reading, tokens = NativeRunner(model, precision), text()
    alone = one_by_one(reading, tokens)
    for cuts in ([CONTEXT], [1, 9, 2, 28], [31, 9]):
        cache, at = KeyValueCache(model.config), 0
        for step, length in enumerate(cuts):
            others = [TokenChunk(slot, 3 * step, text(3, seed=slot)) for slot in (0, 5, 2)]
            found = reading.forward(cache, [others[0], TokenChunk(3, at, tokens[at : at + length]), *others[1:]])
            at += length
            assert torch.equal(found[1][0], alone[at - 1])


@compiled
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_logits_equal_the_fake_quantized_model(model: GPT, precision: Precision) -> None:
    tokens = text()
    exact, expected = whole(model, tokens), whole(fake_quantize(model, precision), tokens)
    found = one_by_one(NativeRunner(model, precision), tokens)
    # What enters a product is rounded as well, to 13 bits: far less than what the weights lose.
    assert (found - expected).abs().max() < 0.1 * (expected - exact).abs().max() + 1e-4
    assert torch.allclose(one_by_one(TorchRunner(model, precision), tokens), expected, atol=1e-5, rtol=1e-4)


@compiled
def test_native_logits_do_not_depend_on_the_number_of_threads() -> None:
    model, tokens, num_threads = tiny(), text(), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(NativeRunner(model).forward(KeyValueCache(model.config), [TokenChunk(0, 0, tokens)])[0])
    torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


NARROW = """
import sys
import torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from test_model_runner import NativeRunner, one_by_one, text, tiny
model = tiny()
model.load_state_dict(load_file(sys.argv[2]))
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
save_file({p: one_by_one(NativeRunner(model, p), text()) for p in ("float32", "int8", "int4")}, sys.argv[3])
"""


@compiled
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has the narrower vectors alone"
)
def test_avx2_logits_equal_avx512_logits(tmp_path: Path) -> None:
    model, weights, found = tiny(), tmp_path / "weights.safetensors", tmp_path / "found.safetensors"
    save_file(model.state_dict(), weights)
    program = [sys.executable, "-W", "ignore", "-c", NARROW, str(Path(__file__).parent), str(weights), str(found)]
    subprocess.run(program, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"})
    narrow = load_file(found)
    for precision in ("float32", "int8"):  # whole numbers add up to the same in any order
        assert torch.equal(one_by_one(NativeRunner(model, precision), text()), narrow[precision])
    assert torch.allclose(one_by_one(NativeRunner(model, "int4"), text()), narrow["int4"], atol=1e-5, rtol=1e-4)


def test_without_a_compiler_the_torch_runner_is_used(without_native_library: None) -> None:
    assert isinstance(build_runner(tiny()), TorchRunner)


def test_widths_that_are_not_multiples_of_8_use_the_torch_runner() -> None:
    assert isinstance(build_runner(tiny(d_model=36, head_dim=6, d_ff=24)), TorchRunner)
    with pytest.raises(RuntimeError, match="multiples of 8"):
        NativeRunner(tiny(d_model=36, head_dim=6, d_ff=24))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), columns=st.integers(1, 100), power=st.integers(-20, 20), seed=st.integers(0, 99))
def test_quantized_values_are_the_nearest(rows: int, columns: int, power: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    weight[0] = 0
    int8, int4 = quantize(weight, "int8"), quantize(weight, "int4")
    assert quantize(weight, "float32").dequantize() is not None
    assert torch.equal(quantize(weight, "float32").dequantize(), weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((int8.dequantize() - weight).abs() <= step / 2 * 1.001).all()
    assert torch.equal(quantize(int8.dequantize(), "int8").data, int8.data)
    assert (int8.data.shape[1], int4.data.shape[1] * 2) == (math.ceil(columns / 32) * 32,) * 2
    # In four bits no group is worse than with the plain scale, by which its largest number is -8 of 16 levels.
    groups = torch.nn.functional.pad(weight, (0, -columns % 32)).unflatten(1, (-1, 32))
    scale = (groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8).half().float()
    plain = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7) * scale
    found = torch.nn.functional.pad(int4.dequantize(), (0, -columns % 32)).unflatten(1, (-1, 32))
    worst = (groups - plain).square().sum(2) * 1.001
    assert ((groups - found).square().sum(2) <= worst).all()


LAST_AT_EXIT = """
import atexit
atexit.register(lambda: print(runner.forward(cache, [TokenChunk(0, 0, [1, 2, 3])])[0].isfinite().all().item()))  # runs last
from nextword.inference.kv_cache import KeyValueCache
from nextword.inference.model_runner import NativeRunner, TokenChunk
from nextword.model.config import build_config
from nextword.model.gpt import GPT

model = GPT(build_config("modern", "tiny", vocab_size=64, n_layers=2, d_model=64, n_heads=2, context_length=64)).eval()
runner, cache = NativeRunner(model), KeyValueCache(model.config)
print(runner.forward(cache, [TokenChunk(0, 0, [1, 2])])[0].isfinite().all().item())
"""


@compiled
def test_a_runner_works_until_the_process_has_ended():
    """Its memory is not freed at exit, when other threads and functions may still use it."""
    command = [sys.executable, "-c", LAST_AT_EXIT]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")
