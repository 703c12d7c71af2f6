"""The program: `nextword` and `python -m nextword` both begin here."""

import gc
import sys


def main() -> None:
    # Starting makes many objects that stay; to look for garbage among them takes a tenth of the time of --help.
    gc.set_threshold(100_000)
    from nextword.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
