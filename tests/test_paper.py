"""What a plan on paper says of published runs, beside what was published of them."""

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
    layers: int, width: int, heads: int, kv_heads: int, feed_forward: int, vocab: int, context: int
) -> ModelConfig:
    return build_config(
        "modern", "13b", vocab_size=vocab, n_layers=layers, d_model=width, n_heads=heads, n_kv_heads=kv_heads,
        d_ff=feed_forward, context_length=context, qk_norm=False, tied=False,
    )  # fmt: skip


# Shape, parameters, tokens, GPU and how many, and the GPU hours that were told.
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
def test_a_published_run_took_what_the_paper_says(name):
    config, parameters, tokens, gpu, count, hours = PUBLISHED[name]
    assert config.parameters == pytest.approx(parameters, rel=0.01)
    found = estimate(config, tokens, Cluster(GPU_SPECS[gpu], count // 8))
    spread = [found.gpu_hours * seconds / found.seconds for seconds in (found.low_seconds, found.high_seconds)]
    assert spread[0] <= hours <= spread[1], f"{found.gpu_hours:,.0f} ({spread[0]:,.0f} to {spread[1]:,.0f})"
    assert found.memory_bytes < GPU_SPECS[gpu].baseline_memory


def test_gpt3_took_the_operations_that_the_paper_says():
    """Brown et al. 2020, table D.1: 3.14e23 for 300 billion tokens."""
    config = build_config("gpt2", "175b", vocab_size=50257)
    assert config.parameters == pytest.approx(174.6e9, rel=0.01)
    found = estimate(config, 300e9, Cluster(GPU_SPECS["a100"], 128))
    assert found.flops == pytest.approx(3.14e23, rel=0.03)
    assert 1e6 < found.batch_tokens < 6.4e6, "3.2 million there"


def test_gpt2_small_again():
    """nanoGPT's README: 124 million parameters, 300 billion tokens, eight A100s, about four days, without a fast link's help;
    on paper it can be done sooner, in no less than a day."""
    found = estimate(build_config("gpt2", "125m", vocab_size=50257), 300e9, Cluster(GPU_SPECS["a100"], 1))
    assert 1 < found.low_seconds / 86400 < found.seconds / 86400 < 4.5


def test_a_batch_is_whole_windows_for_every_process_and_of_a_published_size():
    for tokens, told in ((15.6e12, 16e6), (2e12, 4e6), (1.4e12, 4e6), (300e9, 3.2e6), (10e9, 0.5e6)):
        batch = cluster_batch_tokens(tokens, 2048, 64)
        assert batch % (2048 * 64) == 0
        assert told / 1.6 < batch < told * 1.6


def test_what_is_sent_and_held_by_hand():
    config, cluster = build_config("gpt2", "125m", vocab_size=50257), Cluster(GPU_SPECS["h100"], 2, 4)
    n = config.parameters
    sent = comm_volume(config, cluster, ParallelLayout("full", False, 1), micro_batches=3)
    assert sent == pytest.approx((7 / 8 * (6 * 2 + 4) * n, 7 / 8 * (6 * 2 + 4) * n / 50e9, 0.0))
    sent = comm_volume(config, cluster, ParallelLayout("hybrid", False, 1), micro_batches=1)
    inside, outside = 3 / 4 * (2 * 2 + 4) * n, 2 * 1 / 2 * n
    assert sent == pytest.approx((inside + outside, inside / 450e9 + outside / 50e9, 0.0))
    sent = comm_volume(
        config, cluster, ParallelLayout("full", False, 1, tp_size=4), micro_batches=1
    )  # two parts a matrix, one a machine
    sums = 12 * 4 * 2 * 3 / 4 * 2 * 1024 * 768
    assert sent == pytest.approx((1 / 2 * 8 * n / 4 + sums, 1 / 2 * 8 * n / 4 / 50e9, sums / 450e9))
    whole = memory_per_gpu(config, Cluster(GPU_SPECS["h100"], 1, 1), ParallelLayout("data", False, 1))
    assert whole == pytest.approx(16 * n + 6 * n + 34 * 1024 * 768 * 12 + 2**29)
    quarter = memory_per_gpu(config, cluster, ParallelLayout("data", False, 1, tp_size=4))  # 4 + 30 / 4 bytes a number
    assert quarter == pytest.approx(16 * n / 8 + 6 * n / 4 + 11.5 * 1024 * 768 * 12 + 2**29)
    again = memory_per_gpu(
        config, cluster, ParallelLayout("data", True, 1, tp_size=4)
    )  # 2 / 4 a block, and one block's all
    assert again == pytest.approx(16 * n / 8 + 6 * n / 4 + (11.5 + 0.5 * 12) * 1024 * 768 + 2**29)


def test_what_does_not_fit_says_how_many_would():
    config = build_config("gpt2", "175b", vocab_size=50257)
    with pytest.raises(UsageError, match=r"175 billion parameters do not fit: (\d+) such machines would hold it"):
        estimate(config, 1e9, Cluster(GPU_SPECS["h100"], 1))
    wide = build_config("gpt2", "175b", vocab_size=50257, d_model=122880, n_heads=960)
    with pytest.raises(UsageError, match="one block alone"):
        estimate(wide, 1e9, Cluster(GPU_SPECS["l4"], 1))


@pytest.mark.parametrize("parameters", [125e6, 1.3e9, 7e9, 70e9, 400e9])
def test_a_shape_has_about_so_many_parameters(parameters):
    layers, heads, width = model_shape_for(parameters)
    config = build_config("gpt2", "125m", vocab_size=50257, n_layers=layers, n_heads=heads, d_model=width)
    blocks = config.parameters - 50257 * width
    assert blocks == pytest.approx(parameters, rel=0.12)
    assert 0.5 < (width / layers) / 128 < 2 or parameters < 1e9


# ---------------------------------------------------------------- the verb


def test_the_verb_plans_on_paper(capsys):
    assert (
        cli.run_dir(
            ["plan", "--gpu", "h100", "--machines", "8", "--parameters", "7B", "--tokens", "140B", "--price", "2"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "8 with 8 × h100" in shown
    assert "(MFU)" in shown
    assert cli.run_dir(["plan", "--gpu", "A100", "--size", "1.3b", "--tokens", "1.4T", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 1.4e12
    assert found["gpus"] == 8
    assert found["model"]["d_model"] == 2048
    assert found["low_seconds"] < found["seconds"] < found["high_seconds"]
    assert found["money"] is None


def test_of_a_time_alone_the_model_is_the_best_for_as_many_operations():
    found = nextword.plan(gpu="h100", budget="2d")
    assert found["seconds"] == pytest.approx(2 * 86400, rel=0.05)
    assert found["tokens"] / found["parameters"] == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "tpu"}, "no datasheet of it here"), ({"gpu": "h100", "machines": 0}, "at least 1"),
        ({"gpu": "h100", "parameters": "7B", "size": "13b"}, "exclude each other"),
        ({"gpu": "h100", "steps": 10}, "say how large the model is to be"),
        ({"gpu": "h100", "corpora": ["python-docs"]}, "without a text"),
        ({}, "say what to learn from"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said(settings, message):
    with pytest.raises(UsageError, match=message):
        nextword.plan(**settings)
