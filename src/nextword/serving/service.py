"""The served model: loading, validation of requests against it, embeddings and classification."""

import asyncio
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from prometheus_client import Gauge
from torch.nn import functional as F

from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.common.format import format_bytes
from nextword.data.issues import IssueLog
from nextword.inference.constrained import PARSER_LIMITS, ConstraintCompiler, JSONConstraint, error_summary
from nextword.inference.engine import Engine
from nextword.inference.model_runner import build_runner
from nextword.inference.sampling_options import GENERATION_CONFIG_KEYS
from nextword.model.gpt import GPT
from nextword.pipeline.language_model import LanguageModel, load, load_task_spec, resolve_model_dir
from nextword.pipeline.predictor import Predictor
from nextword.serving.chat_templates import ChatEncoder, Conversation, make_chat_encoder
from nextword.serving.config import ServerConfig
from nextword.serving.engine_worker import EngineWorker, Metrics
from nextword.serving.limited_process import LimitedProcess
from nextword.serving.protocol import ANY_OBJECT, APIError, invalid_field
from nextword.tasks.dataset import HEAD_KINDS, TaskSpec
from nextword.tasks.examples import example_from_texts

MAX_CACHED_SCHEMAS = 16


class Service:
    """The served model. The attributes that depend on the model are set once `is_loaded` is true."""

    model: LanguageModel
    chat_encoder: ChatEncoder
    token_bytes: Callable[[int], bytes]  # of a token id; empty for special tokens
    max_token_bytes: int

    def __init__(self, config: ServerConfig, console: Console):
        self.config, self.console = config, console
        self.model_dir = resolve_model_dir(config.model)
        directory = self.model_dir.resolve()
        is_run = (directory.parent / "run.json").is_file()
        self.name = config.name or (directory.parent if is_run else directory).name
        # Clients with a fixed model name may use the path or "nextword" instead of the name.
        self.accepted_names = {self.name, str(config.model), "nextword"}
        self.metrics = Metrics()
        self.worker = worker = EngineWorker(self.load_engine, config.queue, self.metrics)
        self.schema_process = LimitedProcess()
        self.constraint_compiler: ConstraintCompiler | None = None
        self.constraints: dict[str, JSONConstraint] = {}  # by grammar; the least recently used first
        self.created = int(self.model_dir.stat().st_mtime)
        self.is_loaded = False
        self.task_spec: TaskSpec | None = None
        self.predictor: Predictor | None = None
        self.kv_cache_bytes = 0
        for name, documentation, read in (
            ("texts_running", "Running sequences.", lambda: worker.num_running),
            ("texts_waiting", "Queued sequences.", lambda: worker.num_waiting),
            ("texts_held", "Admitted sequences that are not finished.", lambda: worker.num_active),
            ("requests_open", "Admitted requests that are not finished.", lambda: len(worker.handles)),
            ("events_unread", "Events that clients have not read yet.", lambda: worker.num_unread_events),
            ("slots", "Maximum number of running sequences.", lambda: worker.num_slots),
            ("key_value_bytes", "Memory reserved for the KV cache, in bytes.", lambda: self.kv_cache_bytes),
        ):
            Gauge(f"nextword_{name}", documentation, registry=self.metrics.registry).set_function(read)

    # ---------------------------------------------------------------- engine thread

    def load_engine(self) -> Engine:
        """Load the model and allocate the KV cache.

        Raises:
            NextwordError: The model cannot be opened, or the KV cache of one sequence does not fit into memory.
        """
        settings = self.config
        model = load(settings.model, settings.device, settings.precision)
        tokenizer, gpt = model.tokenizer, model.gpt
        chat_encoder = make_chat_encoder(self.model_dir, tokenizer)
        slots = self._fit_slots(gpt)
        runner = build_runner(gpt, settings.precision, batch_invariant=settings.deterministic)
        stop_token_ids = chat_encoder.stop_token_ids
        engine = Engine(gpt, tokenizer, max_batch=slots, seed=settings.seed, eos_ids=stop_token_ids, runner=runner)
        with torch.inference_mode():
            engine.cache.reserve(slots, gpt.config.context_length, gpt.unembedding)
        self.kv_cache_bytes = 2 * engine.cache.keys.nbytes
        self.task_spec = load_task_spec(self.model_dir)
        if self.task_spec is not None and self.task_spec.kind in HEAD_KINDS:
            self.predictor = Predictor(gpt, tokenizer, self.task_spec)
        self.model, self.chat_encoder = model, chat_encoder
        self.token_bytes = lru_cache(2**16)(tokenizer.token_bytes)
        self.special_token_names = {id: name for name, id in tokenizer.special_tokens.items()}
        if tokenizer.kind != "foreign":
            self.max_token_bytes = max(len(self.token_bytes(id)) for id in range(tokenizer.vocab_size)) or 1
        _ = tokenizer.mid_text  # built here rather than by the first request
        self.is_loaded = True
        return engine

    def _fit_slots(self, gpt: GPT) -> int:
        """Number of slots: `max_batch`, or fewer if their KV cache would take more than half of the free memory."""
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
                f"the KV cache of one sequence of {config.context_length:,} tokens needs {format_bytes(bytes_per_slot)}, but "
                f"half of the free memory is {format_bytes(free_bytes // 2)}: free some memory, or use a smaller model"
            )
        if slots < self.config.max_batch:
            self.console.warn(
                f"running {slots} sequences at once instead of {self.config.max_batch}: the KV cache takes "
                f"{format_bytes(bytes_per_slot)} per sequence, at most half of the {format_bytes(free_bytes)} of free memory"
            )
        return slots

    # ---------------------------------------------------------------- routes

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.model.gpt.config.context_length

    def check_model(self, model: str | None = None) -> None:
        """Raises `APIError`: 503 unless the model is loaded, 404 for an unknown model name."""
        if not self.is_loaded:
            self.worker.admit(0)
        if model and model not in self.accepted_names:
            message = f"model {model[:200]!r} does not exist: this server has {self.name!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    def decode_token(self, token_id: int) -> str:
        """Text of one token. Incomplete UTF-8 is shown as bytes, which keeps the tokens distinct."""
        data = self.token_bytes(token_id)
        try:
            return data.decode() if data else self.special_token_names.get(token_id, "")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def model_info(self) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        task_spec = self.task_spec
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nextword",
            "max_model_len": self.context_length,
            "nextword": {
                "chat": self.chat_encoder.name == "nextword" or self.chat_encoder.template is not None,
                "chat_template": self.chat_encoder.name,
                "task": None if task_spec is None else task_spec.task,
                "labels": [] if task_spec is None else list(task_spec.labels),
                "context_length": self.context_length,
                "precision": self.config.precision,
                "parameters": self.model.gpt.config.parameters,
                "sampling": {
                    name: getattr(self.model.sampling_defaults, name) for name in GENERATION_CONFIG_KEYS.values()
                },
            },
        }

    async def encode_text(self, text: str) -> list[int]:
        """Tokenize a text without special tokens."""
        return await asyncio.to_thread(self.model.tokenizer.encode, text)

    async def encode_prompt(
        self, prompt: str | list[int], param: str = "prompt", truncate_to: int | None = None
    ) -> list[int]:
        """Token ids of a prompt, at most `context_length` of them.

        Args:
            prompt: Text or token ids.
            param: Name of the request field, for error messages.
            truncate_to: Keep this many of the last tokens; -1 keeps as many as fit. None rejects a longer prompt.

        Raises:
            APIError: The prompt is too long, or contains an id outside the vocabulary.
        """
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            # A lower bound on the number of tokens: most prompts that are too long are rejected without tokenizing them.
            if truncate_to is None and tokenizer.kind != "foreign":
                self.check_context(len(prompt) // self.max_token_bytes, param, "at least ")
            ids = [*tokenizer.bos_ids, *await self.encode_text(prompt)]
        else:
            ids = self.check_token_ids(prompt, param)
        if truncate_to is not None:
            max_ids = self.context_length if truncate_to < 0 else min(truncate_to, self.context_length)
            ids = ids[max(0, len(ids) - max_ids) :]
        self.check_context(len(ids), param)
        return ids or [tokenizer.eos_id]

    def check_conversation(self, conversation: Conversation) -> None:
        """Raises `APIError` for most conversations that are too long, without tokenizing them."""
        if self.chat_encoder.name != "model" and self.model.tokenizer.kind != "foreign":
            num_chars = sum(len(message["content"]) for message in conversation)
            self.check_context(num_chars // self.max_token_bytes, "messages", "at least ")

    def check_token_ids(self, ids: list[int], param: str) -> list[int]:
        """Return `ids`. Raises `APIError` for an id outside the vocabulary."""
        vocab_size = self.model.tokenizer.vocab_size
        if (largest := max(ids, default=0)) >= vocab_size:
            raise invalid_field(param, f"{largest} is not a token id; the vocabulary has {vocab_size} tokens")
        return ids

    def check_context(self, num_tokens: int, param: str, bound: str = "") -> None:
        """Raises `APIError` if there are more tokens than the context length."""
        if num_tokens > self.context_length:
            message = (
                f"this model's maximum context length is {self.context_length} tokens, and {param} has {bound}{num_tokens} "
                "tokens: shorten it"
            )
            raise APIError(400, message, param=param, code="context_length_exceeded")

    async def compile_constraints(self, schema: dict[str, Any] | None, count: int) -> list[JSONConstraint | None]:
        """Compile a JSON schema into `count` decoding constraints.

        Raises:
            APIError: The schema is not supported, or takes too much memory or time to compile.
        """
        if schema is None:
            return [None] * count

        def make_grammar() -> str:
            self.constraint_compiler = self.constraint_compiler or ConstraintCompiler(
                self.model.tokenizer, self.chat_encoder.stop_token_ids
            )
            return self.constraint_compiler.build_grammar(schema)

        try:
            grammar = await asyncio.to_thread(make_grammar)
            constraint = self.constraints.pop(grammar, None)
            if constraint is None:
                assert self.constraint_compiler is not None
                if schema != ANY_OBJECT:  # which is never refused because others' schemas are slow
                    answer = await self.schema_process.call(grammar=grammar, limits=PARSER_LIMITS)
                    if answer is None:
                        raise UsageError("compiling the schema takes too much time or memory: use simpler patterns")
                    if "error" in answer:
                        raise UsageError(f"unsupported JSON schema: {error_summary(answer['error'])}")
                constraint = await asyncio.to_thread(self.constraint_compiler.compile, grammar)
            self.constraints[grammar] = constraint
            while len(self.constraints) > MAX_CACHED_SCHEMAS:
                del self.constraints[next(iter(self.constraints))]
        except (UsageError, MissingDependencyError) as error:
            raise invalid_field("response_format", str(error)) from error
        return [constraint.copy() for _ in range(count)]

    async def embed(self, ids: list[int]) -> list[float]:
        """L2-normalized mean of the final hidden states [D] of token ids [T]."""
        gpt = self.model.gpt

        @torch.inference_mode()
        def mean_pooled_embedding() -> list[float]:
            hidden = gpt(torch.tensor([ids], device=gpt.unembedding.device))[0]  # [T, D]
            return F.normalize(hidden.float().mean(0), dim=0).cpu().numpy().tolist()

        return await self.worker.run_in_engine_thread(mean_pooled_embedding)

    async def classify(self, texts: list[str], index: int) -> dict[str, Any]:
        """Prediction of a fine-tuned model for one example.

        Args:
            texts: Texts of the example in the order of the task's input columns.
            index: Position in the request, for error messages.

        Raises:
            APIError: The model has no classification head, the number of texts is wrong, or they are too long.
        """
        predictor, issues = self.predictor, IssueLog()
        if predictor is None:
            raise APIError(400, "this model has no classification head: see nextword finetune --help", param="model")
        try:
            example = example_from_texts(predictor.task_spec.task, texts)
        except UsageError as error:
            raise APIError(400, f"input[{index}]: {error}", param="input") from error

        def predict() -> tuple[dict[str, Any], bool]:
            counts = predictor.encoder.cut_counts
            num_cut = counts.total()
            [answer] = predictor.predict([example], issues)
            return answer, counts.total() > num_cut

        answer, is_cut = await self.worker.run_in_engine_thread(predict)
        if is_cut:  # reported last
            message = f"input[{index}]: {issues.issues[-1].what}"
            raise APIError(400, message, param="input", code="context_length_exceeded")
        return answer

    async def close(self) -> None:
        """End the helper processes."""
        await self.schema_process.close()
        if self.is_loaded:
            await self.chat_encoder.close()


def free_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes, or None if the operating system does not report it."""
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
