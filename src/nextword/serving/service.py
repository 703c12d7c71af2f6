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
from nextword.common.errors import MissingExtra, NextwordError, UsageError
from nextword.data.documents import Problems
from nextword.inference.constrained import Grammars, Held
from nextword.inference.engine import Engine
from nextword.inference.model_runner import reader_of
from nextword.inference.quantization import Precision
from nextword.model.gpt import GPT
from nextword.pipeline.base_model import form_of, model_path
from nextword.pipeline.language_model import Model, load
from nextword.pipeline.predictor import Predictor
from nextword.serving.chat_templates import Chat, chat_of
from nextword.serving.engine_worker import Worker
from nextword.serving.metrics import Metrics
from nextword.serving.protocol import MAX_SCHEMA, Refusal
from nextword.serving.responses import Words
from nextword.tasks.dataset import HEADS, Form
from nextword.tasks.task_data import example_of

LONG = 4096  # characters that are encoded in a thread, since the event loop would be held up
SCHEMA_SECONDS = 5.0  # for making a grammar


@dataclass(frozen=True)
class Settings:
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

    def __init__(self, settings: Settings, console: Console):
        self.settings, self.console = settings, console
        self.directory = model_path(settings.model)
        folder = self.directory.resolve()
        self.name = settings.name or (folder.parent if (folder.parent / "run.json").is_file() else folder).name
        # Clients that have one model in mind need not know what this one is called.
        self.names = {self.name, str(settings.model), "nextword"}
        self.metrics = Metrics()
        self.worker = Worker(self.open, settings.queue, self.metrics)
        self.threads = ThreadPoolExecutor(1, "encode")
        self.schemas = ThreadPoolExecutor(1, "schemas")
        self.grammars: Grammars | None = None
        self.created = int(self.directory.stat().st_mtime)
        self.opened = False
        self.model: Model
        self.chat: Chat
        self.words: Words
        self.form: Form | None = None
        self.predictor: Predictor | None = None
        self.cache_bytes = 0
        self.longest_token = 1  # bytes
        for name, help, read in (
            ("nextword_texts_running", "Texts that have a slot.", lambda: self.worker.running),
            ("nextword_texts_waiting", "Texts in the queue.", lambda: self.worker.waiting),
            ("nextword_texts_held", "Texts that were let in and are not finished.", lambda: self.worker.held),
            (
                "nextword_requests_open",
                "Requests that were let in and have not left.",
                lambda: len(self.worker.tickets),
            ),
            ("nextword_events_unread", "Parts of answers that clients have yet to read.", lambda: self.worker.unread),
            ("nextword_slots", "Texts that can run at once.", lambda: self.worker.slots),
            ("nextword_key_value_bytes", "Memory that is kept for keys and values.", lambda: self.cache_bytes),
        ):
            self.metrics.gauge(name, help, read)

    # ---------------------------------------------------------------- in the engine's thread

    def open(self) -> Engine:
        """Load the model and reserve its memory.

        Raises:
            NextwordError: it cannot be opened, or there is no memory for one text.
        """
        settings = self.settings
        model = load(settings.model, settings.device, settings.precision)
        tokenizer, gpt = model.tokenizer, model.gpt
        chat = chat_of(self.directory, tokenizer)
        slots = self._slots(gpt)
        engine = Engine(
            gpt, tokenizer, max_batch=slots, seed=settings.seed, ends=chat.ends,
            reader=reader_of(gpt, settings.precision, apart=settings.deterministic),
        )  # fmt: skip
        with torch.inference_mode():
            engine.cache.reserve(slots, gpt.config.context_length, gpt.unembedding)
        self.cache_bytes = 2 * engine.cache.keys.nbytes
        self.form = form = form_of(self.directory)
        if form is not None and form.kind in HEADS:
            self.predictor = Predictor(gpt, tokenizer, form)
        self.model, self.chat, self.words = model, chat, Words(tokenizer)
        if tokenizer.kind != "foreign":
            self.longest_token = max(len(self.words.bytes(id)) for id in range(tokenizer.vocab_size)) or 1
        _ = tokenizer.after_marker  # made here, and not by the first who asks
        self.opened = True
        return engine

    def _slots(self, gpt: GPT) -> int:
        """As many as were asked for, or as have room in half of the memory that is free."""
        config, weight = gpt.config, gpt.unembedding
        one = 2 * config.n_layers * config.n_kv_heads * config.context_length * config.head_dim * weight.element_size()
        free = free_memory(weight.device)
        if free is None:
            return self.settings.max_batch
        slots = min(self.settings.max_batch, free // 2 // one)
        if slots < 1:
            raise NextwordError(
                f"one text of {config.context_length:,} tokens needs {one:,} bytes for its keys and values, and half of the "
                f"memory that is free is {free // 2:,}: make room, or take a smaller model"
            )
        if slots < self.settings.max_batch:
            self.console.warn(
                f"{slots} texts at once and not {self.settings.max_batch}: each needs {one:,} bytes for its keys and "
                f"values, and they get half of the {free:,} bytes that are free"
            )
        return slots

    # ---------------------------------------------------------------- for the routes

    @property
    def context_length(self) -> int:
        return self.model.gpt.config.context_length

    def ready(self) -> None:
        """Raises `Refusal` while the model is not there, or no longer."""
        if not self.opened:
            self.worker.enter(0)

    def named(self, model: str | None) -> None:
        """Raises `Refusal` where a client means another model, or the one that there is cannot be asked now."""
        self.ready()
        if model and model not in self.names:
            message = f"there is no model {model[:200]!r} here, only {self.name!r}"
            raise Refusal(404, message, param="model", code="model_not_found")

    def facts(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        form = self.form
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "nextword",
            "max_model_len": self.context_length,
            "nextword": {
                "chat": self.chat.name == "nextword" or self.chat.template is not None, "chat_template": self.chat.name,
                "task": None if form is None else form.task, "labels": [] if form is None else list(form.labels),
                "context_length": self.context_length, "precision": self.settings.precision,
                "parameters": self.model.gpt.config.parameters,
            },
        }  # fmt: skip

    async def text_ids(self, text: str) -> list[int]:
        """The ids of a text alone, nothing put before it."""
        encode = self.model.tokenizer.encode
        if len(text) <= LONG:
            return encode(text)
        return await asyncio.get_running_loop().run_in_executor(self.threads, encode, text)

    async def prompt_ids(self, prompt: str | list[int], param: str = "prompt", keep: int | None = None) -> list[int]:
        """The ids that a prompt stands for, which fit into the context.

        Args:
            keep: of a longer one, so many of its end; -1 for as many as fit. None refuses it.

        Raises:
            Refusal: they do not fit, or one is not in the vocabulary.
        """
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            # Where tokens lose nothing, a text has at least so many; a long one need not be encoded to be refused.
            if keep is None and tokenizer.kind != "foreign":
                self.fitting(range(len(prompt) // self.longest_token), param)
            await asyncio.sleep(0)  # others have their turn between the texts of a long list
            ids = await self.text_ids(prompt)
            ids = ids if tokenizer.begin_of_text is None else [tokenizer.begin_of_text, *ids]
        elif (largest := max(prompt, default=0)) >= tokenizer.vocab_size:
            raise Refusal(400, f"{param}: {largest} is no token id; there are {tokenizer.vocab_size}", param=param)
        else:
            ids = prompt
        if keep is not None:
            most = self.context_length if keep < 0 else min(keep, self.context_length)
            ids = ids[max(0, len(ids) - most) :]
        return self.fitting(ids or [tokenizer.end_of_text], param)

    def fitting(self, ids: Any, param: str) -> Any:
        """The ids themselves. Raises `Refusal` where they are more than the context holds."""
        if len(ids) > self.context_length:
            raise Refusal(
                400,
                f"this model's maximum context length is {self.context_length} tokens, and {param} has "
                f"{'at least ' if isinstance(ids, range) else ''}{len(ids)}: make it shorter",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return ids

    async def constraints(self, schema: dict[str, Any] | None, count: int) -> list[Held | None]:
        """What so many texts are held to.

        Raises:
            Refusal: the schema cannot be held to, is too large, or takes too long.
        """
        if schema is None:
            return [None] * count
        param = "response_format"

        def make() -> Held:
            if len(json.dumps(schema)) > MAX_SCHEMA:
                raise UsageError(f"the schema has more than {MAX_SCHEMA:,} characters")
            self.grammars = self.grammars or Grammars(self.model.tokenizer, self.chat.ends)
            return self.grammars.json(schema)

        try:
            work = asyncio.get_running_loop().run_in_executor(self.schemas, make)
            first = await asyncio.wait_for(work, SCHEMA_SECONDS)
        except TimeoutError as error:
            raise Refusal(400, f"{param}: the schema took more than {SCHEMA_SECONDS:.0f} s", param=param) from error
        except RecursionError as error:
            raise Refusal(400, f"{param}: the schema is nested too deeply", param=param) from error
        except (UsageError, MissingExtra) as error:
            raise Refusal(400, f"{param}: {error}", param=param) from error
        return [first, *(first.copy() for _ in range(count - 1))]

    async def embed(self, ids: list[int]) -> list[float]:
        return await self.worker.call(partial(embedding, self.model.gpt, ids))

    async def classify(self, texts: list[str], number: int) -> dict[str, Any]:
        """A fine-tuned model's answer to one example.

        Raises:
            Refusal: the model has no such task, the texts are not what it takes, or they do not fit.
        """
        predictor = self.predictor
        if predictor is None:
            raise Refusal(400, "this model was not fine-tuned to classify: see nextword finetune --help", param="model")
        try:
            example = example_of(predictor.form.task, texts)
        except UsageError as error:
            raise Refusal(400, f"input[{number}]: {error}", param="input") from error

        def predict() -> dict[str, Any]:
            problems = Problems()
            answer = predictor.predict([example], problems)[0]
            if problems.found:
                message = f"input[{number}]: {problems.found[0].what}"
                raise Refusal(400, message, param="input", code="context_length_exceeded")
            return answer

        return await self.worker.call(predict)

    async def close(self) -> None:
        if self.opened:
            await self.chat.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.schemas.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def embedding(gpt: GPT, ids: list[int]) -> list[float]:
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
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    # A container may have less than its machine.
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)
