"""Malicious model directories: rejected immediately, with the file name, without running or allocating anything."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nextword as package
from conftest import CLIRunner
from nextword.common import fs
from nextword.common.errors import CorruptFileError, NextwordError
from nextword.data.corpus import ShardedTokens
from nextword.data.tokenizer import Tokenizer, train_bpe
from nextword.model.config import build_config
from nextword.model.gpt import GPT
from nextword.model.hf import load_model, save_model

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOM = 2**28  # bytes that a refusal may reserve; what is described below has terabytes
CONFIG = build_config("modern", "tiny", vocab_size=300, n_layers=2, n_heads=2, d_model=16, context_length=24)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory that opens, with its tokenizer."""
    directory = tmp_path_factory.mktemp("honest")
    torch.manual_seed(0)
    save_model(GPT(CONFIG), directory, end_of_text_id=0, pad_token_id=1)
    train_bpe(["a text of no harm"] * 3, 280).save(directory, CONFIG.context_length)
    package.load(directory, "cpu")
    return directory


@contextmanager
def within_bounds() -> Iterator[None]:
    """What happens inside cannot reserve more memory than `ROOM`, where the system lets that be said. It ends well before the
    time limit of a test."""
    limits = None
    if resource is not None and Path("/proc/self/statm").exists():
        limits = resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, limits[1]))
    begin = time.process_time()
    try:
        yield
    finally:
        print(f"\n{time.process_time() - begin:.2f} s of the processor's time")
        if resource is not None and limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    return change_json("config.json", **changes)


def header(length: int, content: bytes = b"") -> Callable[[Path], None]:
    """A model.safetensors that declares a header of this length."""

    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(struct.pack("<Q", length) + (content or data[8:]))

    return change


def giant_header(directory: Path) -> None:
    """Six million bytes of it, all there, and none of them wrong: empty tensors."""
    one = '"t{:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = "{" + ",".join(one.format(i) for i in range(100_000)) + "}"
    header(len(text), text.encode())(directory)


def lying_offsets(directory: Path) -> None:
    text = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}})
    header(len(text), text.encode())(directory)


def index(*names: str) -> Callable[[Path], None]:
    """Weights under an index that says they are in these files."""

    def change(directory: Path) -> None:
        mapped = {f"tensor.{i}": name for i, name in enumerate(names)}
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))

    return change


def pipe(directory: Path) -> None:
    """A shard that is a pipe, which would be waited for without end."""
    os.mkfifo(directory / "a.safetensors")
    index("a.safetensors")(directory)


def pickle_alone(directory: Path) -> None:
    """A pickle that would say hello, had it been opened."""
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run-by-a-pickle'\ntR.")


def code(directory: Path) -> None:
    (directory / "evil.py").write_text("open('run-by-a-model', 'w')")
    config(auto_map={"AutoModelForCausalLM": "evil.Model"})(directory)


def sealed(model: Any = None, entries: Any = None) -> Callable[[Path], None]:
    """A manifest of ours that says so of the model, and so of its files."""

    def change(directory: Path) -> None:
        fs.write_manifest(directory, {} if model is None else {"model": model})
        if entries is not None:
            said = {"files": entries}
            (directory / fs.MANIFEST).write_text(json.dumps({**said, "sha256": fs.sha256_of_json(said)}))

    return change


def token(id: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / "tokenizer.json").read_text())
        content["model"]["vocab"]["far"] = id
        (directory / "tokenizer.json").write_text(json.dumps(content))

    return change


