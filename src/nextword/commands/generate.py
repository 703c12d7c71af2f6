"""``nextword generate``: continuations of texts."""

import shlex
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextword.commands.command import STDIN, Context, command
from nextword.commands.shared import check_is_text, optional, read_texts
from nextword.common.console import read_standard_input, write_result
from nextword.common.errors import UsageError
from nextword.common.numbers import SmallCount
from nextword.common.options import DeviceOption, ModelArgument, PrecisionOption, argument, as_strings, option, options
from nextword.inference.sampling_options import GENERATION_CONFIG_KEYS, SamplingOptions

if TYPE_CHECKING:
    from nextword.inference.engine import Completion


@options
class GenerateConfig(ModelArgument, PrecisionOption, DeviceOption, SamplingOptions):
    """Continue a text with a model.

    Use chat to talk with a model that was fine-tuned on conversations, and predict for one that was fine-tuned on another
    task.

    Attributes:
        prompts: Texts to continue; - reads one from standard input. Without a prompt, a new document is generated. One that
            could be the name of a file is not taken: use --text.
        text: A text to continue, whatever it looks like. May be given more than once. Default: none.
        file: File with one prompt per line; - for standard input. Default: none.
        samples: Number of samples per prompt.
    """

    prompts: tuple[str, ...] = argument(default=(), converter=as_strings)
    text: tuple[str, ...] = option(default=(), converter=as_strings)
    file: Path | None = option(default=None, converter=optional(Path))
    samples: SmallCount = option(default=1, flag=("--samples", "-n"))

    def all_prompts(self) -> list[str]:
        """The prompts of the command line and of --file, each as often as there are samples.

        Raises:
            UsageError: The file cannot be read.
        """
        prompts = read_texts([*self.prompts, *self.text])
        if self.file is not None:
            try:
                text = read_standard_input() if str(self.file) == STDIN else self.file.read_text(encoding="utf-8-sig")
            except (OSError, ValueError) as error:
                raise UsageError(f"--file {self.file}: {getattr(error, 'strerror', None) or error}") from error
            prompts += text.removesuffix("\n").split("\n") if text else []
        return [prompt for prompt in prompts or [""] for _ in range(self.samples)]


def format_completions(completions: "list[Completion]") -> str:
    """The prompts with their continuations."""
    return "\n\n".join(f"{completion.prompt}{completion.text}" for completion in completions)


def completions_to_dict(completions: "list[Completion]") -> dict[str, Any]:
    """The completions as ``--json`` prints them."""
    used = (*GENERATION_CONFIG_KEYS.values(), "stop", "seed")
    return {
        "completions": [{name: getattr(c, name) for name in ("prompt", "text", "finish_reason")} for c in completions],
        "sampling": {name: getattr(completions[0].sampling, name) for name in used},
    }


@command(
    GenerateConfig,
    example="nextword generate runs/mine 'Once upon a time' --max-tokens 100",
    to_dict=completions_to_dict,
    to_text=format_completions,
)
def generate(config: GenerateConfig, context: Context) -> "list[Completion]":
    """Continue the prompts. The command line prints a single completion as it is generated."""
    from nextword.pipeline.language_model import load

    if context.output is not None:
        for prompt in config.prompts:
            check_is_text(prompt, f"If it has a prompt on each line: --file={shlex.quote(prompt)}")
    prompts = config.all_prompts()
    model = load(config.model, config.device, config.precision)
    sampling = config.sampling(model.sampling_defaults)
    if message := model.tokenizer.form_message(prompts):
        context.console.warn(message)
    if lost := "".join(model.tokenizer.lost_text(prompts)):
        context.console.warn(
            f"the tokenizer cannot represent {len(lost):,} of {sum(map(len, prompts)):,} characters of the prompts, which are "
            f"lost, such as {lost[:8]!r}"
        )
    if context.output != "text" or len(prompts) > 1:
        return model.generate(prompts, sampling)
    for piece in chain(prompts, model.stream(prompts[0], sampling), ["\n"]):
        write_result(piece)
    return []
