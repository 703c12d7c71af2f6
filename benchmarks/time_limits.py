"""Time until runaway work is stopped. The tests check that it is stopped, not how fast.

    python -m benchmarks.time_limits

Measured are an endless chat template, JSON schemas that are expensive to compile, a second SIGTERM to a run, and a training run
with a budget of 20 s.
"""

import asyncio
import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nextword.common.errors import NextwordError
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.inference.constrained import ConstraintCompiler
from nextword.serving.chat_templates import JinjaChatEncoder
from nextword.serving.protocol import APIError

ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
SCHEMAS = {
    "nested repetitions": {"type": "string", "pattern": "((((((a{50}){50}){50}){50}){50}){50})"},
    "2,000 properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "a string of a million characters": {"type": "string", "minLength": 10**6, "maxLength": 10**6},
}
SIGNALS = (
    "import time\nfrom nextword.common.run_dir import catch_signals\nwith catch_signals() as caught:\n"
    "    print(1, flush=True)\n"
    "    while not caught: time.sleep(0.01)\n    print(2, flush=True)\n    time.sleep(1000)"
)


def timed(run: Callable[[], object]) -> float:
    """The seconds that a function takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def render_endless_template(tokenizer: Tokenizer) -> None:
    async def render() -> None:
        chat = JinjaChatEncoder(tokenizer, ENDLESS)
        with contextlib.suppress(APIError):
            await chat.render([{"role": "user", "content": "Hi"}])
        await chat.close()

    asyncio.run(render())


def generate_json(tokenizer: Tokenizer, schema: dict[str, object]) -> None:
    """Compile a schema and generate 40 tokens, unless it is rejected."""
    try:
        constraint = ConstraintCompiler(tokenizer, tokenizer.eos_ids).compile_json_schema(schema)
        for _ in range(40):
            token = int(torch.multinomial(constraint.allowed_mask().float(), 1))
            if token in tokenizer.eos_ids:
                break
            constraint.accept_token(token)
    except NextwordError:
        pass


def second_sigterm() -> float:
    with subprocess.Popen([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        return timed(process.wait)


def budgeted_run() -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["pretrain", "python-docs", "--out", Path(folder) / "run", "--budget", "20s", "--quiet"]
        program = [sys.executable, "-m", "nextword", *map(str, arguments)]
        return timed(lambda: subprocess.run(program, check=True, capture_output=True))


def main() -> None:
    tokenizer = train_bpe(['The house on the hill: {"a": [1, 2]}'] * 3, 300)
    results = {"an endless chat template": [timed(lambda: render_endless_template(tokenizer)) for _ in range(3)]}
    for name, schema in SCHEMAS.items():
        results[f"a schema: {name}"] = [timed(lambda s=schema: generate_json(tokenizer, s)) for _ in range(3)]
    results["a second SIGTERM"] = [second_sigterm() for _ in range(3)]
    results["a run with a budget of 20 s"] = [budgeted_run() for _ in range(3)]
    print("\n| case | seconds: median of three (range) |\n|---|---|")
    for name, seconds in results.items():
        print(f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f}) |")


if __name__ == "__main__":
    main()
