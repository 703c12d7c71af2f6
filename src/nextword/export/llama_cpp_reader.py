"""Reads a GGUF file with llama.cpp in a separate process, run as a script, since its native code may end the process.

It reads one JSON object from standard input, with `file`, `lines` of text, `sequences` of tokens and `out`, and writes `out` in
NumPy's format: the tokens of every line in JSON, and the logits [T, V] of every sequence. It imports nothing from nextword.
"""

import importlib
import json
import sys
from typing import Any

import numpy as np


def main() -> None:
    """Answer the request."""
    module: Any = importlib.import_module("llama_cpp")
    request = json.load(sys.stdin)
    length = len(request["sequences"][0])
    sizes = {"n_ctx": length, "n_batch": length, "n_gpu_layers": 0, "logits_all": True, "verbose": False}
    cache = {"type_k": module.GGML_TYPE_F32, "type_v": module.GGML_TYPE_F32, "flash_attn": False}
    llama = module.Llama(request["file"], **sizes, **cache)
    tokens = [llama.tokenize(line.encode(), add_bos=False, special=False) for line in request["lines"]]
    logits: list[np.ndarray] = []
    for sequence in request["sequences"]:
        llama.reset()
        llama.eval(sequence)
        logits.append(np.array(llama.scores[: len(sequence)]))
    llama.close()
    np.savez(request["out"], np.array(json.dumps(tokens)), *logits)


if __name__ == "__main__":
    main()
