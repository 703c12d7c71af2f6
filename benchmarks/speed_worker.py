"""One measurement of speed in a process of its own: ours, or a peer's in the peer's environment.

    python -m benchmarks.speed_worker WHO WHAT JSON

WHO is nextword, stock, stock-compiled, dynamic, litgpt or llama; WHAT is train, write, prompt or first. Prints one JSON object.
Every peer is used as its own documentation has it, on the same two threads, the same shapes and random weights.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def rate(work: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each of some rounds, after one that does not count."""
    work()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        found.append(tokens / (time.perf_counter() - begin))
    return {"rates": found}


def matmul_rate(n: int = 1024) -> float:
    """Float32 operations a second in a product of square matrices; the best of some."""
    import torch

    a, b, best = torch.randn(n, n), torch.randn(n, n), 0.0
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


# ---------------------------------------------------------------- training: forward, backward, clip, AdamW


def train(who: str, s: Settings) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F

    rows, length, vocabulary = s["rows"], s["context_length"], s["vocab_size"]
    torch.manual_seed(0)
    x, y = torch.randint(vocabulary, (2, rows, length))
    if who == "nextword":
        return train_ours(s, x, y)
    if who == "litgpt":
        from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

        model: Any = GPT(
            Config(
                block_size=length, vocab_size=vocabulary, padded_vocab_size=vocabulary, n_layer=s["n_layers"],
                n_head=s["n_heads"], n_embd=s["d_model"], bias=True, rotary_percentage=1.0,
            )
        )  # fmt: skip
        forward = model
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=length, n_embd=s["d_model"], n_layer=s["n_layers"], n_head=s["n_heads"],
                bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            )
        )  # fmt: skip
        runner = torch.compile(model) if who == "stock-compiled" else model

        def forward(x: Any) -> Any:
            return runner(x).logits

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss = F.cross_entropy(forward(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**rate(step, x.numel(), s["rounds"]), "parameters": sum(p.numel() for p in model.parameters())}


def train_ours(s: Settings, x: Any, y: Any) -> dict[str, Any]:
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

    return {**rate(step, x.numel(), s["rounds"]), "parameters": model.config.parameters}


# ---------------------------------------------------------------- writing and reading


def opened(who: str, s: Settings) -> tuple[Any, Any]:
    """What reads pieces with the model, and its cache: ours, or PyTorch's dynamic int8 in the same engine."""
    from nextword.inference.kv_cache import KeyValueCache
    from nextword.inference.model_runner import TorchRunner, build_runner
    from nextword.model.hf import load_model

    model = load_model(Path(s["model"])).eval()
    if who == "nextword":
        return build_runner(model, s["precision"]), KeyValueCache(model.config)
    import torch

    reader = TorchRunner(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8))
    head = torch.nn.Linear(model.config.d_model, model.config.vocab_size, bias=False)
    head.weight = torch.nn.Parameter(model.unembedding.detach())
    quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(head), {torch.nn.Linear}, dtype=torch.qint8)
    reader.model.unembed = quantized.forward
    return reader, KeyValueCache(model.config)


def prompts(s: Settings, length: int) -> list[list[int]]:
    return [[(7 * i + 13 * j) % s["vocabulary"] for j in range(length)] for i in range(s["texts"])]


def write_ours(who: str, s: Settings) -> dict[str, Any]:
    import torch

    from nextword.inference.model_runner import TokenChunk

    reader, cache = opened(who, s)

    @torch.inference_mode()
    def read(pieces: list[Any]) -> list[int]:
        return [int(logits[-1].argmax()) for logits in reader.read(cache, pieces)]

    texts, count = prompts(s, s["prompt"]), s["tokens"]
    seconds = []
    for _ in range(s["rounds"] + 1):
        tokens = read([TokenChunk(i, 0, text) for i, text in enumerate(texts)])
        begin = time.perf_counter()
        for at in range(s["prompt"], s["prompt"] + count):
            tokens = read([TokenChunk(i, at, [token]) for i, token in enumerate(tokens)])
        seconds.append(time.perf_counter() - begin)
    return {"rates": [len(texts) * count / one for one in seconds[1:]]}


def prompt_ours(who: str, s: Settings) -> dict[str, Any]:
    import torch

    from nextword.inference.model_runner import TokenChunk

    reader, cache = opened(who, s)
    text = prompts(s, s["prompt"])[0]

    @torch.inference_mode()
    def work() -> None:
        reader.read(cache, [TokenChunk(0, 0, text)])

    return rate(work, len(text), s["rounds"])


def stock_model(s: Settings) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(s["model"]).eval()


def write_stock(s: Settings) -> dict[str, Any]:
    import torch

    model, x = stock_model(s), torch.tensor(prompts(s, s["prompt"]))

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
    return {"rates": [len(x) * s["tokens"] / one for one in seconds[1:]]}


