"""How fast, beside the peers from the package registry: `python -m benchmarks.speed [NAME …]`.

Names: bounds, sprint, training, writing, prompt, first, and precision, which wants the runs of `benchmarks.scaling_laws hold`. Every
figure is from processes in turn, each measured some times; what stands in the table is the middle, and from where to where.
litgpt and llama-cpp-python have environments of their own under build/bench/peers, made where they are not there (llama.cpp
is compiled: ten minutes).
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.run import DATA, KEPT, cell, nextword

TURNS = 3
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SHAPES = {
    "6/6/384": {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": 256, "vocab_size": 65, "rows": 16},
    "GPT-2-small": {"n_layers": 12, "n_heads": 12, "d_model": 768, "context_length": 1024, "vocab_size": 50257},
    "small": {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": 1024, "vocab_size": 8192},
}
SPRINT = ("--tokens", "215k", "--training.batch-tokens", "2048", "--training.evaluations", "1")
LONG = ("--size", "tiny", "--model.context-length", "128")
PEERS = {
    "litgpt": ("litgpt", "torch>=2.13,<2.14", "numpy"),
    "llama": ("llama-cpp-python", "numpy"),
    "llama-server": ("llama-cpp-python[server]", "numpy"),
    "lm-eval": ("lm-eval[api,hf]", "torch>=2.13,<2.14", "transformers>=5,<6"),
}


def interpreter(who: str) -> str:
    """The Python that has a peer; its environment is made where it is not there."""
    if who not in PEERS:
        return sys.executable
    folder = KEPT / "peers" / who
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {' '.join(PEERS[who])} …", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[who]], check=True)
        (folder / "ready").touch()
    return str(python.absolute())


def measured(who: str, what: str, settings: dict[str, Any]) -> dict[str, Any]:
    program = [interpreter(who), "-W", "ignore", "-m", "benchmarks.speed_worker", who, what, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(program)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(name: str, what: str, runs: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each of the runs (who, settings) by turns, so that a change of the machine's speed meets them all."""
    for who in {who for who, _ in runs.values()}:
        interpreter(who)
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in runs}
    for turn in range(TURNS):
        for title, (who, settings) in runs.items():
            found[title].append(cell(f"speed-{name}-{title}-{turn}", lambda w=who, s=settings: measured(w, what, s)))
    return found


