import json

import pytest

from benchmarks import text
from tests.engine.tiny import make_folder


def test_cases_take_turns(tmp_path, capsys):
    folder, words = make_folder(tmp_path / "model"), tmp_path / "text.txt"
    words.write_text("the sky is blue and the sea is wide " * 40, encoding="utf-8")
    asked = f"{folder} --text {words} --tokens 40 --rows 2 --presets d2o,paper --keep-ratio 0.5 --steps 6 --rounds 1"
    text.main(asked.split())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    _, *lines = map(json.loads, said)
    assert [(line["case"], line["rows"], line["tokens"]) for line in lines] == [
        ("plain", 2, 40), ("d2o", 2, 40), ("paper", 2, 40), ("least", 2, 20)
    ]  # fmt: skip
    assert lines[0]["step, ratio"] == lines[0]["reading, ratio of means"] == 1
    assert all(line["step, ms"] > 0 and line["reading, ms"] > 0 for line in lines)


def test_a_text_that_is_too_short(tmp_path):
    folder, words = make_folder(tmp_path / "model"), tmp_path / "text.txt"
    words.write_text("short", encoding="utf-8")
    with pytest.raises(ValueError, match="1 x 1024"):
        text.main(f"{folder} --text {words}".split())
