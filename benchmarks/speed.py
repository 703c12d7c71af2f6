"""Speed compared with other libraries: `python -m benchmarks.speed [NAME …]`.

Names: hardware, time-to-loss, training, decoding, prefill, first-token, and quantization, which needs the runs of
`benchmarks.scaling_laws validate`. Each figure is the median, with the range, of several interleaved processes. litgpt and
llama-cpp-python are installed in their own environments under build/bench/peers on first use (compiling llama.cpp takes ten
minutes).
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

from benchmarks.run import CACHE_DIR, DATA, cached, nextword

ROUNDS = 3
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SHAPES = {
    "6/6/384": {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": 256, "vocab_size": 65, "rows": 16},
    "GPT-2-small": {"n_layers": 12, "n_heads": 12, "d_model": 768, "context_length": 1024, "vocab_size": 50257},
    "small": {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": 1024, "vocab_size": 8192},
}
TIME_TO_LOSS = ("--tokens", "215k", "--training.batch-tokens", "2048", "--training.evaluations", "1")
SAME_TIME = ("--size", "tiny", "--model.context-length", "128")
PEERS = {
    "litgpt": ("litgpt", "torch>=2.13,<2.14", "numpy"),
    "llama": ("llama-cpp-python", "numpy"),
    "llama-server": ("llama-cpp-python[server]", "numpy"),
    "lm-eval": ("lm-eval[api,hf]", "torch>=2.13,<2.14", "transformers>=5,<6"),
}


def interpreter(program: str) -> str:
    """The Python interpreter of a program's environment, which is created if it does not exist."""
    if program not in PEERS:
        return sys.executable
    folder = CACHE_DIR / "peers" / program
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {' '.join(PEERS[program])} …", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[program]], check=True)
        (folder / "ready").touch()
    return str(python.absolute())


