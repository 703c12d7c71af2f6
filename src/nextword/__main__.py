"""The entry point of ``nextword`` and ``python -m nextword``."""

import atexit
import gc
import os
import sys
import time
from contextlib import suppress

STARTED = time.time()  # a budget counts from here


def main() -> None:
    """Run the command line of the process and exit with its code."""
    # The start creates many objects that stay; collecting garbage among them takes a tenth of the time of --help.
    gc.set_threshold(100_000)
    code = 1  # if an exception escapes, which Python then reports

    def exit_before_finalization() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader has left, or the stream is closed
                stream.flush()
        os._exit(code)

    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Gloo's threads outlive `destroy_process_group`, since PyTorch's caches keep the groups. One that releases a tensor
        # while Python is finalized aborts the process. The first registered function is called last: exit there.
        atexit.register(exit_before_finalization)
    from nextword.commands.cli import run
    from nextword.common.console import prepare_streams

    prepare_streams()
    code = run(started=STARTED)
    sys.exit(code)


if __name__ == "__main__":
    main()