def too_large(name: str) -> Callable[[Path], None]:
    """A file with a hole of a terabyte, which takes no room on the disk."""

    def change(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.truncate(2**40)

    return change


def steps(**parts: Any) -> Callable[[Path], None]:
    """A tokenizer.json with these steps."""
    return change_json("tokenizer.json", **parts)


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def not_finite(value: float) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(weights, directory / "model.safetensors")

    return change


def added(name: str, content: str = "{}") -> Callable[[Path], None]:
    """A file laid beside sealed ones."""

    def change(directory: Path) -> None:
        fs.write_manifest(directory, {"model": CONFIG.to_dict()})
        (directory / name).write_text(content)

    return change


def sealed_then_large(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        sealed()(directory)
        (directory / "hole").touch()
        fs.write_manifest(directory, {}, {"hole": {"bytes": 2**40, "sha256": "0"}})
        too_large(name)(directory)

    return change


SINUSOIDAL = {
    **build_config("tutorial", "tiny", vocab_size=300, d_model=16, n_heads=2).to_dict(),
    "context_length": 2**21,
}
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a billion layers": (config(num_hidden_layers=10**7), "a tensor is missing: config.json says 10,000,000 layers"),
    "a wide model": (config(hidden_size=10**7), "has the shape"),
    "the widest model": (
        config(hidden_size=2**24, num_attention_heads=2**24, num_key_value_heads=1, head_dim=2**24),
        "too large for any model",
    ),
    "a great vocabulary": (config(vocab_size=10**12), "vocab_size must be a whole number from 1 to"),
    "many heads": (config(num_attention_heads=10**7, num_key_value_heads=10**7), "has the shape"),
    "a long context": (config(max_position_embeddings=10**12), "context_length must be a whole number from 1 to"),
    "a number of four thousand digits": (config(hidden_size=10**4000), "d_model must be a whole number from 1 to"),
    "a number that is too large for a float": (config(rope_parameters={"rope_theta": 10**400}), "too large"),
    "numbers that are none": (config(rms_norm_eps=float("nan")), "norm_eps"),
    "words for numbers": (config(rope_parameters=None, rope_theta="wide"), "config.json"),
    "lists for objects": (config(rope_parameters=[1]), "config.json"),
    "a kind that is a list": (config(model_type=["qwen3"]), "is not supported"),
    "code of its own": (code, "runs no code from a model"),
    "a config of a terabyte": (too_large("config.json"), "where no file of this kind needs"),
    "a header longer than the file": (header(2**63), "a header of 9,223,372,036,854,775,808 bytes"),
    "a header shorter than itself": (header(10), "not a safetensors file"),
    "no header": (header(0), "not a safetensors file"),
    "a giant header": (giant_header, "a header of 6,0"),
    "offsets past the end": (lying_offsets, "not a safetensors file"),
    "a path that climbs out": (index("../elsewhere.safetensors"), "is outside the directory"),
    "a path from the root": (index("/etc/passwd"), "is outside the directory"),
    "a shard that is missing": (index("a.safetensors"), "missing, or not a file"),
    "a shard that is no name": (index("a\0b"), "missing, or not a file"),
    "a pickle": (pickle_alone, "is a pickle, which nextword does not open: convert it"),
    "a manifest with another width": (sealed({**CONFIG.to_dict(), "d_model": 10**7}), "has the shape"),
    "a manifest with no model": (sealed([1]), "not a JSON object"),
    "a manifest with unknown settings": (sealed({"wings": 2}), "unknown model settings: wings"),
    "a manifest whose table is not there": (sealed(SINUSOIDAL), "is missing"),
    "a manifest that climbs out": (sealed(entries={"../x": {"bytes": 1, "sha256": ""}}), "outside of its directory"),
    "a manifest of long names": (sealed(entries={"x" * 5000: {"bytes": 1, "sha256": ""}}), "outside of its directory"),
    "a manifest of no sizes": (sealed(entries={"x": 3}), "not a manifest"),
    "a manifest of a terabyte": (sealed_then_large(fs.MANIFEST), "where no file of this kind needs"),
    "a manifest that names a terabyte": (sealed_then_large("hole"), "where no directory of this kind needs"),
    "a manifest that names a file twice": (
        sealed(entries={name: {"bytes": 0, "sha256": ""} for name in ("config.json", "./config.json")}),
        "this file twice",
    ),
    "an index beside sealed weights": (added("model.safetensors.index.json"), "not listed in the manifest"),
    "a template beside a sealed model": (added("chat_template.jinja"), "not listed in the manifest"),
    "other weights beside a sealed model": (added("model-00001-of-00002.safetensors"), "not listed in the manifest"),
    "weights that are no number": (not_finite(float("nan")), "down_proj.weight has values that are not finite"),
    "infinite weights": (not_finite(float("-inf")), "down_proj.weight has values that are not finite"),
    "a table of characters that is none": (
        steps(normalizer={"type": "Precompiled", "precompiled_charsmap": "AQ=="}),
        "Cannot parse precompiled_charsmap",
    ),
    "chunks of no length": (steps(pre_tokenizer={"type": "FixedLength", "length": 0}), "must be non-zero"),
    "a template without its token": (
        steps(
            post_processor={
                "type": "TemplateProcessing",
                "pair": [],
                "special_tokens": {},
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            }
        ),
        "the tokenizers library failed",
    ),
    "a normalizer that explodes": (
        steps(normalizer={"type": "Sequence", "normalizers": 18 * [replace("q", "qq")]}),
        "one character becomes",
    ),
    "a regular expression without end": (steps(pre_tokenizer=split("(z+)+!")), "retry-limit"),
    "a regular expression that is none": (steps(pre_tokenizer=split("((")), "unmatched parenthesis"),
    "a tokenizer's settings of a terabyte": (too_large("tokenizer_config.json"), "where no file of this kind needs"),
    "settings of generation of a terabyte": (too_large("generation_config.json"), "where no file of this kind needs"),
    "a token far out": (token(2**32 - 6), "an id of 4,294,967,290"),
    "a tokenizer of a terabyte": (too_large("tokenizer.json"), "where no file of this kind needs"),
}
if hasattr(os, "mkfifo"):
    HOSTILE["a shard that is a pipe"] = (pipe, "missing, or not a file")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_directory_is_refused_at_once(honest, tmp_path, monkeypatch, name):
    change, message = HOSTILE[name]
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    change(directory)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NextwordError) as error, within_bounds():
        package.load(directory, "cpu")
    assert message in str(error.value)
    assert str(directory) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was run"


