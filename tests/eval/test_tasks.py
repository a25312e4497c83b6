"""The rows that tasks make: their lengths, their answers, where the facts lie, and how they are scored."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from d2o_dist.config.eval_tasks import (
    JSONL_METRICS,
    RULER_TASKS,
    FidelityTask,
    JsonlTask,
    LongBenchTask,
    NeedleTask,
    PerplexityTask,
    RulerTask,
)
from d2o_dist.eval.fill import SLACK
from d2o_dist.eval.tasks.jsonl import METRICS, Jsonl
from d2o_dist.eval.tasks.needle import Fact, Needle, hide
from d2o_dist.eval.tasks.passages import Passages
from d2o_dist.eval.tasks.registry import make_tasks
from d2o_dist.eval.tasks.ruler import Ruler
from d2o_dist.eval.tasks.ruler_counting import zipf_counts
from tests.eval.parts import TEXT, make_tools, write


@pytest.fixture(scope="module")
def tools():
    return make_tools()


# Needle.


@pytest.mark.parametrize("template", [False, True])
def test_needles_lie_where_they_should(template):
    tools = make_tools(template=template)
    task = Needle(NeedleTask(lengths=(300, 600), depths=3, samples=2))
    rows = task.rows(tools)
    assert len(rows) == 12 and len({row.id for row in rows}) == 12
    for row in rows:
        length, depth = row.groups["length"], row.groups["depth"]
        assert length - 60 <= tools.count(row, True) <= length
        sentence = f"{row.prefix.strip()} {row.answers[0]}."
        assert row.context.count(sentence) == 1 and row.answers[0] not in row.question
        where = row.context.index(sentence) / (len(row.context) - len(sentence))
        assert where == pytest.approx(depth, abs=0.06)
    # The same facts at every length, different ones elsewhere.
    assert [row.answers for row in rows[:6]] == [row.answers for row in rows[6:]]
    assert len({row.answers for row in rows[:6]}) == 6


def test_rows_depend_on_the_seed_only(tools):
    task = Needle(NeedleTask(lengths=(300,), needles=3))
    assert task.rows(tools) == task.rows(make_tools())
    assert task.rows(tools) != task.rows(make_tools(seed=1))


def test_several_needles_and_a_fixed_fact(tools):
    (row,) = Needle(NeedleTask(lengths=(400,), depths=1, needles=3)).rows(tools)
    assert len(re.findall(r"The secret access code of the [a-z ]+ is \d{5}\.", row.context)) == 3
    fixed = NeedleTask(lengths=(400,), depths=1, fact="Rain falls up.", question="Where does rain fall?", answer="up")
    (row,) = Needle(fixed).rows(tools)
    assert "Rain falls up." in row.context and row.question.endswith("Where does rain fall?\nAnswer:")
    assert Needle(fixed).score(row, "it falls up")["exact"] == 1 and Needle(fixed).primary == "rouge1"


def test_hide_keeps_every_piece_in_order():
    pieces = ["aa", "bbbb", "cc"]
    fact = Fact("XX", "", "")
    assert [hide(pieces, [fact], [depth]) for depth in (0, 0.3, 0.7, 1)] == [
        "XX aa bbbb cc", "aa XX bbbb cc", "aa bbbb XX cc", "aa bbbb cc XX",
    ]  # fmt: skip
    assert hide(pieces, [Fact("X", "", ""), Fact("Y", "", "")], [1, 1]) == "aa bbbb cc X Y"


def test_needle_scores(tools):
    task = Needle(NeedleTask(lengths=(300,)))
    row = task.rows(tools)[0]
    answer = row.answers[0]
    assert task.score(row, f" {answer}. Yes") == pytest.approx(
        {"exact": 1, "prefix": 1, "characters": 1, "rouge1": 2 / 3}
    )
    wrong = answer[:2] + ("0" if answer[2] != "0" else "1") + answer[3:]
    assert task.score(row, wrong) == pytest.approx({"exact": 0, "prefix": 0.4, "characters": 0.8, "rouge1": 0})


# Passages.


def test_passages_of_one_sample_predict_the_same_tokens(tools):
    task = Passages(FidelityTask(lengths=(64, 128), num_scored=16, samples=3))
    rows = task.rows(tools)
    ids = tools.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    by_length = {length: [row for row in rows if row.groups["length"] == length] for length in (64, 128)}
    for short, long in zip(*by_length.values(), strict=True):
        assert (len(short.tokens), len(long.tokens)) == (80, 144)
        assert short.tokens == long.tokens[64:] and short.num_prompt == 64
        assert any(tuple(ids[start : start + 144]) == long.tokens for start in range(len(ids)))
    starts = [row.tokens for row in by_length[128]]
    assert len(set(starts)) == 3


def test_passages_refusals(tools):
    count = len(tools.tokenizer(TEXT)["input_ids"])
    with pytest.raises(ValueError, match=rf"20 passages of 1016 tokens need 20320, but text essays has {count}"):
        Passages(PerplexityTask(lengths=(1000,), num_scored=16, samples=20)).rows(tools)
    rows = Passages(PerplexityTask(lengths=(1000,), num_scored=16, samples=20, overlap=True)).rows(tools)
    assert len({row.tokens for row in rows}) == 20
    # Passages that are the same would be counted as many.
    with pytest.raises(ValueError, match=rf"20 passages of {count - 18} tokens need {count + 1}, but text essays has"):
        Passages(PerplexityTask(lengths=(count - 34,), num_scored=16, samples=20, overlap=True)).rows(tools)
    rows = Passages(PerplexityTask(lengths=(count - 35,), num_scored=16, samples=20, overlap=True)).rows(tools)
    assert len({row.tokens for row in rows}) == 20
    with pytest.raises(ValueError, match=r"a length \(300\) and num_scored \(128\) must be at most the model's 256"):
        Passages(PerplexityTask(lengths=(300,))).rows(make_tools(max_positions=256))


# RULER.


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    rows = [
        {
            "question": f"Who keeps {i}?",
            "answers": [f"Keeper{i}"],
            "context": [f"Keeper{i} keeps {i}. " + "Filler. " * 20],
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(questions, **values) -> RulerTask:
    return RulerTask(**{"lengths": (1800,), "tasks": "all", "samples": 2, "qa_1_file": questions,
                        "qa_2_file": questions, **values})  # fmt: skip


@pytest.mark.parametrize("name", RULER_TASKS)
def test_ruler_rows(tools, questions, name):
    task = Ruler(config(questions), name)
    rows = task.rows(tools)
    assert rows == task.rows(tools) and len(rows) == 2 and rows[0].answers != rows[1].answers
    for row in rows:
        length = tools.count(row, True) + row.max_new_tokens
        assert 1800 - SLACK - 160 <= length <= 1800
        for answer in row.answers:
            assert answer in row.context and answer not in row.prefix
        assert task.score(row, " ".join(row.answers))["score"] == 1
        assert task.score(row, "nothing of it")["score"] == 0
    count = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(name, 1)
    assert len(rows[0].answers) == count


def test_ruler_generates_no_more_than_it_is_told(tools, questions):
    short = config(questions, max_new_tokens=40)
    assert [Ruler(short, name).rows(tools)[0].max_new_tokens for name in ("niah_single_1", "vt")] == [40, 30]
    row = Ruler(short, "fwe").rows(tools)[0]
    assert 1800 - SLACK - 160 <= tools.count(row, True) + 40 <= 1800


def test_ruler_rows_are_not_longer_than_they_are_called(tools, questions):
    with pytest.raises(ValueError, match=r"ruler/fwe 300-0: the least that .* has \d+ tokens, above 250"):
        Ruler(config(questions, lengths=(300,)), "fwe").rows(tools)


def test_ruler_facts_are_unambiguous(tools, questions):
    row = Ruler(config(questions), "niah_multikey_2").rows(tools)[0]
    key = re.search(r"number for (\S+) does", row.question).group(1)
    assert re.findall(rf"magic numbers for {key} is: (\d+)", row.context) == list(row.answers)
    row = Ruler(config(questions), "niah_multivalue").rows(tools)[0]
    key = re.search(r"numbers for (\S+) does", row.question).group(1)
    assert sorted(re.findall(rf"magic numbers for {key} is: (\d+)", row.context)) == sorted(row.answers)


def test_ruler_variables_form_one_chain(tools, questions):
    row = Ruler(config(questions), "vt").rows(tools)[0]
    text = row.context.split("The text:")[1]
    value = re.search(r"value (\d+)", row.question).group(1)
    reached = {name for name, told in re.findall(r"VAR (\w+) = (\d+)\.", text) if told == value}
    for name, other in re.findall(r"VAR (\w+) = VAR (\w+)\.", text):
        assert other in reached, "assignments come in order"
        reached.add(name)
    assert reached == set(row.answers)


def test_ruler_counted_words_are_the_most_frequent(tools, questions):
    row = Ruler(config(questions), "cwe").rows(tools)[0]
    words = re.findall(r"\d+\. (\S+)", row.context.split("The list:")[1])
    counts = {word: words.count(word) for word in set(words)}
    assert {counts[word] for word in row.answers} == {10}
    assert {count for word, count in counts.items() if word not in row.answers} == {1}
    row = Ruler(config(questions), "fwe").rows(tools)[0]
    words = row.context.split("\n")[1].split()
    ranked = sorted(set(words) - {"..."}, key=words.count, reverse=True)
    assert ranked[:3] == list(row.answers) and words.count(ranked[2]) > words.count(ranked[3])


def test_zipf_counts():
    counts = zipf_counts(1000, 30)
    assert abs(sum(counts) - 1000) < 15 and counts == sorted(counts, reverse=True)
    assert counts[0] / counts[1] == pytest.approx(4, rel=0.02)


def test_ruler_question_files(tools, tmp_path, questions):
    with pytest.raises(ValueError, match="qa_1 needs qa_1_file"):
        RulerTask(lengths=(1000,), tasks="qa_1")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answers": ["b"]}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl line 1: context \(None\)"):
        Ruler(config(str(bad)), "qa_1").rows(tools)
    with pytest.raises(ValueError, match="pieces of text give .* short of its length"):
        Ruler(config(questions, lengths=(100_000,)), "qa_1").rows(tools)


def test_question_files_may_hold_any_line_separator_and_be_compressed(tools, tmp_path):
    row = {"question": "Who keeps?", "answers": "Keeper", "context": ["Keeper\u2028keeps.\x85 " + "Filler. " * 20]}
    others = [{**row, "context": [f"{number} " + "Filler. " * 20]} for number in range(120)]
    path = tmp_path / "qa.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in [row, *others]))
    (found, _) = Ruler(config(str(path)), "qa_1").rows(tools)
    assert "Keeper\u2028keeps.\x85" in found.context


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", b"\xff\xfe\n"), ("a.jsonl.gz", b"no archive\n")])
def test_a_file_that_cannot_be_read_is_named(tools, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: "):
        Ruler(config(str(tmp_path / name)), "qa_1").rows(tools)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: "):
        Jsonl(JsonlTask(data=str(tmp_path / name), question="?")).rows(tools)


def test_suites_become_tasks(questions):
    tasks = make_tasks([config(questions, name="r"), LongBenchTask(data="x"), FidelityTask(lengths=(64,))])
    names = [task.name for task in tasks]
    assert names[:2] == ["r/niah_single_1", "r/niah_single_2"] and names[13] == "longbench/narrativeqa"
    assert names[-1] == "fidelity" and len(names) == 13 + 21 + 1


# Files of one's own.


ROWS = [
    {"input": "Long text {x}. Then: what is {it}? It is", "outputs": ["one", "two"], "n": 3, "pairs": [["a", "b"]]},
    {"input": "Other text. Then: what is that?", "outputs": ["three"], "n": 4, "pairs": []},
]


def jsonl(tmp_path, rows=ROWS, **values) -> Jsonl:
    write(tmp_path, "own", rows)
    defaults = {"context": "{input}", "question_from": "Then: what", "answers": "outputs"}
    return Jsonl(JsonlTask(data=str(tmp_path / "own.jsonl"), **{**defaults, **values}))


def test_jsonl_prompts_are_cut_where_the_question_begins(tools, tmp_path):
    task = jsonl(tmp_path, prefix=" ({n})", stop="\n", max_new_tokens=5)
    rows = task.rows(tools)
    assert [row.context for row in rows] == ["Long text {x}. ", "Other text. "]
    assert [row.question for row in rows] == ["Then: what is {it}? It is", "Then: what is that?"]
    assert [row.prefix for row in rows] == [" (3)", " (4)"] and [row.id for row in rows] == ["1", "2"]
    assert rows[0].answers == ("one", "two") and (rows[0].stop, rows[0].max_new_tokens) == (("\n",), 5)
    assert len(jsonl(tmp_path, samples=1).rows(tools)) == 1
    # Where the text occurs more than once, the last one is the question.
    twice = [{**ROWS[0], "input": "Then: what? Then: what?"}]
    assert jsonl(tmp_path, twice).rows(tools)[0].context == "Then: what? "


def test_jsonl_templates_write_values_as_json(tools, tmp_path):
    task = jsonl(tmp_path, context="Pairs: {pairs}", question="\n{{n}} of {n} {}?", question_from=None, answers="n")
    row = task.rows(tools)[0]
    assert (row.context, row.question, row.answers) == ('Pairs: [["a", "b"]]', "\n{3} of 3 {}?", ("3",))
    assert not task.config.stop and not jsonl(tmp_path, chat=False).uses_template


@pytest.mark.parametrize(
    ("metric", "text", "score"),
    [
        ("contains_all", "it is One, I think", 0.5),
        ("contains_any", "it is One, I think", 1),
        ("starts_with", " two.", 1),
        ("starts_with", "it is one", 0),
        ("qa_f1", "the two?", 1),
        ("rouge_1", "two three", 2 / 3),
        ("rouge_l", "two three", 2 / 3),
    ],
)
def test_jsonl_metrics(tools, tmp_path, metric, text, score):
    task = jsonl(tmp_path, metric=metric)
    assert task.score(task.rows(tools)[0], text) == {"score": pytest.approx(score)}
    assert task.scoring["metric"] == metric


def test_jsonl_metrics_are_those_of_the_configuration():
    assert tuple(METRICS) == JSONL_METRICS


@pytest.mark.parametrize(
    ("rows", "values", "words"),
    [
        (ROWS, {"context": "{inputs}"}, 'own.jsonl line 1: there is no field "inputs"; there are input, outputs, n'),
        (ROWS, {"answers": "output"}, 'line 1: there is no field "output"'),
        (ROWS, {"question_from": "is that"}, r"line 1: question_from \('is that'\) does not occur in the context"),
        ([{"input": "Then: what", "outputs": []}], {}, "line 1: outputs has no answer"),
        ([{"input": "Then: what", "outputs": [""]}], {}, r"line 1: outputs \(''\) must be a non-empty string"),
        ([["input"]], {}, "line 1: a row must be a JSON object, not a list"),
        ([], {}, "own.jsonl has no rows"),
    ],
)
def test_jsonl_refuses_rows(tools, tmp_path, rows, values, words):
    with pytest.raises(ValueError, match=words):
        jsonl(tmp_path, rows, **values).rows(tools)


def test_jsonl_refuses_what_is_no_json_or_not_there(tools, tmp_path):
    task = jsonl(tmp_path)
    (tmp_path / "own.jsonl").write_text('\n{"input": 1')
    with pytest.raises(ValueError, match="own.jsonl line 2: "):
        task.rows(tools)
    (tmp_path / "own.jsonl").unlink()
    with pytest.raises(ValueError, match="own.jsonl does not exist"):
        task.rows(tools)
