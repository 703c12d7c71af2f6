"""`nextword VERB …`: reads the command line, calls the verb, prints.

Results go to standard output, everything else to standard error. Nothing heavy is imported before a verb runs.
Exit codes: 0 done, 1 failed, 2 wrong use, 3 a corrupt file, 4 the disk is full, 5 the loss diverged, 6 another process works
on the run, 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

import sys

from cyclopts import App, CycloptsError

from nextword import __version__
from nextword.commands import audit, explain, serve, task_commands, text_commands
from nextword.common.errors import NextwordError, UsageError

app = App(
    name="nextword",
    version=__version__,
    help="From a folder of text to a GPT that is trained, fine-tuned, measured and used, on the machine you have.",
    help_epilogue="Exit codes: 0 done · 1 failed · 2 wrong use · 3 corrupt file · 4 disk full · 5 diverged · 6 run is locked · "
    "130, 143 stopped.\n\nBegin with: nextword demo\n",
    help_format="plaintext",  # a parser of Markdown would take longer to import than all the rest
    result_action="return_value",
)
for command in (
    text_commands.demo, text_commands.plan, text_commands.prepare, text_commands.pretrain, task_commands.finetune, task_commands.transfer, task_commands.predict, task_commands.chat,
    text_commands.generate, serve.serve, text_commands.evaluate, audit.audit, explain.explain, text_commands.export, text_commands.report, text_commands.verify,
):  # fmt: skip
    app.command(command)


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        print(f"nextword: {error}\nSee: nextword --help", file=sys.stderr)
        return UsageError.exit_code
    except NextwordError as error:
        print(f"nextword: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nextword: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 1
    return 0
