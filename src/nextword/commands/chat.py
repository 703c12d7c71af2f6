"""``nextword chat``: a conversation in the terminal."""

import json
import sys
from typing import Any, TextIO

from nextword.commands.command import Context, command, options
from nextword.commands.shared import ModelArgument, SamplingOptions


@options
class ChatConfig(ModelArgument, SamplingOptions):
    """Talk with a model that was fine-tuned on conversations.

    In the conversation, /help lists the commands, Ctrl-C stops an answer and Ctrl-D quits. Use finetune --task chat to train
    such a model, and generate to continue a text with any model.

    Attributes:
        system: System prompt. Default: none.
    """

    temperature: float = 0.7
    top_p: float | None = 0.95
    system: str | None = None


def converse(config: ChatConfig, context: Context, stream: TextIO) -> list[dict[str, Any]]:
    """Talk on standard input and `stream`; the messages of the conversation."""
    from nextword.commands.chat_session import GREETING, ChatSession, terminal_reader
    from nextword.inference.sampling import Sampling
    from nextword.pipeline.language_model import load

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    model = load(config.model, config.device, config.precision)
    session = ChatSession(
        model.gpt,
        model.tokenizer,
        sampling,
        runner=model.runner,
        system=config.system,
        read_line=terminal_reader(),
        write_text=lambda text: print(text, end="", flush=True, file=stream),
    )
    session.run(greeting=None if context.console.quiet else GREETING)
    return session.messages


def main(config: ChatConfig, context: Context, as_json: bool) -> None:
    messages = converse(config, context, sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps({"messages": messages}, ensure_ascii=False))


@command(ChatConfig, example="nextword chat runs/assistant", main=main)
def chat(config: ChatConfig, context: Context) -> list[dict[str, Any]]:
    return converse(config, context, sys.stdout)
