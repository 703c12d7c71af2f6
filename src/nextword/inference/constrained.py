"""Text that is held to a JSON schema: at each token, which ones can still lead to a text that fits it.

llguidance does the work. What a schema may cost is bounded: its size and its regular expressions before anything is written,
and the work of each token after that, which ends the text with an error where it is exceeded.
"""

import json
from typing import Any

import torch
from torch import Tensor

from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.data.tokenizer import Tokenizer

# At most one space between the parts: where white space is free, a small model may go on with nothing else.
WHITESPACE_PATTERN = " ?"
# "Fuel" is llguidance's measure of work: 50,000 a millisecond before the text begins, 14,000 a millisecond at a token.
PARSER_LIMITS = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_lexer_states": 50_000,
    "max_grammar_size": 100_000, "max_items_in_row": 2000, "verbose_errors": False,
}  # fmt: skip


class JSONConstraint:
    """A text in progress that fits a schema; a `Constraint` of the engine."""

    def __init__(self, matcher: Any, unk_id: int | None):
        self.matcher, self.unk_id = matcher, unk_id

    def allowed_mask(self) -> Tensor:
        """Boolean [V].

        Raises:
            NextwordError: the schema is too complex at this place, or the vocabulary has no token that can go on.
        """
        mask = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self.matcher.is_error():
            raise NextwordError(f"the text cannot be held to the schema any longer: {_error_summary(self.matcher)}")
        if self.unk_id is not None:  # what a tokenizer makes of a character that it does not have stands for none
            mask[self.unk_id] = False
        if not mask.any():
            raise NextwordError("the text cannot be held to the schema: the vocabulary has no token that could follow")
        return mask

    def accept_token(self, token: int) -> None:
        self.matcher.consume_token(token)  # where it fails, `allowed` says so

    def copy(self) -> "JSONConstraint":
        """Another text, at the same place."""
        return JSONConstraint(self.matcher.deep_copy(), self.unk_id)


class ConstraintCompiler:
    """Schemas for the texts of one tokenizer.

    Args:
        ends: the ids that end a text; they may follow only where the text fits.

    Raises:
        MissingExtra: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]):
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError("text that is held to a JSON schema", "json") from error
        self.library: Any = llguidance
        self.unk_id = tokenizer.unk_id
        tokenizer_wrapper = llguidance.TokenizerWrapper(_LLGuidanceTokenizer(tokenizer, min(eos_ids)))
        self.tokenizer: Any = llguidance.LLTokenizer(
            tokenizer_wrapper,
            n_vocab=tokenizer.vocab_size,
            eos_token=sorted(eos_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self.limits = llguidance.LLParserLimits(**PARSER_LIMITS)

    def compile_json_schema(self, schema: dict[str, Any]) -> JSONConstraint:
        """A text that begins, and is to be JSON that fits a schema.

        Raises:
            UsageError: the schema is none, is too complex, or says what cannot be held to.
        """
        matcher_class = self.library.LLMatcher
        try:
            grammar = matcher_class.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE_PATTERN}
            )
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the schema cannot be read: {error}") from error
        matcher = matcher_class(self.tokenizer, grammar, log_level=0, limits=self.limits)
        if matcher.is_error():
            raise UsageError(f"no text can be held to this schema: {_error_summary(matcher)}")
        return JSONConstraint(matcher, self.unk_id)


class _LLGuidanceTokenizer:
    """A tokenizer as llguidance asks for it: special tokens by their names, all others by their bytes."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int):
        names = {id: name.encode() for name, id in tokenizer.special_tokens.items()}
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.special_token_ids = sorted(names)
        self.tokens = [names.get(id) or tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


def _error_summary(matcher: Any) -> str:
    """What is wrong, without the pages that may follow."""
    return matcher.get_error().strip().partition("\n")[0][:300]
