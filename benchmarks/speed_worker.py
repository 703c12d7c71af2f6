"""One speed measurement in a separate process: nextword, or another library in its own environment.

    python -m benchmarks.speed_worker PROGRAM TASK JSON

PROGRAM is nextword, transformers, transformers-compiled, dynamic, litgpt or llama; TASK is train, decode, prefill or
first-token. Prints one JSON object. Each library is used as its documentation describes, with the same threads, shapes and
random weights.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def measure_rates(run: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second in each round, after a warmup round."""
    run()
    rates = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        rates.append(tokens / (time.perf_counter() - begin))
    return {"rates": rates}


def peak_mb() -> float:
    """Peak resident memory of this process. Not `ru_maxrss`, which begins with that of the parent process.

    The peers' environments do not have nextword, so that its own function cannot be imported here.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def matmul_rate(n: int = 1024) -> float:
    """The rate of float32 matrix multiplication in FLOP/s: the best of twelve."""
    import torch

    a, b, best = torch.randn(n, n), torch.randn(n, n), 0.0
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


# ---------------------------------------------------------------- training: forward, backward, clip, AdamW


def train(program: str, s: Settings) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F

    rows, length, vocabulary = s["rows"], s["context_length"], s["vocab_size"]
    torch.manual_seed(0)
    x, y = torch.randint(vocabulary, (2, rows, length))
    if program == "nextword":
        return train_nextword(s, x, y)
    if program == "litgpt":
        from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

        model: Any = GPT(
            Config(
                block_size=length,
                vocab_size=vocabulary,
                padded_vocab_size=vocabulary,
                n_layer=s["n_layers"],
                n_head=s["n_heads"],
                n_embd=s["d_model"],
                bias=True,
                rotary_percentage=1.0,
            )
        )
        forward = model
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=length,
                n_embd=s["d_model"],
                n_layer=s["n_layers"],
                n_head=s["n_heads"],
                bos_token_id=0,
                eos_token_id=0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
        module = torch.compile(model) if program == "transformers-compiled" else model

        def forward(x: Any) -> Any:
            return module(x).logits

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss = F.cross_entropy(forward(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**measure_rates(step, x.numel(), s["rounds"]), "parameters": sum(p.numel() for p in model.parameters())}


def train_nextword(s: Settings, x: Any, y: Any) -> dict[str, Any]:
    import numpy as np

    from nextword.data.dataset import Batch
    from nextword.model.config import build_config
    from nextword.model.gpt import GPT
    from nextword.training.config import TrainingConfig
    from nextword.training.losses import LossModule, causal_lm_loss
    from nextword.training.optimizer import Optimizer
    from nextword.training.step import StepSettings, TrainState, train_step

    sizes = {name: s[name] for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model")}
    model = GPT(build_config(s.get("preset", "gpt2"), **sizes))
    config = TrainingConfig(optimizer=s.get("optimizer", "adamw"), lr=1e-3)
    state = TrainState(model, Optimizer(model, config))
    step_module = LossModule(model, causal_lm_loss, kernels=model.supports_kernels())
    batch = Batch(x.numpy(), y.numpy(), list(range(len(x))), {"next_word": x.numel()}, x.numel())
    settings = StepSettings(config, micro_batch_rows=s.get("micro_batch_rows", 2**30))
    assert isinstance(batch.tokens, np.ndarray)

    def step() -> None:
        train_step(state, step_module, batch, settings, 0.5)

    return {**measure_rates(step, x.numel(), s["rounds"]), "parameters": model.config.parameters}


# ---------------------------------------------------------------- decoding and prefill


def load_runner(program: str, s: Settings) -> tuple[Any, Any]:
    """A model runner and its KV cache: nextword's, or PyTorch's dynamic int8 quantization in a `TorchRunner`."""
    from nextword.inference.kv_cache import KeyValueCache
    from nextword.inference.model_runner import TorchRunner, build_runner
    from nextword.model.hf import load_model

    model = load_model(Path(s["model"])).eval()
    if program == "nextword":
        return build_runner(model, s["precision"]), KeyValueCache(model.config)
    import torch

    runner = TorchRunner(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8))
    head = torch.nn.Linear(model.config.d_model, model.config.vocab_size, bias=False)
    head.weight = torch.nn.Parameter(model.unembedding.detach())
    quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(head), {torch.nn.Linear}, dtype=torch.qint8)
    runner.model.unembed = quantized.forward
    return runner, KeyValueCache(model.config)


def make_prompts(s: Settings, length: int) -> list[list[int]]:
    return [[(7 * i + 13 * j) % s["vocabulary"] for j in range(length)] for i in range(s["sequences"])]


def decode_nextword(program: str, s: Settings) -> dict[str, Any]:
    import torch

    from nextword.inference.model_runner import TokenChunk

    runner, cache = load_runner(program, s)

    @torch.inference_mode()
    def next_tokens(chunks: list[Any]) -> list[int]:
        return [int(logits[-1].argmax()) for logits in runner.forward(cache, chunks)]

    prompts, count = make_prompts(s, s["prompt"]), s["tokens"]
    seconds = []
    for _ in range(s["rounds"] + 1):
        tokens = next_tokens([TokenChunk(i, 0, prompt) for i, prompt in enumerate(prompts)])
        begin = time.perf_counter()
        for position in range(s["prompt"], s["prompt"] + count):
            tokens = next_tokens([TokenChunk(i, position, [token]) for i, token in enumerate(tokens)])
        seconds.append(time.perf_counter() - begin)
    return {"rates": [len(prompts) * count / elapsed for elapsed in seconds[1:]]}


def prefill_nextword(program: str, s: Settings) -> dict[str, Any]:
    import torch

    from nextword.inference.model_runner import TokenChunk

    runner, cache = load_runner(program, s)
    prompt = make_prompts(s, s["prompt"])[0]

    @torch.inference_mode()
    def run() -> None:
        runner.forward(cache, [TokenChunk(0, 0, prompt)])

    return measure_rates(run, len(prompt), s["rounds"])


def load_transformers_model(s: Settings) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(s["model"]).eval()


def decode_transformers(s: Settings) -> dict[str, Any]:
    import torch

    model, x = load_transformers_model(s), torch.tensor(make_prompts(s, s["prompt"]))

    @torch.inference_mode()
    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(1, keepdim=True), out.past_key_values

    seconds = []
    for _ in range(s["rounds"] + 1):
        tokens, cache = forward(x, None)
        begin = time.perf_counter()
        for _ in range(s["tokens"]):
            tokens, cache = forward(tokens, cache)
        seconds.append(time.perf_counter() - begin)
    return {"rates": [len(x) * s["tokens"] / elapsed for elapsed in seconds[1:]]}


def prefill_transformers(s: Settings) -> dict[str, Any]:
    import torch

    model, x = load_transformers_model(s), torch.tensor(make_prompts(s, s["prompt"])[:1])

    @torch.inference_mode()
    def run() -> None:
        model(x, use_cache=True, logits_to_keep=1)

    return measure_rates(run, x.numel(), s["rounds"])


def decode_litgpt(s: Settings) -> dict[str, Any]:
    import torch
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

    model = GPT(
        Config(
            block_size=s["context_length"],
            vocab_size=s["vocab_size"],
            padded_vocab_size=s["vocab_size"],
            n_layer=s["n_layers"],
            n_head=s["n_heads"],
            n_embd=s["d_model"],
            bias=True,
            rotary_percentage=1.0,
        )
    ).eval()
    x, length = torch.tensor(make_prompts(s, s["prompt"])), s["prompt"]
    with torch.inference_mode():
        model.max_seq_length = length + s["tokens"] + 1
        model.set_kv_cache(batch_size=len(x))
        seconds = []
        for _ in range(s["rounds"] + 1):
            tokens = model(x, torch.arange(length))[:, -1].argmax(1, keepdim=True)
            begin = time.perf_counter()
            for position in range(length, length + s["tokens"]):
                tokens = model(tokens, torch.tensor([position]))[:, -1].argmax(1, keepdim=True)
            seconds.append(time.perf_counter() - begin)
    return {"rates": [len(x) * s["tokens"] / elapsed for elapsed in seconds[1:]]}


# ---------------------------------------------------------------- llama.cpp, through its C interface


class Llama:
    """A GGUF model that processes chunks of several sequences."""

    def __init__(self, s: Settings):
        self.c = c = importlib.import_module("llama_cpp")
        quiet = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(quiet, None)
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(s["gguf"].encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = s["sequences"] * s["context_length"], 2048, 512
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = s["sequences"], s["threads"], s["threads"]
        self.context = c.llama_init_from_model(self.model, settings)
        self.batch = c.llama_batch_init(2048, 0, 1)
        self.vocabulary = s["vocabulary"]
        self.log_callback = quiet  # must outlive the model

    def next_tokens(self, chunks: list[tuple[int, int, list[int]]]) -> list[int]:
        """The most likely token after each chunk (sequence, start, tokens)."""
        import numpy as np

        last, n = [], 0
        for sequence, start, tokens in chunks:
            for i, token in enumerate(tokens):
                self.batch.token[n], self.batch.pos[n], self.batch.n_seq_id[n] = token, start + i, 1
                self.batch.seq_id[n][0], self.batch.logits[n] = sequence, i == len(tokens) - 1
                n += 1
            last.append(n - 1)
        self.batch.n_tokens = n
        if self.c.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        rows = [np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), (self.vocabulary,)) for i in last]
        return [int(row.argmax()) for row in rows]

    def clear_cache(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)


def decode_llama(s: Settings) -> dict[str, Any]:
    llama, prompts = Llama(s), make_prompts(s, s["prompt"])
    seconds = []
    for _ in range(s["rounds"] + 1):
        llama.clear_cache()
        tokens = llama.next_tokens([(i, 0, prompt) for i, prompt in enumerate(prompts)])
        begin = time.perf_counter()
        for position in range(s["prompt"], s["prompt"] + s["tokens"]):
            tokens = llama.next_tokens([(i, position, [token]) for i, token in enumerate(tokens)])
        seconds.append(time.perf_counter() - begin)
    return {"rates": [len(prompts) * s["tokens"] / elapsed for elapsed in seconds[1:]]}


def prefill_llama(s: Settings) -> dict[str, Any]:
    llama, prompt = Llama(s), make_prompts(s, s["prompt"])[0]

    def run() -> None:
        llama.clear_cache()
        llama.next_tokens([(0, 0, prompt)])

    return measure_rates(run, len(prompt), s["rounds"])


# ---------------------------------------------------------------- time to first token of a new process


def first_token(program: str, s: Settings) -> dict[str, Any]:
    begin = time.perf_counter()
    if program == "llama":
        Llama(s).next_tokens([(0, 0, [1, 2, 3])])
        return {"seconds": time.perf_counter() - begin}
    import torch

    imported = time.perf_counter() - begin
    if program == "transformers":
        import transformers

        model, tokenizer = load_transformers_model(s), transformers.AutoTokenizer.from_pretrained(s["model"])
        inputs = tokenizer("The house", return_tensors="pt")
        tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0])
    else:
        import nextword

        nextword.load(s["model"]).generate("The house", max_tokens=1, temperature=0.0)
    assert torch.get_num_threads() == s["threads"]
    return {"seconds": time.perf_counter() - begin, "import_torch": imported}


def main() -> None:
    program, task, s = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if task == "train":
        result = train(program, s)
    elif task == "first-token":
        result = first_token(program, s)
    else:
        ours = {"decode": decode_nextword, "prefill": prefill_nextword}
        theirs = {
            "decode": {"transformers": decode_transformers, "litgpt": decode_litgpt, "llama": decode_llama},
            "prefill": {"transformers": prefill_transformers, "llama": prefill_llama},
        }
        result = ours[task](program, s) if program in ("nextword", "dynamic") else theirs[task][program](s)
    result["peak_mb"] = peak_mb()
    if program != "llama":
        result["matmul"] = matmul_rate()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
