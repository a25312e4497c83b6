"""From an example to two pieces of token ids: what is read before the question, and the question.

The pieces are tokenised apart and joined, whether or not the question is hidden: both settings see the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.engine.encode import tokenize
from d2o_dist.engine.messages import render, uses_template
from d2o_dist.eval.examples import Example


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt.

    Attributes:
        context: special tokens and template before the question included; never empty.
        question: question, template after it, and the beginning of the answer.
        num_cut: tokens cut out of the middle of the context.
        templated: whether they went through the chat template.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    num_cut: int = 0
    templated: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole prompt."""
        return self.context + self.question


class Encoder:
    """Encodes examples for one model.

    Args:
        chat_template: `auto`, `never` or `always`; system_prompt: of templated prompts.
        max_positions: tokens the model has positions for; max_prompt_tokens: a limit besides it; None: none.
        max_prompt_bytes: of a prompt that is tokenized at all.
        truncation: of longer prompts: `middle` or `error`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str = "auto",
        system_prompt: str | None = None,
        max_positions: int | None = None,
        max_prompt_tokens: int | None = None,
        max_prompt_bytes: int = EvalConfig.max_prompt_bytes,
        truncation: str = "middle",
    ) -> None:
        self.tokenizer = tokenizer
        self._chat_template, self._system_prompt = chat_template, system_prompt
        self._max_positions, self._max_prompt = max_positions, max_prompt_tokens
        self._max_bytes, self._truncation = max_prompt_bytes, truncation
        # Tokens that the tokenizer adds around a text by itself, such as a beginning-of-sequence token.
        self._wants_template = uses_template(tokenizer, chat_template, is_chat=False)

    def pieces(self, example: Example, template_allowed: bool = True) -> tuple[list[int], list[int]]:
        """`(context ids, question ids)`, whole.

        Raises:
            ValueError: the chat template fails, or does not pass the context on as it is.
        """
        templated = self._is_templated(template_allowed)
        if templated:
            message = {"role": "user", "content": example.context + example.question}
            rendered = render(self.tokenizer, [message], self._system_prompt)
            context = example.context.strip()
            at = rendered.find(context if context else example.question.strip())
            if at < 0:
                raise ValueError(
                    f"row {example.id}: the chat template changes the text, so the question cannot be found"
                )
            cut = at + len(context)
            head, tail = rendered[:cut], rendered[cut:] + example.prefix
        else:
            head, tail = example.context, example.question + example.prefix
        first = tokenize(self.tokenizer, head, self._max_bytes, special=not templated)
        return first, tokenize(self.tokenizer, tail, self._max_bytes, special=False)

    def _is_templated(self, template_allowed: bool) -> bool:
        return self._wants_template and (template_allowed or self._chat_template == "always")

    def count(self, example: Example, template_allowed: bool = True) -> int:
        """Tokens of the whole prompt, before any truncation."""
        return sum(map(len, self.pieces(example, template_allowed)))

    def encode(self, example: Example, template_allowed: bool = True) -> Encoded:
        """The ids, with the middle of the context cut out where they are too many.

        Raises:
            ValueError: they are too many and may not be cut, or the question alone is too long; a part has no token.
        """
        context, question = self.pieces(example, template_allowed)
        templated = self._is_templated(template_allowed)
        if not context or not question:
            raise ValueError(f"row {example.id}: the {'question' if context else 'context'} has no tokens")
        room = None if self._max_positions is None else self._max_positions - example.max_new_tokens
        limit = min((n for n in (self._max_prompt, room) if n is not None), default=None)
        surplus = 0 if limit is None else len(context) + len(question) - limit
        if surplus <= 0:
            return Encoded(tuple(context), tuple(question), templated=templated)
        if self._truncation == "error":
            raise ValueError(
                f"row {example.id}: the prompt has {len(context) + len(question)} tokens, above the limit of {limit} "
                f"(truncation is error)"
            )
        left = len(context) - surplus
        if left < 2:
            raise ValueError(f"row {example.id}: the question alone has {len(question)} tokens; the limit is {limit}")
        tail = left // 2
        return Encoded(tuple(context[: left - tail] + context[-tail:]), tuple(question), surplus, templated)
