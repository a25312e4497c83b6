import pytest

from benchmarks import reading


def test_cases_are_planned_and_drawn(tmp_path):
    """In this process, whose peak may be past: what a case says of itself, and the plot of several."""
    pytest.importorskip("matplotlib")
    rows = []
    for name, preset, keep in (reading.CASES[0], reading.CASES[2]):
        case = name, preset, keep
        measured = reading.read(case, 2, 1024)
        assert measured >= 0
        row = {"tokens": 1024, "layers": 2, "reading": name, "preset": preset, "keep": keep, "measured peak": measured}
        rows.append(row | reading.planned(case, 2, 1024))
    assert 0 < rows[1]["kept"] < rows[0]["kept"]
    reading.plot(tmp_path / "plot.png", rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
