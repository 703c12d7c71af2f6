"""``nextword chat``: a conversation in the terminal."""

import sys
from typing import Any

from nextword.commands.command import Context, command
from nextword.common.options import DeviceOption, ModelArgument, PrecisionOption, options
from nextword.inference.sampling_options import SamplingOptions


@options
class ChatConfig(ModelArgument, PrecisionOption, DeviceOption, SamplingOptions):
    """Talk with a model that was fine-tuned on conversations.

    In the conversation, /help lists the commands, Ctrl-C stops an answer and Ctrl-D quits. Use finetune --task chat to train
    such a model, and generate to continue a text with any model.

    Attributes:
        system: System prompt. Default: none.
    """

    system: str | None = None


@command(
    ChatConfig,
    example="nextword chat runs/assistant",
    to_dict=lambda messages: {"messages": messages},
    to_text=lambda messages: "",
)
def chat(config: ChatConfig, context: Context) -> list[dict[str, Any]]:
    """Talk on standard input and output; with ``--json``, on standard error. Returns the messages."""
    from nextword.commands.chat_session import GREETING, ChatSession, terminal_reader
    from nextword.pipeline.language_model import load

    stream = sys.stderr if context.output == "json" else sys.stdout
    model = load(config.model, config.device, config.precision)
    session = ChatSession(
        model.gpt,
        model.tokenizer,
        config.sampling(model.sampling_defaults),
        read_line=terminal_reader(),
        write_text=lambda text: print(text, end="", flush=True, file=stream),
        system=config.system,
        runner=model.runner,
    )
    session.run(greeting=None if context.console.quiet else GREETING)
    return session.messages