def prompt_stock(s: Settings) -> dict[str, Any]:
    import torch

    model, x = stock_model(s), torch.tensor(prompts(s, s["prompt"])[:1])

    @torch.inference_mode()
    def work() -> None:
        model(x, use_cache=True, logits_to_keep=1)

    return rate(work, x.numel(), s["rounds"])


def write_litgpt(s: Settings) -> dict[str, Any]:
    import torch
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

    model = GPT(
        Config(
            block_size=s["context_length"], vocab_size=s["vocab_size"], padded_vocab_size=s["vocab_size"],
            n_layer=s["n_layers"], n_head=s["n_heads"], n_embd=s["d_model"], bias=True, rotary_percentage=1.0,
        )
    ).eval()  # fmt: skip
    x, length = torch.tensor(prompts(s, s["prompt"])), s["prompt"]
    with torch.inference_mode():
        model.max_seq_length = length + s["tokens"] + 1
        model.set_kv_cache(batch_size=len(x))
        seconds = []
        for _ in range(s["rounds"] + 1):
            tokens = model(x, torch.arange(length))[:, -1].argmax(1, keepdim=True)
            begin = time.perf_counter()
            for at in range(length, length + s["tokens"]):
                tokens = model(tokens, torch.tensor([at]))[:, -1].argmax(1, keepdim=True)
            seconds.append(time.perf_counter() - begin)
    return {"rates": [len(x) * s["tokens"] / one for one in seconds[1:]]}


# ---------------------------------------------------------------- llama.cpp, by the calls of its own library


class Llama:
    """A GGUF file, and one call for some tokens of some texts."""

    def __init__(self, s: Settings):
        self.c = c = importlib.import_module("llama_cpp")
        quiet = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(quiet, None)
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(s["gguf"].encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = s["texts"] * s["context_length"], 2048, 512
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = s["texts"], s["threads"], s["threads"]
        self.context = c.llama_init_from_model(self.model, settings)
        self.batch = c.llama_batch_init(2048, 0, 1)
        self.vocabulary = s["vocabulary"]
        self.kept = quiet

    def read(self, pieces: list[tuple[int, int, list[int]]]) -> list[int]:
        """The likeliest token after each piece (text, start, tokens)."""
        import numpy as np

        last, n = [], 0
        for text, start, tokens in pieces:
            for i, token in enumerate(tokens):
                self.batch.token[n], self.batch.pos[n], self.batch.n_seq_id[n] = token, start + i, 1
                self.batch.seq_id[n][0], self.batch.logits[n] = text, i == len(tokens) - 1
                n += 1
            last.append(n - 1)
        self.batch.n_tokens = n
        if self.c.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        rows = [np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), (self.vocabulary,)) for i in last]
        return [int(row.argmax()) for row in rows]

    def forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)


def write_llama(s: Settings) -> dict[str, Any]:
    llama, texts = Llama(s), prompts(s, s["prompt"])
    seconds = []
    for _ in range(s["rounds"] + 1):
        llama.forget()
        tokens = llama.read([(i, 0, text) for i, text in enumerate(texts)])
        begin = time.perf_counter()
        for at in range(s["prompt"], s["prompt"] + s["tokens"]):
            tokens = llama.read([(i, at, [token]) for i, token in enumerate(tokens)])
        seconds.append(time.perf_counter() - begin)
    return {"rates": [len(texts) * s["tokens"] / one for one in seconds[1:]]}


def prompt_llama(s: Settings) -> dict[str, Any]:
    llama, text = Llama(s), prompts(s, s["prompt"])[0]

    def work() -> None:
        llama.forget()
        llama.read([(0, 0, text)])

    return rate(work, len(text), s["rounds"])


# ---------------------------------------------------------------- the first token of a process


def first(who: str, s: Settings) -> dict[str, Any]:
    begin = time.perf_counter()
    if who == "llama":
        Llama(s).read([(0, 0, [1, 2, 3])])
        return {"seconds": time.perf_counter() - begin}
    import torch

    imported = time.perf_counter() - begin
    if who == "stock":
        import transformers

        model, tokenizer = stock_model(s), transformers.AutoTokenizer.from_pretrained(s["model"])
        inputs = tokenizer("The house", return_tensors="pt")
        tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0])
    else:
        import nextword

        nextword.load(s["model"]).generate("The house", max_tokens=1, temperature=0.0)
    assert torch.get_num_threads() == s["threads"]
    return {"seconds": time.perf_counter() - begin, "import_torch": imported}


def main() -> None:
    who, what, s = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if what == "train":
        found = train(who, s)
    elif what == "first":
        found = first(who, s)
    else:
        ours = {"write": write_ours, "prompt": prompt_ours}
        theirs = {
            "write": {"stock": write_stock, "litgpt": write_litgpt, "llama": write_llama},
            "prompt": {"stock": prompt_stock, "llama": prompt_llama},
        }
        found = ours[what](who, s) if who in ("nextword", "dynamic") else theirs[what][who](s)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if who != "llama":
        found["matmul"] = matmul_rate()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
