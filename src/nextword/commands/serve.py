"""The verb that serves a model."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nextword.commands.options import CommonOptions, Flag, PrecisionOption


def serve(
    model: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[str | None, Parameter(env_var="NEXTWORD_API_KEY")] = None,
    insecure: Flag = False,
    allowed_host: Annotated[list[str] | None, Parameter(negative="")] = None,
    model_name: str | None = None,
    precision: PrecisionOption = "float32",
    max_batch: int = 8,
    queue: int = 64,
    deterministic: Flag = False,
    grace: float = 30.0,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page to try it. Ctrl-C or SIGTERM ends it when the texts that are being
    written are finished; a second one at once.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    host
        The address to listen at. One that other machines can reach needs an --api-key.
    port
        0 takes a free one.
    api_key
        What clients have to send as Authorization: Bearer KEY. In the environment it is not seen in the list of processes.
    insecure
        Let everybody in who can connect.
    allowed_host
        A name that clients may call this server by, beside localhost and its address. May be given more than once.
    model_name
        What clients call the model. [default: the folder's name]
    max_batch
        How many texts are written at once; memory for all of them is kept from the beginning.
    queue
        How many more texts may wait; beyond that, clients are told to try again later.
    deterministic
        No text depends in its last bits on which others are written beside it. Costs speed where no compiler is found.
    grace
        Seconds that texts are given to be finished before the server ends.
    """
    from nextword.commands import api

    def on_ready(facts: dict[str, Any]) -> None:
        if common.json:
            print(json_module.dumps(facts, ensure_ascii=False), flush=True)

    api.serve(
        model, host=host, port=port, api_key=api_key, insecure=insecure, allowed_hosts=allowed_host or (), grace=grace,
        name=model_name, precision=precision, max_batch=max_batch, queue=queue, deterministic=deterministic,
        seed=common.seed, device=common.device, console=common.console(), ready=on_ready,
    )  # fmt: skip
