"""Rows from files: good ones, and bad ones that become rows with an error."""

from __future__ import annotations

import json

import pytest

from d2o_dist.engine.prompts import read_prompts, repeated_ids


def rows_of(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(text + b"\n")
    return read_prompts(str(path), None)


def test_good_rows(tmp_path):
    chat = [{"role": "user", "content": "hi", "name": "dropped"}]
    rows = rows_of(
        tmp_path,
        {"id": "a", "prompt": "one", "answer": "carried by the user, not read"},
        b"   ",
        {"messages": chat, "max_new_tokens": 3, "max_prompt_tokens": 9, "stop": "x"},
        {"id": 7, "prompt": "two", "messages": None, "stop": ["a", "b"]},
    )
    assert [row.error for row in rows] == [None] * 3
    assert [(row.index, row.id) for row in rows] == [(0, "a"), (1, 1), (2, 7)]
    assert rows[1].messages == ({"role": "user", "content": "hi"},)
    assert (rows[1].max_new_tokens, rows[1].max_prompt_tokens, rows[1].stop) == (3, 9, ("x",))
    assert rows[2].stop == ("a", "b") and rows[2].prompt == "two"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"id": "a", "prompt"', "not valid JSON"),
        (b'{"prompt": "\xff"}', "utf-8"),
        (b"[" * 100_000, "not valid JSON"),
        ([1], "a row must be a JSON object, not list"),
        ({"id": "a"}, "this one has neither prompt nor messages, only id"),
        ({}, "neither prompt nor messages, only no fields"),
        ({"prompt": "a", "messages": []}, "this one has both prompt and messages"),
        ({"prompt": 3}, r"prompt \(3\) must be a non-empty string"),
        ({"prompt": ""}, r"prompt \(''\) must be a non-empty string"),
        ({"prompt": "a\ud800"}, r"prompt has half a surrogate pair \('\\ud800'\) as its character 2"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"messages\[0\].content has half a surrogate pair"),
        ({"prompt": "a", "stop": "\udcff"}, "stop has half a surrogate pair"),
        ({"messages": "hi"}, "messages must be a non-empty list, not 'hi'"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, not str"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content \(None\) must be a string"),
        ({"messages": [{"role": 1, "content": ""}]}, r"messages\[0\].role \(1\) must be a string"),
        ({"prompt": "a", "id": [1]}, r"id \(\[1\]\) must be a string or an integer"),
        ({"prompt": "a", "id": True}, r"id \(True\) must be a string or an integer"),
        ({"prompt": "a", "max_new_tokens": 0}, r"max_new_tokens \(0\) must be at least 1"),
        ({"prompt": "a", "max_new_tokens": "9"}, r"max_new_tokens \('9'\) must be an integer"),
        ({"prompt": "a", "max_prompt_tokens": 1.5}, r"max_prompt_tokens \(1.5\) must be an integer"),
        ({"prompt": "a", "stop": [1]}, r"stop \(1\) must be a non-empty string"),
        ({"prompt": "a", "max_new_token": 5}, 'no limit "max_new_token". Did you mean "max_new_tokens"'),
    ],
)
def test_a_bad_row_has_an_error_and_the_rest_goes_on(tmp_path, row, message):
    first, bad, last = rows_of(tmp_path, {"prompt": "good"}, row, {"prompt": "good too"})
    assert first.error is None and last.error is None and last.index == 2
    assert bad.error.startswith("line 2: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad.error)


def test_a_bad_row_keeps_its_id(tmp_path):
    assert rows_of(tmp_path, {"id": "mine", "prompt": 3})[0].id == "mine"


def test_a_text_file_is_one_prompt(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffline one\nline two\n".encode())
    (row,) = read_prompts(str(path), None)
    assert row.prompt == "line one\nline two\n" and row.id == 0


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": "y"}')
    assert [row.prompt for row in read_prompts(str(path), None)] == ["x", "y"]


def test_sources_that_cannot_be_read(tmp_path):
    for content, name, message in [
        (b"\n\n", "a.jsonl", "has no rows"),
        (b" \n", "a.txt", "is empty"),
        (b"\xff", "b.txt", "not UTF-8"),
        (b"x", "a.csv", "must end in one of .jsonl, .txt"),
        (None, "none.jsonl", "does not exist"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(tmp_path / name), None)
    with pytest.raises(ValueError, match="prompt has half a surrogate pair"):  # a byte of the command line, undecoded
        read_prompts(None, "\udcff")
    with pytest.raises(ValueError, match="exactly one of prompts"):
        read_prompts(None, None)


def test_repeated_ids_are_counted(tmp_path):
    rows = rows_of(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"})
    assert repeated_ids(rows) == {"a": 2}
