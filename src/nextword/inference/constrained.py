"""Constrained decoding: text that matches a JSON schema.

llguidance computes which tokens may follow. The cost of a token is bounded, and ends the request with an error when it is
exceeded. Compiling a schema is not: whether regular expressions can match together is decided in time and memory without a
limit. The server therefore compiles an unknown schema in a process with limits first.
"""

import json
from typing import Any

import torch
from torch import Tensor

from nextword.common.errors import UsageError, import_optional
from nextword.data.tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 2**16
MAX_PATTERNS = 64  # in one schema
WHITESPACE_PATTERN = " ?"  # unlimited whitespace would let a small model generate nothing else
# llguidance measures work in "fuel": 50,000 a millisecond for the initial lexer, 14,000 a millisecond for a token.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "max_items_in_row": 2000,
    "verbose_errors": False,
}


class JSONConstraint:
    """The state of one sequence that matches a schema; a `Constraint` of the engine. Made by `ConstraintCompiler`."""

    def __init__(self, matcher: Any, unk_id: int | None):
        self.matcher, self.unk_id = matcher, unk_id

    def allowed_mask(self) -> Tensor:
        """Which tokens may follow, boolean [V].

        Raises:
            UsageError: The schema is too complex here, or no token of the vocabulary may follow.
        """
        mask = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self.matcher.is_error():
            raise UsageError(f"constrained decoding failed: {error_summary(self.matcher.get_error())}")
        if self.unk_id is not None:  # stands for no character
            mask[self.unk_id] = False
        if not mask.any():
            raise UsageError("constrained decoding failed: no token of the vocabulary matches the schema here")
        return mask

    def accept_token(self, token: int) -> None:
        """Advance by a token. An error is raised by the next `allowed_mask`."""
        self.matcher.consume_token(token)

    def copy(self) -> "JSONConstraint":
        """A copy for another sequence, in the same state."""
        return JSONConstraint(self.matcher.deep_copy(), self.unk_id)


class ConstraintCompiler:
    """Compiles JSON schemas for a tokenizer.

    Args:
        tokenizer: The tokenizer.
        eos_ids: Token ids that end a text; they are allowed only where the text matches the schema.

    Raises:
        MissingDependencyError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]):
        self.library = llguidance = import_optional("llguidance", "constrained decoding with a JSON schema", "json")
        self.unk_id = tokenizer.unk_id
        wrapper = llguidance.TokenizerWrapper(_LLGuidanceTokenizer(tokenizer, min(eos_ids)))
        slices = llguidance.LLTokenizer.json_slices()
        self.tokenizer: Any = llguidance.LLTokenizer(
            wrapper, n_vocab=tokenizer.vocab_size, eos_token=sorted(eos_ids), slices=slices
        )
        self.limits = llguidance.LLParserLimits(**PARSER_LIMITS)

    def build_grammar(self, schema: dict[str, Any]) -> str:
        """The uncompiled grammar of a schema for llguidance. This is cheap for any schema.

        Raises:
            UsageError: The schema is too large, or not JSON.
        """
        try:
            text = json.dumps(schema)
            if len(text) > MAX_SCHEMA_CHARS:
                raise UsageError(f"the schema has more than {MAX_SCHEMA_CHARS:,} characters")
            if text.count('"pattern') > MAX_PATTERNS:
                raise UsageError(f"the schema has more than {MAX_PATTERNS} patterns")
            return self.library.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": WHITESPACE_PATTERN}
            )
        except (ValueError, RecursionError) as error:
            raise UsageError(f"invalid JSON schema: {error}") from error

    def compile(self, grammar: str) -> JSONConstraint:
        """Compile the grammar of a schema.

        Returns:
            The constraint of a sequence that begins.

        Raises:
            UsageError: The schema is invalid, too complex, or uses an unsupported feature, or no token of the vocabulary
                begins a text that matches it.
        """
        matcher = self.library.LLMatcher(self.tokenizer, grammar, log_level=0, limits=self.limits)
        if matcher.is_error():
            raise UsageError(f"unsupported JSON schema: {error_summary(matcher.get_error())}")
        constraint = JSONConstraint(matcher, self.unk_id)
        constraint.allowed_mask()
        return constraint

    def compile_json_schema(self, schema: dict[str, Any]) -> JSONConstraint:
        """Compile a trusted schema, in time and memory without a limit. Errors as in the two parts of it."""
        return self.compile(self.build_grammar(schema))


class _LLGuidanceTokenizer:
    """A tokenizer in llguidance's interface: special tokens by name, all others by their bytes."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int):
        names = {id: name.encode() for name, id in tokenizer.special_tokens.items()}
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.special_token_ids = sorted(names)
        self.tokens = [names.get(id) or tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


def error_summary(message: str) -> str:
    """The first line of an error message."""
    return message.strip().partition("\n")[0][:300]
