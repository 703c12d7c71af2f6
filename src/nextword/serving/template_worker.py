"""Renders a chat template that came with somebody's model, where it can do no harm: run as a script, a process of its own.

The sandbox of Jinja keeps a template from Python's inner parts, but not from taking all memory ('a' * 10**9) or all time. So
does the system here: what is over the limits ends this process and nothing else. It reads a line of JSON for each conversation
and writes one for each, {"text": …} or {"error": …}. It imports nothing of ours and ends when its parent does.
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

RENDER_TIMEOUT = 2.0
MAX_MEMORY_BYTES = 256 * 2**20  # bytes of address space
MAX_OUTPUT_CHARS = 2**21  # characters of what is rendered


class GenerationExtension(Extension):
    """{% generation %} … {% endgeneration %}, which templates put around what is learned; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def create_environment() -> ImmutableSandboxedEnvironment:
    """As the templates of Hugging Face's models expect it."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationExtension, loopcontrols]
    )
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def set_resource_limits() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def set_timeout(seconds: float) -> None:
    """End this process after so many seconds, whatever it is at; 0 takes it back. Where the system has no such alarm, the
    parent's own patience is all there is."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def render_template(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = create_environment().from_string(request["template"]).render(**request["values"])
    except TemplateError as error:
        return {"error": f"the template says: {error}"}
    except Exception as error:  # a template can raise anything that Python can
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text} if len(text) <= MAX_OUTPUT_CHARS else {"error": f"more than {MAX_OUTPUT_CHARS:,} characters"}


def main() -> None:
    set_resource_limits()
    for line in sys.stdin:
        request = json.loads(line)
        set_timeout(request.get("seconds", RENDER_TIMEOUT))
        answer = json.dumps(render_template(request))
        set_timeout(0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
