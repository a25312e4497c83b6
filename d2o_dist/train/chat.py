"""Conversations as tokens, with a loss on the assistant's answers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2o_dist.engine.messages import check_messages, render


def chat_tokens(tokenizer: Any, messages: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are counted: an answer and what ends it.

    What comes before an answer is tokenized as inference does it: rendered by the chat template up to the point where
    the answer begins. A conversation's last answer is its end; what follows it is left out.

    Raises:
        ValueError: no answer, no chat template, or a template that renders a beginning differently once more follows.
    """
    messages = check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the rows are conversations, but the tokenizer has no chat template")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise ValueError("a conversation must have an answer (role assistant) that is not its first message")
    ids: list[int] = []
    counted: list[bool] = []
    done = ""
    for number in answers:
        before = render(tokenizer, messages[:number], None) if messages[number - 1]["role"] != "assistant" else done
        whole = _closed(tokenizer, messages[: number + 1])
        for text, is_answer in ((before, False), (whole, True)):
            if not text.startswith(done):
                raise ValueError(
                    f"the chat template renders the beginning of a conversation differently after message {number}: "
                    "answers cannot be told apart"
                )
            part = tokenizer(text[len(done) :], add_special_tokens=False, verbose=False)["input_ids"]
            ids += part
            counted += [is_answer] * len(part)
            done = text
    return ids, counted


def _closed(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The text of a conversation that ends with a whole answer, without what a template may write after its end."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise ValueError(f"the chat template failed: {error}") from error
    return text.rstrip("\n")
