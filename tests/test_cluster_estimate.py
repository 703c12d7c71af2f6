"""Cluster estimates of published training runs, compared with what was published."""

import json

import pytest

import nextword
from nextword.commands import cli
from nextword.common.errors import UsageError
from nextword.model.config import ModelConfig, build_config
from nextword.planning.cluster_estimate import (
    GPU_SPECS,
    Cluster,
    ParallelLayout,
    cluster_batch_tokens,
    comm_volume,
    estimate,
    memory_per_gpu,
    model_shape_for,
)


def llama(
    n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, vocab_size: int, context_length: int
) -> ModelConfig:
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    shape |= {"vocab_size": vocab_size, "context_length": context_length}
    return build_config("modern", "13b", **shape, qk_norm=False, tied=False)


# Shape, parameters, tokens, GPU, number of GPUs, published GPU hours.
PUBLISHED = {
    # Touvron et al. 2023a, "LLaMA", tables 2 and 15.
    "llama-65b": (llama(80, 8192, 64, 64, 22016, 32000, 2048), 65.2e9, 1.4e12, "a100", 2048, 1_022_362),
    "llama-7b": (llama(32, 4096, 32, 32, 11008, 32000, 2048), 6.7e9, 1.0e12, "a100", 2048, 82_432),
    # Touvron et al. 2023b, "Llama 2", table 2.
    "llama-2-13b": (llama(40, 5120, 40, 40, 13824, 32000, 4096), 13.0e9, 2.0e12, "a100", 2048, 368_640),
    "llama-2-70b": (llama(80, 8192, 64, 8, 28672, 32000, 4096), 69e9, 2.0e12, "a100", 2048, 1_720_320),
    # Grattafiori et al. 2024, "The Llama 3 herd of models", tables 3 and 4, and its model card.
    "llama-3.1-405b": (llama(126, 16384, 128, 8, 53248, 128256, 8192), 405e9, 15.6e12, "h100", 16384, 30_840_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_gpu_hours_are_in_the_estimated_range(name):
    config, parameters, tokens, gpu, num_gpus, hours = PUBLISHED[name]
    assert config.parameters == pytest.approx(parameters, rel=0.01)
    run = estimate(config, tokens, Cluster(GPU_SPECS[gpu], num_gpus // 8))
    low, high = (run.gpu_hours * seconds / run.seconds for seconds in (run.low_seconds, run.high_seconds))
    assert low <= hours <= high
    assert run.memory_bytes < GPU_SPECS[gpu].memory_bytes


def test_operations_and_batch_of_gpt3():
    """Brown et al. 2020, table D.1: 3.14e23 operations for 300 billion tokens, in batches of 3.2 million."""
    config = build_config("gpt2", "175b", vocab_size=50257)
    assert config.parameters == pytest.approx(174.6e9, rel=0.01)
    run = estimate(config, 300e9, Cluster(GPU_SPECS["a100"], 128))
    assert run.flops == pytest.approx(3.14e23, rel=0.03)
    assert 1e6 < run.batch_tokens < 6.4e6


def test_time_of_gpt2_small():
    """nanoGPT's README: about four days on eight A100s for 300 billion tokens, without an optimised attention; at least one."""
    run = estimate(build_config("gpt2", "125m", vocab_size=50257), 300e9, Cluster(GPU_SPECS["a100"], 1))
    assert 1 < run.low_seconds / 86400 < run.seconds / 86400 < 4.5


def test_batches_are_whole_windows_per_gpu_and_of_published_sizes():
    for tokens, published in ((15.6e12, 16e6), (2e12, 4e6), (1.4e12, 4e6), (300e9, 3.2e6), (10e9, 0.5e6)):
        batch = cluster_batch_tokens(tokens, 2048, 64)
        assert batch % (2048 * 64) == 0
        assert published / 1.6 < batch < published * 1.6


def test_communication_and_memory_computed_by_hand():
    config, cluster = build_config("gpt2", "125m", vocab_size=50257), Cluster(GPU_SPECS["h100"], 2, 4)
    n = config.parameters
    volume = comm_volume(config, cluster, ParallelLayout("fsdp", False, 1), micro_batches=3)
    assert volume == pytest.approx((7 / 8 * (6 * 2 + 4) * n, 7 / 8 * (6 * 2 + 4) * n / 50e9, 0.0))
    volume = comm_volume(config, cluster, ParallelLayout("hsdp", False, 1), micro_batches=1)
    inside, outside = 3 / 4 * (2 * 2 + 4) * n, 2 * 1 / 2 * n
    assert volume == pytest.approx((inside + outside, inside / 450e9 + outside / 50e9, 0.0))
    volume = comm_volume(config, cluster, ParallelLayout("fsdp", False, 1, tp_size=4), micro_batches=1)
    reduced = 12 * 4 * 2 * 3 / 4 * 2 * 1024 * 768
    assert volume == pytest.approx((1 / 2 * 8 * n / 4 + reduced, 1 / 2 * 8 * n / 4 / 50e9, reduced / 450e9))
    single = memory_per_gpu(config, Cluster(GPU_SPECS["h100"], 1, 1), ParallelLayout("fsdp-no-reshard", False, 1))
    assert single == pytest.approx(16 * n + 6 * n + 34 * 1024 * 768 * 12 + 2**29)
    quarter = memory_per_gpu(config, cluster, ParallelLayout("fsdp-no-reshard", False, 1, tp_size=4))
    assert quarter == pytest.approx(16 * n / 8 + 6 * n / 4 + 11.5 * 1024 * 768 * 12 + 2**29)
    recomputed = memory_per_gpu(config, cluster, ParallelLayout("fsdp-no-reshard", True, 1, tp_size=4))
    assert recomputed == pytest.approx(16 * n / 8 + 6 * n / 4 + (11.5 + 0.5 * 12) * 1024 * 768 + 2**29)


def test_a_model_that_does_not_fit_is_rejected_with_the_number_of_machines():
    config = build_config("gpt2", "175b", vocab_size=50257)
    with pytest.raises(UsageError, match=r"175 billion parameters do not fit: (\d+) such machines would do"):
        estimate(config, 1e9, Cluster(GPU_SPECS["h100"], 1))
    wide = build_config("gpt2", "175b", vocab_size=50257, d_model=122880, n_heads=960)
    with pytest.raises(UsageError, match="a single block"):
        estimate(wide, 1e9, Cluster(GPU_SPECS["l4"], 1))


@pytest.mark.parametrize("parameters", [125e6, 1.3e9, 7e9, 70e9, 400e9])
def test_a_model_shape_has_the_given_parameters(parameters):
    n_layers, n_heads, d_model = model_shape_for(parameters)
    config = build_config("gpt2", "125m", vocab_size=50257, n_layers=n_layers, n_heads=n_heads, d_model=d_model)
    assert config.parameters - 50257 * d_model == pytest.approx(parameters, rel=0.12)
    assert 0.5 < (d_model / n_layers) / 128 < 2 or parameters < 1e9


# ---------------------------------------------------------------- the command


def test_plan_with_a_gpu(capsys):
    arguments = ["plan", "--gpu", "h100", "--machines", "8", "--parameters", "7B", "--tokens", "140B", "--price", "2"]
    assert cli.run(arguments) == 0
    assert "MFU" in capsys.readouterr().out
    assert cli.run(["plan", "--gpu", "A100", "--size", "1.3b", "--tokens", "1.4T", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["tokens"] == 1.4e12
    assert run["gpus"] == 8
    assert run["model"]["d_model"] == 2048
    assert run["low_seconds"] < run["seconds"] < run["high_seconds"]
    assert run["money"] is None


def test_a_time_budget_alone_gives_the_compute_optimal_model():
    run = nextword.plan(gpu="h100", budget="2d").to_dict()
    assert run["seconds"] == pytest.approx(2 * 86400, rel=0.05)
    assert run["tokens"] / run["parameters"] == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "tpu"}, "unknown; choose one of"),
        ({"gpu": "h100", "machines": 0}, "--machines must be a whole number from 1"),
        ({"gpu": "h100", "parameters": "7B", "size": "13b"}, "exclude each other"),
        ({"gpu": "h100", "steps": 10}, "set the size of the model"),
    ],
)
def test_invalid_options_are_rejected(settings, message):
    with pytest.raises(UsageError, match=message):
        nextword.plan(**settings)
