"""Unmodified lm-eval through the server: the same accuracy and answers as with its own `hf` model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from needs import DATA

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(3600)
def test_lm_eval_through_the_server_equals_lm_eval_hf(base: Path) -> None:
    python = os.environ.get("NEXTWORD_LM_EVAL") or (sys.executable if find_spec("lm_eval") else None)
    if python is None:
        pytest.skip("needs lm-eval: make test-all; NEXTWORD_LM_EVAL may name a Python that has it")
    if not (DATA / "blimp.tar.xz").is_file():
        pytest.skip(f"needs data: {DATA / 'blimp.tar.xz'} is not there; set NEXTWORD_DATA to the folder")
    command = [sys.executable, "-m", "benchmarks.lm_eval_agreement", str(base), "--pairs", "2", "--python", python]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NEXTWORD_DATA": str(DATA)}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["pairs"] + result["too_long"] == 2 * 67
    assert result["pairs"] > 60
    assert result["served"] == result["hf"]
    assert result["differing_answers"] == 0
    assert 0 <= result["largest_difference"] < 1e-3
