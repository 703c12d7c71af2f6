"""The throughput benchmark: real training steps of a candidate size on this machine."""

from dataclasses import replace

import torch

from nextword.common.environment import peak_memory_bytes
from nextword.data.dataset import TokenDataset, TokenSource
from nextword.model.config import ModelConfig
from nextword.model.gpt import GPT
from nextword.planning.cluster_estimate import TYPICAL_MFU
from nextword.planning.size_selection import BenchmarkResult
from nextword.training.config import TrainingConfig
from nextword.training.losses import LossModule, causal_lm_loss
from nextword.training.optimizer import Optimizer
from nextword.training.step import (
    StepSettings,
    TrainState,
    activation_bytes_per_row,
    available_memory,
    fastest_seconds,
    fit_micro_batch_rows,
    time_step,
    training_state_bytes,
)

BENCHMARK_BATCH_TOKENS = 2048  # of a benchmarked step on a CPU


class ThroughputBenchmark:
    """Measures training steps from fresh weights on the real text. A `ThroughputEstimator` for `select_size`.

    Args:
        tokens: the training set.
        training: the recipe's training options.
        device: the device to measure.
        bf16: whether matrix products are in bfloat16.
        num_processes: the processes of the run, which divide each step; all are taken to be as fast as this one.

    Attributes:
        matmul_flops: floating-point operations per second in matrix products.
    """

    def __init__(
        self, tokens: TokenSource, training: TrainingConfig, device: torch.device, bf16: bool, num_processes: int = 1
    ):
        self.tokens, self.training, self.device, self.bf16 = tokens, training, device, bf16
        self.num_processes = num_processes
        self.matmul_flops = measure_matmul_flops(device)
        self.baseline_memory = peak_memory_bytes(device)  # of the imports

    def measure(self, config: ModelConfig, batch_tokens: int) -> BenchmarkResult:
        """Measure a model with batches of `batch_tokens` tokens."""
        if self.num_processes > 1 and 16 * config.parameters > 0.5 * available_memory(self.device):
            return self._estimate(config)
        model, checkpointing = GPT(config).to(self.device), self.training.checkpoint_activations
        model.set_activation_checkpointing(checkpointing)
        loss_module = LossModule(model, causal_lm_loss, kernels=model.supports_kernels() and not checkpointing)
        dataset, settings = self._dataset(config, batch_tokens), StepSettings(self.training, bf16=self.bf16)
        rows = self.training.micro_batch_rows or fit_micro_batch_rows(loss_module, dataset, settings)
        memory = self.baseline_memory + training_state_bytes(model)
        memory += rows * activation_bytes_per_row(loss_module, dataset, settings)
        state = TrainState(model, Optimizer(model, replace(self.training, lr=self.training.lr or 1.0)))
        few_tokens = min(batch_tokens, BENCHMARK_BATCH_TOKENS) if self.device.type == "cpu" else batch_tokens
        timed = self._dataset(config, few_tokens)
        step_seconds = time_step(state, loss_module, timed, replace(settings, micro_batch_rows=rows))
        seconds_per_token = step_seconds / tokens_per_batch(timed)
        seconds_per_token += time_optimizer_step(state) / tokens_per_batch(dataset)
        return BenchmarkResult(seconds_per_token / self.num_processes, memory)

    def _estimate(self, config: ModelConfig) -> BenchmarkResult:
        """For a model that does not fit in the memory of one process: a typical utilisation, and this process's shards."""
        seconds_per_token = config.flops_per_token / (TYPICAL_MFU * self.matmul_flops) / self.num_processes
        return BenchmarkResult(seconds_per_token, self.baseline_memory + 16 * config.parameters // self.num_processes)

    def _dataset(self, config: ModelConfig, batch_tokens: int) -> TokenDataset:
        rows = max(1, round(batch_tokens / config.context_length))
        return TokenDataset(self.tokens, config.context_length, rows, seed=0)


def tokens_per_batch(dataset: TokenDataset) -> int:
    """The number of tokens in a batch."""
    return dataset.batch_size * dataset.context_length


def time_optimizer_step(state: TrainState) -> float:
    """Seconds of one optimizer step, the faster of two. The weights stay as they are."""
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    return fastest_seconds(lambda: state.optimizer.step(0.0), state.model.unembedding.device, repeats=2)


def measure_matmul_flops(device: torch.device) -> float:
    """Floating-point operations per second in matrix products of the data type that training uses."""
    n = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(4):
            torch.mm(a, b)

    return 4 * 2 * n**3 / fastest_seconds(multiply, device, repeats=5)