def test_the_program_says_so_without_a_traceback(honest, tmp_path, nextword: CLIRunner):
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    config(num_hidden_layers=10**7)(directory)
    done = nextword("generate", directory, "The")
    assert done.returncode == CorruptFileError.exit_code
    assert "10,000,000 layers" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- any bytes, any values

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps rope_theta rope_parameters rope_scaling hidden_act "
    "layer_types model_type architectures id2label num_labels tie_word_embeddings auto_map quantization_config "
    "attention_bias partial_rotary_factor"
).split()


def again(honest: Path, directory: Path) -> Path:
    """The honest directory's small files, as they were, beside its weights."""
    if not directory.exists():
        shutil.copytree(honest, directory)
    for path in honest.glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_values_in_a_config_are_a_model_or_a_clear_error(honest, tmp_path_factory, changes):
    directory = again(honest, tmp_path_factory.getbasetemp() / "config-fuzz")
    config(**changes)(directory)
    try:
        load_model(directory)
    except NextwordError as error:
        assert str(directory) in str(error)


@settings(max_examples=100)
@given(st.data())
def test_any_values_in_a_tokenizer_are_one_or_a_clear_error(honest, tmp_path_factory, data):
    """Its own JSON with any values at any place, or cut and changed bytes; and what opens can be used."""
    directory = again(honest, tmp_path_factory.getbasetemp() / "tokenizer-fuzz")
    path = directory / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
    if data.draw(st.booleans()):
        place = content = json.loads(path.read_text())
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
                break
            place = inner
        place[key] = data.draw(VALUES)
        path.write_text(json.dumps(content))
    else:
        changed = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(changed))
    try:
        tokenizer = Tokenizer.open(directory)
        tokenizer.decode(tokenizer.encode("a text"))
    except NextwordError as error:
        assert str(directory) in str(error) or "tokenizer" in str(error)


