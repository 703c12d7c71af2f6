"""Untrusted work of the server, which `common.limited_process` runs: renders chat templates, and compiles grammars.

Jinja's sandbox blocks attribute access, but not excessive memory ('a' * 10**9) or time, and a grammar's regular expressions
can take any amount of both. Nothing is imported from nextword.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 2**21


class GenerationExtension(Extension):
    """{% generation %} … {% endgeneration %} marks the trained parts in templates; rendering ignores the tags."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON with non-ASCII characters as they are, for the filter `tojson`."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def raise_exception(message: str) -> NoReturn:
    """Let a template reject a conversation."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The current time in the given format."""
    return datetime.now().strftime(form)


def render_template(template: str, values: dict[str, Any]) -> dict[str, str]:
    """Render a template in a sandbox with the filters and globals that Hugging Face chat templates use."""
    extensions = [GenerationExtension, loopcontrols]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = to_json  # pyright: ignore[reportUnknownMemberType]  # untyped in Jinja
    functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        text = env.from_string(template, globals=functions).render(**values)
    except TemplateError as error:
        return {"error": f"template error: {error}"}
    except Exception as error:  # a template can raise anything that Python can
        return {"error": f"{type(error).__name__}: {error}"}
    if len(text) > MAX_OUTPUT_CHARS:
        return {"error": f"the output has more than {MAX_OUTPUT_CHARS:,} characters"}
    return {"text": text}


class ByteTokenizer:
    """A tokenizer with a token for each byte, in llguidance's interface."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")

    def __call__(self, text: bytes) -> list[int]:
        """The bytes of a text."""
        return list(text)


def compile_grammar(grammar: str, limits: dict[str, Any]) -> dict[str, str]:
    """Compile a grammar of llguidance, whose cost depends on the grammar rather than on the tokenizer. The text is empty."""
    import llguidance

    wrapper, slices = llguidance.TokenizerWrapper(ByteTokenizer()), llguidance.LLTokenizer.json_slices()
    tokenizer = llguidance.LLTokenizer(wrapper, slices=slices)
    parser_limits = llguidance.LLParserLimits(**limits)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits)
    return {"error": matcher.get_error()} if matcher.is_error() else {"text": ""}


def answer(grammar: str | None = None, **arguments: Any) -> dict[str, str]:
    """The `text` or the `error` of `compile_grammar` with a grammar, else of `render_template`."""
    return render_template(**arguments) if grammar is None else compile_grammar(grammar, **arguments)
