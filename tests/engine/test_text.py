"""Text as it comes is the text of all tokens at once, cut before a stop string."""

from __future__ import annotations

import random

import pytest

from d2o_dist.engine.text import TextStream, decode_tokens
from tests.engine.tiny import LINES, Numbers, make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("line", LINES)
def test_pieces_add_up(line):
    stream, ids = TextStream(TOKENIZER), TOKENIZER(line + " </s>")["input_ids"]
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == decode_tokens(TOKENIZER, ids) == stream.text


def test_any_tokens_add_up():
    for seed in range(20):
        generator = random.Random(seed)
        ids = [generator.randrange(len(TOKENIZER)) for _ in range(40)]
        stream = TextStream(TOKENIZER)
        text = "".join(stream.push(token) for token in ids) + stream.finish()
        assert text == stream.text
        # Broken characters are replaced by one mark or several, depending on how bytes are grouped.
        assert text.replace("\ufffd", "") == decode_tokens(TOKENIZER, ids).replace("\ufffd", "")


def test_a_stop_string_over_several_tokens_is_never_shown():
    stream = TextStream(Numbers(), ["2 3 9", "3 4"])
    shown = [stream.push(token) for token in (1, 2, 3)]
    assert "".join(shown) == "1 " and not stream.stopped  # "2 3 " may begin a stop string
    assert stream.push(4) == "2 " and stream.stopped
    assert stream.finish() == "" and stream.text == "1 2 "


def test_text_that_was_held_back_comes_at_the_end():
    stream = TextStream(Numbers(), ["1 2 3"])
    assert "".join(stream.push(token) for token in (1, 2)) == ""
    assert stream.finish() == "1 2 " and not stream.stopped


def test_the_first_of_several_stop_strings_wins():
    stream = TextStream(Numbers(), ["8", "5"])
    assert stream.push(58) == "" and stream.stopped and stream.text == ""
