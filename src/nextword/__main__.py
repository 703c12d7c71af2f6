"""The program: `nextword` and `python -m nextword` both begin here."""

import atexit
import gc
import os
import sys
from contextlib import suppress


def main() -> None:
    # Starting makes many objects that stay; to look for garbage among them takes a tenth of the time of --help.
    gc.set_threshold(100_000)
    code = 1  # where what runs raises, and Python has told of it

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader has left, or the stream is closed: there is nobody to tell
                stream.flush()
        os._exit(code)

    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Gloo's threads outlive `destroy_process_group`, as PyTorch's caches hold the groups. One that lets go of a tensor
        # while Python is taken down aborts the process. What registers first is called last: there we end, before that.
        atexit.register(end)
    from nextword.commands.cli import run

    code = run()
    sys.exit(code)


if __name__ == "__main__":
    main()
