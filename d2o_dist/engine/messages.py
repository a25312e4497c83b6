"""Chats: what a list of messages must look like, and the text that a tokenizer's chat template makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2o_dist.fields.checks import check_unicode


def check_messages(messages: Any) -> tuple[dict[str, str], ...]:
    """The messages as plain dictionaries of `role` and `content`.

    Raises:
        ValueError: not a non-empty list of objects with a string `role` and a string `content`.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a non-empty list, not {messages!r:.60}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{number}] must be an object, not {type(message).__name__}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"messages[{number}].{name} ({message.get(name)!r:.60}) must be a string")
            check_unicode(f"messages[{number}].{name}", message[name])
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def uses_template(tokenizer: Any, chat_template: str, is_chat: bool) -> bool:
    """Whether a row goes through the chat template.

    Args:
        chat_template: `auto`, `never` or `always`; is_chat: the row has messages, not a bare prompt.

    Raises:
        ValueError: the row or the configuration wants a template and there is none, or may not have one.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if is_chat and chat_template == "never":
        raise ValueError('the row has messages, but chat_template is "never"')
    wanted = is_chat or chat_template == "always"
    if wanted and not has_template:
        why = "the row has messages" if is_chat else 'chat_template is "always"'
        raise ValueError(f"{why}, but the tokenizer has no chat template")
    return wanted or (chat_template == "auto" and has_template)


def render(tokenizer: Any, messages: Sequence[dict[str, str]], system_prompt: str | None) -> str:
    """The text of a chat, ready for the assistant's answer; a last message by the assistant is continued.

    Raises:
        ValueError: the template refuses the messages (some want user and assistant to alternate).
    """
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    continued = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise ValueError(f"the chat template failed: {error}") from error
