"""How long it takes until harm and waste are stopped, in seconds; the tests hold that they are, and no time.

    python -m benchmarks.time_limits

A chat template without end, schemas that would take for ever, and a second SIGTERM to a run; and a training run with a budget
of 20 s, whose time should be the budget's.
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
    "a text of a million characters": {"type": "string", "minLength": 10**6, "maxLength": 10**6},
}
SIGNALS = (
    "import time\nfrom nextword.common.run_dir import catch_signals\nwith catch_signals() as caught:\n"
    "    print(1, flush=True)\n"
    "    while not caught: time.sleep(0.01)\n    print(2, flush=True)\n    time.sleep(1000)"
)


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def template(tokenizer: Tokenizer) -> None:
    async def render() -> None:
        chat = JinjaChatEncoder(tokenizer, ENDLESS)
        with contextlib.suppress(APIError):
            await chat.render([{"role": "user", "content": "Hi"}])
        await chat.close()

    asyncio.run(render())


def write(tokenizer: Tokenizer, schema: dict[str, object]) -> None:
    """The grammar, and its first 40 tokens, where it is not refused."""
    try:
        held = ConstraintCompiler(tokenizer, tokenizer.eos_ids).compile_json_schema(schema)
        for _ in range(40):
            token = int(torch.multinomial(held.allowed_mask().float(), 1))
            if token in tokenizer.eos_ids:
                break
            held.accept_token(token)
    except NextwordError:
        pass


def second_signal() -> float:
    with subprocess.Popen([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        return timed(process.wait)


def budget() -> float:
    with tempfile.TemporaryDirectory() as folder:
        words = ["pretrain", "python-docs", "--out", Path(folder) / "run", "--budget", "20s", "--quiet"]
        program = [sys.executable, "-m", "nextword", *map(str, words)]
        return timed(lambda: subprocess.run(program, check=True, capture_output=True))


def main() -> None:
    tokenizer = train_bpe(['The house on the hill: {"a": [1, 2]}'] * 3, 300)
    found = {"a chat template without end": [timed(lambda: template(tokenizer)) for _ in range(3)]}
    for name, schema in SCHEMAS.items():
        found[f"a schema: {name}"] = [timed(lambda s=schema: write(tokenizer, s)) for _ in range(3)]
    found["a second SIGTERM"] = [second_signal() for _ in range(3)]
    found["a run with a budget of 20 s"] = [budget() for _ in range(3)]
    print("\n| what | seconds: middle of three (from to) |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |")


if __name__ == "__main__":
    main()
