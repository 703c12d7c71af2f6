"""``nextword generate``: continuations of texts."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nextword.commands.command import STDIN, Context, argument, command, option, options
from nextword.commands.shared import ModelArgument, SamplingOptions, as_strings, optional_path
from nextword.common.errors import UsageError

if TYPE_CHECKING:
    from nextword.inference.engine import Completion
    from nextword.inference.sampling import Sampling


@options
class GenerateConfig(ModelArgument, SamplingOptions):
    """Continue a text with a model.

    Use chat to talk with a model that was fine-tuned on conversations, and predict for one that was fine-tuned on another
    task.

    Attributes:
        prompts: Texts to continue; - reads one from standard input. Without a prompt, a new document is generated.
        file: File with one prompt per line; - for standard input. Default: none.
        samples: Number of samples per prompt.
        min_p: Sample only from tokens at least this share as likely as the most likely one. Default: no limit.
        repetition_penalty: Values above 1 make tokens that are already in the text less likely.
        stop: Text at which a sample ends. May be given more than once. Default: none.
        presence_penalty: Subtracted from the logits of tokens that were sampled before.
        frequency_penalty: Subtracted from the logits of a token each time that it was sampled before.
        logit_bias: Added to the logits of single tokens, by token id.
        logprobs: Number of alternatives whose log-probabilities are returned with each token.
        prompt_logprobs: The same for the tokens of the prompt.
    """

    prompts: tuple[str, ...] = argument(default=(), converter=as_strings)
    file: Path | None = option(default=None, converter=optional_path)
    samples: int = option(default=1, flag=("--samples", "-n"))
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = option(default=(), converter=as_strings)
    presence_penalty: float = option(default=0.0, python_only=True)
    frequency_penalty: float = option(default=0.0, python_only=True)
    logit_bias: Mapping[int, float] | None = option(default=None, python_only=True)
    logprobs: int | None = option(default=None, python_only=True)
    prompt_logprobs: int | None = option(default=None, python_only=True)

    def sampling(self) -> "Sampling":
        from nextword.inference.sampling import Sampling

        return Sampling(**{name: getattr(self, name) for name in Sampling.__dataclass_fields__})

    def all_prompts(self) -> list[str]:
        """The prompts of the command line and of --file, each as often as there are samples."""
        if self.samples < 1:
            raise UsageError(f"--samples must be at least 1, not {self.samples}")
        prompts = [sys.stdin.read().removesuffix("\n") if prompt == STDIN else prompt for prompt in self.prompts]
        if self.file is not None:
            text = sys.stdin.read() if str(self.file) == STDIN else self.file.read_text(encoding="utf-8")
            prompts += text.splitlines()
        return [prompt for prompt in prompts or [""] for _ in range(self.samples)]


def main(config: GenerateConfig, context: Context, as_json: bool) -> None:
    """Print a single completion as it is generated, several or JSON at the end."""
    prompts = config.all_prompts()
    if len(prompts) == 1 and not as_json:
        from nextword.pipeline.language_model import load

        sampling = config.sampling()
        model = load(config.model, config.device, config.precision)
        print(prompts[0], end="", flush=True)
        for piece in model.stream(prompts[0], sampling):
            print(piece, end="", flush=True)
        print()
        return
    # standard input was read once
    completions = generate.run(replace(config, prompts=tuple(prompts), file=None, samples=1), context)
    if as_json:
        values = [{"prompt": c.prompt, "text": c.text, "finish_reason": c.finish_reason} for c in completions]
        print(json.dumps({"completions": values}, ensure_ascii=False))
    else:
        print("\n\n".join(f"{completion.prompt}{completion.text}" for completion in completions))


@command(GenerateConfig, example="nextword generate runs/mine 'Once upon a time' --max-tokens 100", main=main)
def generate(config: GenerateConfig, context: Context) -> "list[Completion]":
    from nextword.pipeline.language_model import load

    sampling = config.sampling()  # refuse wrong settings before the model is loaded
    return load(config.model, config.device, config.precision).generate(config.all_prompts(), sampling)