@settings(max_examples=100)
@given(st.binary(max_size=60), st.integers(0, 130), st.booleans())
def test_any_bytes_as_a_shard_are_tokens_or_a_clear_error(tmp_path_factory, data, place, whole):
    path = tmp_path_factory.getbasetemp() / "train-00000.npy"
    np.save(path, np.arange(50, dtype="<u2"))
    good = path.read_bytes()
    path.write_bytes(data if whole else good[:place] + data + good[place + len(data) :])
    try:
        tokens = ShardedTokens([path])
        tokens.read(0, len(tokens))
    except CorruptFileError as error:
        assert str(path) in str(error)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=3), VALUES)
def test_any_values_in_a_manifest_are_a_clear_error(tmp_path_factory, entries, model):
    directory = tmp_path_factory.getbasetemp() / "manifest-fuzz"
    directory.mkdir(exist_ok=True)
    said = {"model": model, "files": entries}
    (directory / fs.MANIFEST).write_text(json.dumps({**said, "sha256": fs.sha256_of_json(said)}))
    try:
        fs.verify_manifest(directory)
    except CorruptFileError as error:
        assert str(directory) in str(error)


# ---------------------------------------------------------------- tokenizers of others


def test_a_tokenizer_with_steps_of_its_own_is_tried_once(honest, tmp_path, monkeypatch):
    """One with a regular expression that is not nextword's is tried in another process, the first time; nextword's never."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fs.sys, "platform", "linux")
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    Tokenizer.open(directory)
    assert not (tmp_path / "cache").exists()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps(pre_tokenizer={"type": "Sequence", "pretokenizers": [split(r"\w+|\W+"), byte_level]})(directory)
    assert Tokenizer.open(directory).decode(Tokenizer.open(directory).encode("a text of it")) == "a text of it"
    assert len(list((tmp_path / "cache" / "nextword" / "tokenizers").iterdir())) == 1
    monkeypatch.setattr("subprocess.run", None)
    Tokenizer.open(directory)


def test_a_panic_while_a_text_is_encoded_is_an_error(honest, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    steps(pre_tokenizer=split("((é+)+)+!"))(directory)
    tokenizer = Tokenizer.open(directory)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(NextwordError, match="retry-limit"):
            encode(100 * "é")


@pytest.mark.parametrize("command", ["generate", "finetune", "evaluate", "export"])
def test_a_tokenizer_larger_than_the_model_is_refused(honest, texts, tmp_path, nextword: CLIRunner, command):
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    train_bpe([path.read_text() for path in texts.iterdir()], 301).save(directory)
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "".join(f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(40)))
    arguments = {
        "generate": ["The"],
        "finetune": [table, "--out", tmp_path / "run", "--steps", "1"],
        "evaluate": [texts],
    }
    done = nextword(command, directory, *arguments.get(command, []))
    assert done.returncode != 0 and "the tokenizer has 301 tokens and the model 300" in done.stderr
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_directory_saved_again_has_a_stale_manifest(honest, tmp_path, nextword: CLIRunner):
    """The message says how to drop it; without it the directory opens, and `verify` says that there is none."""
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    sealed(CONFIG.to_dict())(directory)
    assert nextword("verify", directory).returncode == 0
    config(use_cache=True)(directory)
    for command in (["verify", directory], ["generate", directory, "a"]):
        done = nextword(*command)
        assert done.returncode == CorruptFileError.exit_code
        assert "the manifest is stale: delete" in done.stderr and str(directory / fs.MANIFEST) in done.stderr
    (directory / fs.MANIFEST).unlink()
    package.load(directory, "cpu")
    done = nextword("verify", directory)
    assert done.returncode == NextwordError.exit_code and "no manifest" in done.stderr


def test_a_context_of_millions_takes_no_memory(honest, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(honest, directory)
    config(max_position_embeddings=4_194_304)(directory)
    with within_bounds():
        completions = [
            package.load(path, "cpu").generate("a text", temperature=0, max_tokens=8) for path in (directory, honest)
        ]
    assert completions[0][0].text == completions[1][0].text
