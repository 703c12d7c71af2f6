"""A model that is served: what is made of it when it is loaded, and what the routes ask of it."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.data.issues import IssueLog
from nextword.inference.constrained import ConstraintCompiler, JSONConstraint
from nextword.inference.engine import Engine
from nextword.inference.model_runner import build_runner
from nextword.inference.quantization import Precision
from nextword.model.gpt import GPT
from nextword.pipeline.base_model import load_task_spec, resolve_model_dir
from nextword.pipeline.language_model import Model, load
from nextword.pipeline.predictor import Predictor
from nextword.serving.chat_templates import ChatEncoder, make_chat_encoder
from nextword.serving.engine_worker import EngineWorker
from nextword.serving.metrics import Metrics
from nextword.serving.protocol import MAX_SCHEMA_CHARS, APIError
from nextword.serving.responses import TokenText
from nextword.tasks.dataset import HEAD_KINDS, TaskSpec
from nextword.tasks.task_data import example_from_texts

MAX_INLINE_ENCODE_CHARS = 4096  # characters that are encoded in a thread, since the event loop would be held up
SCHEMA_TIMEOUT = 5.0  # for making a grammar


@dataclass(frozen=True)
class ServiceConfig:
    """What is served and how; where and to whom is the server's matter.

    Attributes:
        name: what clients call the model; None takes the folder's.
        max_batch: how many texts run at once, at most.
        queue: how many more may wait.
        deterministic: no text's numbers depend on the others, whatever the machine.

    Raises:
        UsageError: a number that is none.
    """

    model: Path
    name: str | None = None
    device: str = "auto"
    precision: Precision = "float32"
    max_batch: int = 8
    queue: int = 64
    deterministic: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.queue < 0:
            raise UsageError(
                f"--max-batch must be at least 1 and --queue at least 0, not {self.max_batch} and {self.queue}"
            )


class Service:
    """Made at once; what belongs to its model is there when it is `opened`."""

    def __init__(self, config: ServiceConfig, console: Console):
        self.config, self.console = config, console
        self.model_dir = resolve_model_dir(config.model)
        folder = self.model_dir.resolve()
        self.name = config.name or (folder.parent if (folder.parent / "run.json").is_file() else folder).name
        # Clients that have one model in mind need not know what this one is called.
        self.accepted_names = {self.name, str(config.model), "nextword"}
        self.metrics = Metrics()
        self.worker = EngineWorker(self.load_engine, config.queue, self.metrics)
        self.tokenizer_executor = ThreadPoolExecutor(1, "encode")
        self.schema_executor = ThreadPoolExecutor(1, "schemas")
        self.constraint_compiler: ConstraintCompiler | None = None
        self.created = int(self.model_dir.stat().st_mtime)
        self.is_loaded = False
        self.model: Model
        self.chat_encoder: ChatEncoder
        self.token_text: TokenText
        self.task_spec: TaskSpec | None = None
        self.predictor: Predictor | None = None
        self.kv_cache_bytes = 0
        self.max_token_bytes = 1  # bytes
        for name, help, read in (
            ("nextword_texts_running", "Texts that have a slot.", lambda: self.worker.num_running),
            ("nextword_texts_waiting", "Texts in the queue.", lambda: self.worker.num_waiting),
            ("nextword_texts_held", "Texts that were let in and are not finished.", lambda: self.worker.num_active),
            (
                "nextword_requests_open",
                "Requests that were let in and have not left.",
                lambda: len(self.worker.handles),
            ),
            (
                "nextword_events_unread",
                "Parts of answers that clients have yet to read.",
                lambda: self.worker.num_unread_events,
            ),
            ("nextword_slots", "Texts that can run at once.", lambda: self.worker.num_slots),
            ("nextword_key_value_bytes", "Memory that is kept for keys and values.", lambda: self.kv_cache_bytes),
        ):
            self.metrics.register_gauge(name, help, read)

    # ---------------------------------------------------------------- in the engine's thread

    def load_engine(self) -> Engine:
        """Load the model and reserve its memory.

        Raises:
            NextwordError: it cannot be opened, or there is no memory for one text.
        """
        settings = self.config
        model = load(settings.model, settings.device, settings.precision)
        tokenizer, gpt = model.tokenizer, model.gpt
        chat_encoder = make_chat_encoder(self.model_dir, tokenizer)
        slots = self._fit_slots(gpt)
        engine = Engine(
            gpt, tokenizer, max_batch=slots, seed=settings.seed, eos_ids=chat_encoder.stop_token_ids,
            runner=build_runner(gpt, settings.precision, batch_invariant=settings.deterministic),
        )  # fmt: skip
        with torch.inference_mode():
            engine.cache.reserve(slots, gpt.config.context_length, gpt.unembedding)
        self.kv_cache_bytes = 2 * engine.cache.keys.nbytes
        self.task_spec = task_spec = load_task_spec(self.model_dir)
        if task_spec is not None and task_spec.kind in HEAD_KINDS:
            self.predictor = Predictor(gpt, tokenizer, task_spec)
        self.model, self.chat_encoder, self.token_text = model, chat_encoder, TokenText(tokenizer)
        if tokenizer.kind != "foreign":
            self.max_token_bytes = max(len(self.token_text.token_bytes(id)) for id in range(tokenizer.vocab_size)) or 1
        _ = tokenizer.mid_text  # made here, and not by the first who asks
        self.is_loaded = True
        return engine

    def _fit_slots(self, gpt: GPT) -> int:
        """As many as were asked for, or as have room in half of the memory that is free."""
        config, weight = gpt.config, gpt.unembedding
        bytes_per_slot = (
            2 * config.n_layers * config.n_kv_heads * config.context_length * config.head_dim * weight.element_size()
        )
        free_bytes = free_memory(weight.device)
        if free_bytes is None:
            return self.config.max_batch
        slots = min(self.config.max_batch, free_bytes // 2 // bytes_per_slot)
        if slots < 1:
            raise NextwordError(
                f"one text of {config.context_length:,} tokens needs {bytes_per_slot:,} bytes for its keys and values, and half of the "
                f"memory that is free is {free_bytes // 2:,}: make room, or take a smaller model"
            )
        if slots < self.config.max_batch:
            self.console.warn(
                f"{slots} texts at once and not {self.config.max_batch}: each needs {bytes_per_slot:,} bytes for its keys and "
                f"values, and they get half of the {free_bytes:,} bytes that are free"
            )
        return slots

    # ---------------------------------------------------------------- for the routes

    @property
    def context_length(self) -> int:
        return self.model.gpt.config.context_length

    def ensure_ready(self) -> None:
        """Raises `Refusal` while the model is not there, or no longer."""
        if not self.is_loaded:
            self.worker.admit(0)

    def check_model(self, model: str | None) -> None:
        """Raises `Refusal` where a client means another model, or the one that there is cannot be asked now."""
        self.ensure_ready()
        if model and model not in self.accepted_names:
            message = f"there is no model {model[:200]!r} here, only {self.name!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    def model_info(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        task_spec = self.task_spec
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "nextword",
            "max_model_len": self.context_length,
            "nextword": {
                "chat": self.chat_encoder.name == "nextword" or self.chat_encoder.template is not None, "chat_template": self.chat_encoder.name,
                "task": None if task_spec is None else task_spec.task, "labels": [] if task_spec is None else list(task_spec.labels),
                "context_length": self.context_length, "precision": self.config.precision,
                "parameters": self.model.gpt.config.parameters,
            },
        }  # fmt: skip

    async def encode_text(self, text: str) -> list[int]:
        """The ids of a text alone, nothing put before it."""
        encode = self.model.tokenizer.encode
        if len(text) <= MAX_INLINE_ENCODE_CHARS:
            return encode(text)
        return await asyncio.get_running_loop().run_in_executor(self.tokenizer_executor, encode, text)

    async def encode_prompt(
        self, prompt: str | list[int], param: str = "prompt", truncate_to: int | None = None
    ) -> list[int]:
        """The ids that a prompt stands for, which fit into the context.

        Args:
            keep: of a longer one, so many of its end; -1 for as many as fit. None refuses it.

        Raises:
            Refusal: they do not fit, or one is not in the vocabulary.
        """
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            # Where tokens lose nothing, a text has at least so many; a long one need not be encoded to be refused.
            if truncate_to is None and tokenizer.kind != "foreign":
                self.check_context(range(len(prompt) // self.max_token_bytes), param)
            await asyncio.sleep(0)  # others have their turn between the texts of a long list
            ids = await self.encode_text(prompt)
            ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
        elif (largest := max(prompt, default=0)) >= tokenizer.vocab_size:
            raise APIError(400, f"{param}: {largest} is no token id; there are {tokenizer.vocab_size}", param=param)
        else:
            ids = prompt
        if truncate_to is not None:
            max_ids = self.context_length if truncate_to < 0 else min(truncate_to, self.context_length)
            ids = ids[max(0, len(ids) - max_ids) :]
        return self.check_context(ids or [tokenizer.eos_id], param)

    def check_context(self, ids: Any, param: str) -> Any:
        """The ids themselves. Raises `Refusal` where they are more than the context holds."""
        if len(ids) > self.context_length:
            raise APIError(
                400,
                f"this model's maximum context length is {self.context_length} tokens, and {param} has "
                f"{'at least ' if isinstance(ids, range) else ''}{len(ids)}: make it shorter",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return ids

    async def compile_constraints(self, schema: dict[str, Any] | None, count: int) -> list[JSONConstraint | None]:
        """What so many texts are held to.

        Raises:
            Refusal: the schema cannot be held to, is too large, or takes too long.
        """
        if schema is None:
            return [None] * count
        param = "response_format"

        def compile_schema() -> JSONConstraint:
            if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
                raise UsageError(f"the schema has more than {MAX_SCHEMA_CHARS:,} characters")
            self.constraint_compiler = self.constraint_compiler or ConstraintCompiler(
                self.model.tokenizer, self.chat_encoder.stop_token_ids
            )
            return self.constraint_compiler.compile_json_schema(schema)

        try:
            compilation = asyncio.get_running_loop().run_in_executor(self.schema_executor, compile_schema)
            constraint = await asyncio.wait_for(compilation, SCHEMA_TIMEOUT)
        except TimeoutError as error:
            raise APIError(400, f"{param}: the schema took more than {SCHEMA_TIMEOUT:.0f} s", param=param) from error
        except RecursionError as error:
            raise APIError(400, f"{param}: the schema is nested too deeply", param=param) from error
        except (UsageError, MissingDependencyError) as error:
            raise APIError(400, f"{param}: {error}", param=param) from error
        return [constraint, *(constraint.copy() for _ in range(count - 1))]

    async def embed(self, ids: list[int]) -> list[float]:
        return await self.worker.run_in_engine_thread(partial(mean_pooled_embedding, self.model.gpt, ids))

    async def classify(self, texts: list[str], index: int) -> dict[str, Any]:
        """A fine-tuned model's answer to one example.

        Raises:
            Refusal: the model has no such task, the texts are not what it takes, or they do not fit.
        """
        predictor = self.predictor
        if predictor is None:
            raise APIError(
                400, "this model was not fine-tuned to classify: see nextword finetune --help", param="model"
            )
        try:
            example = example_from_texts(predictor.task_spec.task, texts)
        except UsageError as error:
            raise APIError(400, f"input[{index}]: {error}", param="input") from error

        def predict() -> dict[str, Any]:
            issues = IssueLog()
            answer = predictor.predict([example], issues)[0]
            if issues.issues:
                message = f"input[{index}]: {issues.issues[0].what}"
                raise APIError(400, message, param="input", code="context_length_exceeded")
            return answer

        return await self.worker.run_in_engine_thread(predict)

    async def close(self) -> None:
        if self.is_loaded:
            await self.chat_encoder.close()
        self.tokenizer_executor.shutdown(wait=False, cancel_futures=True)
        self.schema_executor.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def mean_pooled_embedding(gpt: GPT, ids: list[int]) -> list[float]:
    """The mean of a text's final hidden states, scaled to length 1 (D numbers)."""
    hidden = gpt(torch.tensor([ids], device=gpt.unembedding.device))[0]  # [T, D]
    return F.normalize(hidden.float().mean(0), dim=0).tolist()


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program can still have, on a device or in this machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    meminfo_fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(meminfo_fields["MemAvailable"].split()[0]) * 1024
    # A container may have less than its machine.
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (limit_bytes := limit.read_text().strip()).isdecimal():
        free = min(free, int(limit_bytes) - int(used.read_text()))
    return max(0, free)