def middle(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def rates(turns: list[dict[str, Any]]) -> list[float]:
    """The middle rate of each turn."""
    return [statistics.median(turn["rates"]) for turn in turns]


def model_directory(name: str) -> dict[str, Any]:
    """A model of a shape with random weights, as a stock directory and as GGUF in three precisions."""
    folder = KEPT / "models" / name
    shape = SHAPES[name]
    if not (folder / "model" / "config.json").exists():
        import torch

        from nextword.data.tokenizer import train_bpe
        from nextword.model.config import build_config
        from nextword.model.gpt import GPT
        from nextword.model.hf import save_model

        texts = [path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md"))]
        tokenizer = train_bpe(texts, min(8192, shape["vocab_size"]))
        torch.manual_seed(0)
        model = GPT(build_config("gpt2", **shape))  # pyright: ignore[reportArgumentType]
        (folder / "model").mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / "model", shape["context_length"])
        save_model(model, folder / "model", end_of_text_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    from nextword.export.formats import write_gguf

    for precision in ("float32", "int8", "int4"):
        if not (folder / f"{precision}.gguf").exists():
            write_gguf(folder / "model", folder / f"{precision}.gguf", precision)
    common = {
        "model": str(folder / "model"),
        "vocabulary": shape["vocab_size"],
        "threads": THREADS,
        "rounds": 3,
        **shape,
    }
    return {"common": common, "gguf": {p: str(folder / f"{p}.gguf") for p in ("float32", "int8", "int4")}}


# ---------------------------------------------------------------- the tables


def sprint() -> None:
    """From process start to a durable model: how soon the loss of the field's reference run is reached, in a model of its shape
    and vocabulary, and what is reached in its time."""
    text, goal = DATA / "tinyshakespeare", 1.898
    shape = ["--model.n-layers", "4", "--model.n-heads", "4", "--model.d-model", "128", "--model.context-length", "64"]
    common = ["pretrain", text, "--tokenizer", "char", "--json", "--quiet"]

    def ours(name: str, seed: int, *more: str) -> dict[str, Any]:
        out = KEPT / name
        shutil.rmtree(out, ignore_errors=True)
        return nextword(*common, "--out", out, "--seed", str(seed), *more)

    def stock(seed: int) -> dict[str, Any]:
        arguments = [str(text / "input.txt"), str(KEPT / f"sprint-stock-{seed}"), str(seed)]
        begin = time.time()
        out = subprocess.check_output([sys.executable, "-W", "ignore", "-m", "benchmarks.reference_loop", *arguments])
        return {**json.loads(out), "wall": time.time() - begin}

    print(
        f"\n| seed | stock loop: loss | seconds | to {goal}: loss | seconds | of its time | in its time: loss | seconds |"
    )
    print("|---" * 8 + "|")
    ratios = []
    for seed in (1, 2, 3):
        theirs = cell(f"sprint-stock-{seed}", lambda s=seed: stock(s))
        quick = cell(f"sprint-quick-{seed}", lambda s=seed: ours("sprint-quick", s, *shape, *SPRINT))
        as_long = f"{theirs['wall']:.0f}s"
        long = cell(f"sprint-long-{seed}", lambda s=seed, t=as_long: ours("sprint-long", s, "--budget", t, *LONG))
        ratios.append(quick["wall"] / theirs["wall"])
        print(
            f"| {seed} | {theirs['loss']:.4f} | {theirs['wall']:.0f} | {quick['loss']:.4f} | {quick['wall']:.1f} "
            f"| {ratios[-1]:.3f} | {long['loss']:.4f} | {long['wall']:.0f} |"
        )
    print(f"\nof its time: {middle(ratios, 3)}")


def training() -> None:
    shape = {**SHAPES["6/6/384"], "rounds": 4}
    ours = {**shape, "micro_batch_rows": 8}  # half of the batch at a time: as quick, and less memory
    found = in_turn(
        "training", "train",
        {
            "nextword": ("nextword", ours), "nextword, modern": ("nextword", {**ours, "preset": "modern"}),
            "stock": ("stock", shape), "stock, compiled": ("stock-compiled", shape), "litgpt": ("litgpt", shape),
        },
    )  # fmt: skip

    # Operations of a token (Chowdhery et al. 2022, appendix B): 6 for each weight of a product, 12 · L · D · T for attention.
    def operations(parameters: float) -> float:
        return 6 * parameters + 12 * shape["n_layers"] * shape["d_model"] * shape["context_length"]

    own = rates(found["nextword"])
    print("\n| | tokens a second | of nextword's | share of the product rate | peak MB |\n|---|---|---|---|---|")
    for title, turns in found.items():
        speeds = rates(turns)
        shares = [100 * s * operations(t["parameters"]) / t["matmul"] for s, t in zip(speeds, turns, strict=True)]
        ratios = [100 * s / o for s, o in zip(speeds, own, strict=True)]
        memory = [turn["peak_mb"] for turn in turns]
        print(f"| {title} | {middle(speeds)} | {middle(ratios)} % | {middle(shares)} % | {middle(memory)} |")


def writing() -> None:
    for name, texts in (("GPT-2-small", 1), ("GPT-2-small", 8), ("small", 1)):
        made = model_directory(name)
        common = {**made["common"], "texts": texts, "prompt": 16, "tokens": 96 if name == "small" else 48}
        for precision in ("float32", "int8", "int4"):
            runs = {
                "nextword": ("nextword", {**common, "precision": precision}),
                "llama.cpp": ("llama", {**common, "gguf": made["gguf"][precision]}),
            }
            if precision == "float32":
                runs |= {"stock": ("stock", common), "litgpt": ("litgpt", common)}
            if precision == "int8" and name == "GPT-2-small":
                runs["torch, dynamic int8"] = ("dynamic", common)
            show(f"{name}, {texts} together, {precision}", in_turn(f"{name}-{texts}-{precision}", "write", runs))


def prompt() -> None:
    made = model_directory("GPT-2-small")
    common = {**made["common"], "texts": 1, "prompt": 512}
    for precision in ("float32", "int8"):
        runs = {
            "nextword": ("nextword", {**common, "precision": precision}),
            "llama.cpp": ("llama", {**common, "gguf": made["gguf"][precision]}),
        }
        if precision == "float32":
            runs["stock"] = ("stock", common)
        show(f"a prompt of 512, {precision}", in_turn(f"prompt-{precision}", "prompt", runs))


def show(title: str, found: dict[str, list[dict[str, Any]]]) -> None:
    ours = rates(found["nextword"])
    print(f"\n| {title} | tokens a second | nextword's, in its times | peak MB |\n|---|---|---|---|")
    for who, turns in found.items():
        speeds = rates(turns)
        ratios = [o / s for o, s in zip(ours, speeds, strict=True)]
        print(f"| {who} | {middle(speeds)} | {middle(ratios, 2)} | {middle([t['peak_mb'] for t in turns])} |")


def first() -> None:
    made = model_directory("small")
    common = {**made["common"], "texts": 1, "gguf": made["gguf"]["float32"]}
    found = in_turn("first", "first", {who: (who, common) for who in ("nextword", "llama", "stock")})
    print("\n| first token, small model | seconds | of them importing torch |\n|---|---|---|")
    for who, turns in found.items():
        torch_ = [turn["import_torch"] for turn in turns if "import_torch" in turn]
        print(f"| {who} | {middle([t['seconds'] for t in turns], 2)} | {middle(torch_, 2) if torch_ else '–'} |")


def bounds() -> None:
    """What no program passes here: a product of float32 matrices, and reading memory from one end to the other."""
    import torch

    from benchmarks.speed_worker import matmul_rate

    row, rates = torch.ones(2**27), []  # 537 MB
    for _ in range(10):
        begin = time.perf_counter()
        row.sum()
        rates.append(row.nbytes / (time.perf_counter() - begin) / 1e9)
    print(f"\nproducts: {matmul_rate() / 1e9:.0f} GFLOP/s; memory: {middle(rates)} GB/s")


def precision() -> None:
    """What fewer bits lose: models of five texts, each on what was held out of its own."""
    print("\n| model of | parameters | float32: bits per byte | int8 | int4 |\n|---|---|---|---|---|")
    for run in sorted((KEPT / "laws" / "held").glob("*-10m")):
        found = {
            kind: cell(
                f"precision-{run.name}-{kind}",
                lambda r=run, k=kind: nextword("evaluate", r, "--precision", k, "--json", "--quiet"),
            )
            for kind in ("float32", "int8", "int4")
        }
        exact = found["float32"]["bits_per_byte"]
        more = [f"{found[kind]['bits_per_byte'] - exact:+.4f}" for kind in ("int8", "int4")]
        parameters = json.loads((run / "result.json").read_text(encoding="utf-8"))["parameters"]
        print(f"| {run.name.removesuffix('-10m')} | {parameters:,} | {exact:.4f} | {' | '.join(more)} |")


def main() -> None:
    parts = (bounds, sprint, training, writing, prompt, first, precision)
    sections = {part.__name__: part for part in parts}
    for name in sys.argv[1:] or list(sections):
        print(f"\n## {name}", flush=True)
        sections[name]()


if __name__ == "__main__":
    main()
