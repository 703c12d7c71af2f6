"""Reads a GGUF file with llama.cpp in a process of its own (`common.limited_process`), since its native code may end the
process. Nothing is imported from nextword."""

import importlib
from typing import Any

import numpy as np


def answer(file: str, lines: list[str], sequences: list[list[int]], out: str) -> list[list[int]]:
    """Write the logits [T, V] of every sequence of token ids to a file in NumPy's format.

    Returns:
        The token ids of every line.
    """
    module: Any = importlib.import_module("llama_cpp")
    length = len(sequences[0])
    sizes = {"n_ctx": length, "n_batch": length, "n_gpu_layers": 0, "logits_all": True, "verbose": False}
    cache = {"type_k": module.GGML_TYPE_F32, "type_v": module.GGML_TYPE_F32, "flash_attn": False}
    llama = module.Llama(file, **sizes, **cache)
    tokens = [llama.tokenize(line.encode(), add_bos=False, special=False) for line in lines]
    logits: list[np.ndarray] = []
    for sequence in sequences:
        llama.reset()
        llama.eval(sequence)
        logits.append(np.array(llama.scores[: len(sequence)]))
    llama.close()
    np.savez(out, *logits)
    return tokens
