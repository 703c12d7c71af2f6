"""``nextword generate``: continuations of texts."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextword.commands.command import STDIN, Context, argument, command, option, options
from nextword.commands.shared import ModelArgument, SamplingOptions, as_strings, optional
from nextword.common.console import read_standard_input, write_result
from nextword.common.numbers import CountOrZero, Penalty, RepetitionPenalty, Share, SmallCount

if TYPE_CHECKING:
    from nextword.inference.engine import Completion


@options
class GenerateConfig(ModelArgument, SamplingOptions):
    """Continue a text with a model.

    Use chat to talk with a model that was fine-tuned on conversations, and predict for one that was fine-tuned on another
    task.

    Attributes:
        prompts: Texts to continue; - reads one from standard input. Without a prompt, a new document is generated.
        file: File with one prompt per line; - for standard input. Default: none.
        samples: Number of samples per prompt.
        min_p: Min-p sampling: keep tokens with at least this fraction of the most likely token's probability. Default: all
            tokens.
        repetition_penalty: Values above 1 make tokens that are already in the text less likely.
        stop: Text at which a sample ends. May be given more than once. Default: none.
        presence_penalty: Subtracted from the logits of tokens that were sampled before.
        frequency_penalty: Subtracted from the logits of a token each time that it was sampled before.
        logit_bias: Added to the logits of single tokens, by token id.
        logprobs: Number of alternatives whose log-probabilities are returned with each token.
        prompt_logprobs: The same for the tokens of the prompt.
    """

    prompts: tuple[str, ...] = argument(default=(), converter=as_strings)
    file: Path | None = option(default=None, converter=optional(Path))
    samples: SmallCount = option(default=1, flag=("--samples", "-n"))
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty = 1.0
    stop: tuple[str, ...] = option(default=(), converter=as_strings)
    presence_penalty: Penalty = option(default=0.0, python_only=True)
    frequency_penalty: Penalty = option(default=0.0, python_only=True)
    logit_bias: Mapping[int, float] | None = option(default=None, python_only=True)
    logprobs: CountOrZero | None = option(default=None, python_only=True)
    prompt_logprobs: CountOrZero | None = option(default=None, python_only=True)

    def all_prompts(self) -> list[str]:
        """The prompts of the command line and of --file, each as often as there are samples."""
        prompts = [read_standard_input().removesuffix("\n") if prompt == STDIN else prompt for prompt in self.prompts]
        if self.file is not None:
            text = read_standard_input() if str(self.file) == STDIN else self.file.read_text(encoding="utf-8-sig")
            prompts += text.splitlines()
        return [prompt for prompt in prompts or [""] for _ in range(self.samples)]


def format_completions(completions: "list[Completion]") -> str:
    """The prompts with their continuations."""
    return "\n\n".join(f"{completion.prompt}{completion.text}" for completion in completions)


def completions_to_dict(completions: "list[Completion]") -> dict[str, Any]:
    """The completions as ``--json`` prints them."""
    return {
        "completions": [{name: getattr(c, name) for name in ("prompt", "text", "finish_reason")} for c in completions]
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

    sampling, prompts = config.sampling(), config.all_prompts()
    model = load(config.model, config.device, config.precision)
    if context.output != "text" or len(prompts) > 1:
        return model.generate(prompts, sampling)
    for piece in chain(prompts, model.stream(prompts[0], sampling), ["\n"]):
        write_result(piece)
    return []
