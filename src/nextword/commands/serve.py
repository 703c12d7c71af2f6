"""``nextword serve``: a model over HTTP."""

from typing import Any

from nextword.commands.command import Context, command
from nextword.common.console import to_json_line, write_result
from nextword.common.errors import MissingDependencyError
from nextword.common.options import options
from nextword.serving.config import ServerConfig


@options
class ServeConfig(ServerConfig):
    """Serve a model with an OpenAI-compatible API and a web page.

    The first Ctrl-C or SIGTERM finishes the running requests and stops the server, the second stops it at once.
    """


@command(ServeConfig, example="nextword serve runs/mine --port 8000")
def serve(config: ServeConfig, context: Context) -> None:
    """Serve until a signal. With ``--json``, print the address once requests are accepted."""
    try:
        from nextword.serving.app import serve_model
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nextword"):
            raise
        raise MissingDependencyError("nextword serve", "serve") from error
    serve_model(config, context.console, print_address if context.output == "json" else config.ready)


def print_address(address: dict[str, Any]) -> None:
    """Print where requests are accepted."""
    write_result(to_json_line(address))
