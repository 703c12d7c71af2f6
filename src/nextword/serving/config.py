"""The options of a server."""

from collections.abc import Callable
from typing import Any

from nextword.common.numbers import CountOrZero, NonNegative, Port, Seed, SmallCount
from nextword.common.options import DeviceOption, ModelArgument, PrecisionOption, as_strings, option, options


@options
class ServerConfig(ModelArgument, PrecisionOption, DeviceOption):
    """A served model, its limits, and who may use it.

    Attributes:
        host: Address to listen on. An address that other machines can reach requires --api-key.
        port: Port to listen on. 0 takes a free one.
        api_key: Key that clients send as "Authorization: Bearer KEY". The environment variable keeps it out of the process
            list. Default: none.
        insecure: Accept clients without a key from other machines.
        allowed_hosts: Host name that clients may use besides localhost and the address; * allows any. May be given more than
            once. Default: none.
        name: Name of the model in the API. Default: the name of the directory.
        max_batch: Maximum number of requests in a batch. The KV cache for all of them is allocated at the start.
        queue: Maximum number of waiting requests. Further requests are refused with status 429.
        deterministic: Make the result of a request independent of the others in its batch, down to the last bit. Slower
            without a C++ compiler.
        shutdown_timeout: Seconds to wait for running requests at shutdown.
        seed: Random seed of requests that have none. Default: a new one at each start.
        ready: Called with the address once requests are accepted.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    api_key: str | None = option(default=None, env_var="NEXTWORD_API_KEY")
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = option(default=(), converter=as_strings, flag="--allowed-host")
    name: str | None = option(default=None, flag="--model-name")
    max_batch: SmallCount = 8
    queue: CountOrZero = 64
    deterministic: bool = False
    shutdown_timeout: NonNegative = option(default=30.0, deprecated="grace")
    seed: Seed | None = None
    ready: Callable[[dict[str, Any]], None] | None = option(default=None, python_only=True)
