"""Untrusted work in a separate process, run as a script: renders chat templates, and compiles grammars.

Jinja's sandbox blocks attribute access, but not excessive memory ('a' * 10**9) or time, and a grammar's regular expressions
can take any amount of both: operating system limits end this process instead. It reads one JSON request per line and writes one
JSON response per line, {"text": …} or {"error": …}. It imports nothing from nextword, and ends with its parent.
"""

import json
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_TIMEOUT = 2.0  # seconds of one request
MAX_MEMORY_BYTES = 256 * 2**20  # address space
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


def render_template(request: dict[str, Any]) -> dict[str, str]:
    """Render a template in a sandbox with the filters and globals that Hugging Face chat templates use.

    Args:
        request: `template` and the `values` of its variables.

    Returns:
        The `text`, or the `error`.
    """
    extensions = [GenerationExtension, loopcontrols]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = to_json  # pyright: ignore[reportUnknownMemberType]  # untyped in Jinja
    functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        text = env.from_string(request["template"], globals=functions).render(**request["values"])
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


def compile_grammar(request: dict[str, Any]) -> dict[str, str]:
    """Compile a grammar of llguidance, whose cost depends on the grammar rather than on the tokenizer.

    Args:
        request: `grammar`, and the `limits` of the parser.

    Returns:
        An empty `text`, or the `error`.
    """
    import llguidance

    wrapper, slices = llguidance.TokenizerWrapper(ByteTokenizer()), llguidance.LLTokenizer.json_slices()
    tokenizer = llguidance.LLTokenizer(wrapper, slices=slices)
    limits = llguidance.LLParserLimits(**request["limits"])
    matcher = llguidance.LLMatcher(tokenizer, request["grammar"], log_level=0, limits=limits)
    return {"error": matcher.get_error()} if matcher.is_error() else {"text": ""}


def set_timeout(seconds: float) -> None:
    """End this process after `seconds` of CPU time; 0 cancels the timer. On systems without interval timers only the parent's
    timeout applies."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer requests until the input ends."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        set_timeout(request.get("seconds", CPU_TIMEOUT))
        answer = json.dumps((compile_grammar if "grammar" in request else render_template)(request))
        set_timeout(0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
