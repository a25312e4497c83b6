import json

import pytest

from benchmarks import reading


def test_cases_are_measured_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "lines.jsonl", tmp_path / "plot.png"
    reading.main(f"--lengths 2048 --layers 2 --cases 0 2 --out {out} --plot {plot}".split())
    lines = out.read_text(encoding="utf-8")
    assert lines == capsys.readouterr().out
    plain, layerwise = map(json.loads, lines.splitlines())
    assert [(row["reading"], row["keep"]) for row in (plain, layerwise)] == [("plain", 1.0), ("layerwise", 0.2)]
    assert layerwise["kept"] < plain["kept"] and min(plain["measured peak"], layerwise["measured peak"]) > 1
    assert plot.read_bytes().startswith(b"\x89PNG")