def run_worker(program: str, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement by `benchmarks.speed_worker` in the environment of the program."""
    command = [
        interpreter(program),
        "-W",
        "ignore",
        "-m",
        "benchmarks.speed_worker",
        program,
        task,
        json.dumps(settings),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def interleaved(name: str, task: str, runs: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Interleaved measurements of the runs (program, settings), so that changes in machine speed affect all alike."""
    for program in {program for program, _ in runs.values()}:
        interpreter(program)
    results: dict[str, list[dict[str, Any]]] = {title: [] for title in runs}
    for number in range(ROUNDS):
        for title, (program, settings) in runs.items():
            results[title].append(
                cached(f"speed-{name}-{title}-{number}", lambda p=program, s=settings: run_worker(p, task, s))
            )
    return results


def format_median(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def median_rates(measurements: list[dict[str, Any]]) -> list[float]:
    """The median rate of each process."""
    return [statistics.median(measurement["rates"]) for measurement in measurements]


def model_directory(name: str) -> dict[str, Any]:
    """A model of a shape with random weights, as a Hugging Face directory and as GGUF in three precisions."""
    folder = CACHE_DIR / "models" / name
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


# ---------------------------------------------------------------- tables


def time_to_loss() -> None:
    """Time from process start to the saved model at the loss of the reference run, and the loss in the time of that run."""
    text, target = DATA / "tinyshakespeare", 1.898
    shape = ["--model.n-layers", "4", "--model.n-heads", "4", "--model.d-model", "128", "--model.context-length", "64"]
    common = ["pretrain", text, "--tokenizer", "char", "--json", "--quiet"]

    def ours(name: str, seed: int, *more: str) -> dict[str, Any]:
        out = CACHE_DIR / name
        shutil.rmtree(out, ignore_errors=True)
        return nextword(*common, "--out", out, "--seed", str(seed), *more)

    def plain_loop(seed: int) -> dict[str, Any]:
        arguments = [str(text / "input.txt"), str(CACHE_DIR / f"plain-loop-{seed}"), str(seed)]
        begin = time.time()
        out = subprocess.check_output([sys.executable, "-W", "ignore", "-m", "benchmarks.reference_loop", *arguments])
        return {**json.loads(out), "wall": time.time() - begin}

    print(
        f"\n| seed | plain loop: loss | seconds | to loss {target}: loss | seconds | fraction of the time "
        "| in the same time: loss | seconds |"
    )
    print("|---" * 8 + "|")
    ratios = []
    for seed in (1, 2, 3):
        theirs = cached(f"time-to-loss-plain-loop-{seed}", lambda s=seed: plain_loop(s))
        quick = cached(
            f"time-to-loss-target-{seed}", lambda s=seed: ours("time-to-loss-target", s, *shape, *TIME_TO_LOSS)
        )
        budget = f"{theirs['wall']:.0f}s"
        long = cached(
            f"time-to-loss-same-time-{seed}",
            lambda s=seed, t=budget: ours("time-to-loss-same-time", s, "--budget", t, *SAME_TIME),
        )
        ratios.append(quick["wall"] / theirs["wall"])
        print(
            f"| {seed} | {theirs['loss']:.4f} | {theirs['wall']:.0f} | {quick['loss']:.4f} | {quick['wall']:.1f} "
            f"| {ratios[-1]:.3f} | {long['loss']:.4f} | {long['wall']:.0f} |"
        )
    print(f"\nfraction of the time: {format_median(ratios, 3)}")


def training() -> None:
    shape = {**SHAPES["6/6/384"], "rounds": 4}
    ours = {**shape, "micro_batch_rows": 8}  # two micro-batches: the same speed with less memory
    results = interleaved(
        "training",
        "train",
        {
            "nextword": ("nextword", ours),
            "nextword, modern": ("nextword", {**ours, "preset": "modern"}),
            "transformers": ("transformers", shape),
            "transformers, compiled": ("transformers-compiled", shape),
            "litgpt": ("litgpt", shape),
        },
    )

    # FLOPs per token (Chowdhery et al. 2022, appendix B): 6 for each weight of a linear layer, 12 · L · D · T for attention.
    def flops_per_token(parameters: float) -> float:
        return 6 * parameters + 12 * shape["n_layers"] * shape["d_model"] * shape["context_length"]

    ours = median_rates(results["nextword"])
    print(
        "\n| | tokens/s | relative to nextword | share of matrix multiplication rate | peak MB |\n|---|---|---|---|---|"
    )
    for title, measurements in results.items():
        speeds = median_rates(measurements)
        shares = [
            100 * s * flops_per_token(t["parameters"]) / t["matmul"] for s, t in zip(speeds, measurements, strict=True)
        ]
        ratios = [100 * s / o for s, o in zip(speeds, ours, strict=True)]
        memory = [measurement["peak_mb"] for measurement in measurements]
        print(
            f"| {title} | {format_median(speeds)} | {format_median(ratios)} % | {format_median(shares)} % "
            f"| {format_median(memory)} |"
        )


def decoding() -> None:
    for name, sequences in (("GPT-2-small", 1), ("GPT-2-small", 8), ("small", 1)):
        model = model_directory(name)
        common = {**model["common"], "sequences": sequences, "prompt": 16, "tokens": 96 if name == "small" else 48}
        for precision in ("float32", "int8", "int4"):
            runs = {
                "nextword": ("nextword", {**common, "precision": precision}),
                "llama.cpp": ("llama", {**common, "gguf": model["gguf"][precision]}),
            }
            if precision == "float32":
                runs |= {"transformers": ("transformers", common), "litgpt": ("litgpt", common)}
            if precision == "int8" and name == "GPT-2-small":
                runs["torch, dynamic int8"] = ("dynamic", common)
            show(
                f"{name}, {sequences} sequences, {precision}",
                interleaved(f"{name}-{sequences}-{precision}", "decode", runs),
            )


def prefill() -> None:
    model = model_directory("GPT-2-small")
    common = {**model["common"], "sequences": 1, "prompt": 512}
    for precision in ("float32", "int8"):
        runs = {
            "nextword": ("nextword", {**common, "precision": precision}),
            "llama.cpp": ("llama", {**common, "gguf": model["gguf"][precision]}),
        }
        if precision == "float32":
            runs["transformers"] = ("transformers", common)
        show(f"prompt of 512 tokens, {precision}", interleaved(f"prefill-{precision}", "prefill", runs))


def show(title: str, results: dict[str, list[dict[str, Any]]]) -> None:
    ours = median_rates(results["nextword"])
    print(f"\n| {title} | tokens/s | speedup of nextword | peak MB |\n|---|---|---|---|")
    for program, measurements in results.items():
        speeds = median_rates(measurements)
        ratios = [o / s for o, s in zip(ours, speeds, strict=True)]
        memory = format_median([measurement["peak_mb"] for measurement in measurements])
        print(f"| {program} | {format_median(speeds)} | {format_median(ratios, 2)} | {memory} |")


def first_token() -> None:
    model = model_directory("small")
    common = {**model["common"], "sequences": 1, "gguf": model["gguf"]["float32"]}
    programs = ("nextword", "llama", "transformers")
    results = interleaved("first-token", "first-token", {program: (program, common) for program in programs})
    print("\n| time to first token of a new process, small model | seconds | of which importing torch |\n|---|---|---|")
    for program, measurements in results.items():
        imports = [m["import_torch"] for m in measurements if "import_torch" in m]
        seconds = format_median([m["seconds"] for m in measurements], 2)
        print(f"| {program} | {seconds} | {format_median(imports, 2) if imports else '–'} |")


def hardware() -> None:
    """Upper bounds of this machine: the rate of float32 matrix multiplication, and the memory bandwidth."""
    import torch

    from benchmarks.speed_worker import matmul_rate

    tensor, rates = torch.ones(2**27), []  # 537 MB
    for _ in range(10):
        begin = time.perf_counter()
        tensor.sum()
        rates.append(tensor.nbytes / (time.perf_counter() - begin) / 1e9)
    print(f"\nmatrix multiplication: {matmul_rate() / 1e9:.0f} GFLOP/s; memory: {format_median(rates)} GB/s")


def quantization() -> None:
    """The loss of quantized models of five texts on their validation sets."""
    print("\n| text | parameters | float32: bits per byte | int8 | int4 |\n|---|---|---|---|---|")
    for run in sorted((CACHE_DIR / "scaling-laws" / "validation").glob("*-10m")):
        results = {
            kind: cached(
                f"quantization-{run.name}-{kind}",
                lambda r=run, k=kind: nextword("evaluate", r, "--precision", k, "--json", "--quiet"),
            )
            for kind in ("float32", "int8", "int4")
        }
        exact = results["float32"]["bits_per_byte"]
        increases = [f"{results[kind]['bits_per_byte'] - exact:+.4f}" for kind in ("int8", "int4")]
        parameters = json.loads((run / "result.json").read_text(encoding="utf-8"))["parameters"]
        print(f"| {run.name.removesuffix('-10m')} | {parameters:,} | {exact:.4f} | {' | '.join(increases)} |")


def main() -> None:
    functions = (hardware, time_to_loss, training, decoding, prefill, first_token, quantization)
    sections = {function.__name__.replace("_", "-"): function for function in functions}
    for name in sys.argv[1:] or list(sections):
        print(f"\n## {name}", flush=True)
        sections[name]()


if __name__ == "__main__":
    main()
