"""Reading and tokenizing: every kind of source, and conversations with a loss on answers only."""

import json

import pytest

from d2o_dist.config.train_parts import DataConfig
from d2o_dist.train.chat import chat_tokens
from d2o_dist.train.documents import load_documents
from tests.engine.tiny import make_tokenizer

TEXTS = ["the quick brown fox", "a cache keeps what it needs\nand folds the rest into it"]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five six"},
]


def texts_of(documents, tokenizer):
    rows = [documents.piece(number, 0, 10**6)[0] for number in range(len(documents))]
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]


def write(folder, kind):
    """TEXTS in a source of one kind."""
    if kind == "folder":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text)
        return folder
    if kind == "saved":
        import datasets

        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
        return folder / "saved"
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "saved"])
def test_every_source_gives_the_same_documents(tmp_path, kind):
    tokenizer = make_tokenizer()
    path = write(tmp_path, kind)
    documents = load_documents(str(path), "train", DataConfig(str(path)), tokenizer)
    assert texts_of(documents, tokenizer) == [text + "</s>" for text in TEXTS]
    assert documents.all_counted and documents.lengths.tolist() == [len(documents.piece(n, 0, 999)[0]) for n in (0, 1)]
    ids, counted = documents.piece(1, 3, 8)
    assert ids.tolist() == documents.piece(1, 0, 999)[0][3:8].tolist() and counted.all()


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(TEXTS))
    tokenizer = make_tokenizer()
    documents = load_documents(str(path), "train", DataConfig(str(path)), tokenizer)
    assert texts_of(documents, tokenizer) == ["\n\n".join(TEXTS) + "</s>"]


def test_answers_and_their_ends_are_counted_and_nothing_else():
    tokenizer = make_tokenizer()
    ids, counted = chat_tokens(tokenizer, CHAT)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    answers, inside = [], False
    for token, flag in zip(ids, counted, strict=True):
        if flag and not inside:
            answers.append([])
        if flag:
            answers[-1].append(token)
        inside = flag
    assert [tokenizer.decode(answer) for answer in answers] == ["three</s>", "five six</s>"]
    # What comes before the first answer is tokenized as for inference.
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids


def test_chats_are_found_by_their_field(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    documents = load_documents(str(path), "train", DataConfig(str(path)), make_tokenizer())
    ids, counted = documents.piece(0, 0, 999)
    assert not documents.all_counted and (ids.tolist(), counted.tolist()) == chat_tokens(make_tokenizer(), CHAT)


CHANGING = "{% for m in messages %}{{ loop.length if m.role == 'system' else '' }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (CHAT[:2], None, "must have an answer"),
        (CHAT[2:3], None, "must have an answer"),
        (CHAT, "", "has no chat template"),
        (CHAT, CHANGING, "renders the beginning of a conversation differently"),
        ([{"role": "user", "content": 3}], None, r"messages\[0\].content \(3\) must be a string"),
    ],
)
def test_conversations_that_cannot_be_used_are_refused(messages, template, message):
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        chat_tokens(tokenizer, messages)


@pytest.mark.parametrize(
    ("name", "text", "changes", "message"),
    [
        ("missing.txt", None, {}, "missing.txt cannot be read: there is no such file or folder"),
        ("rows.csv", "a\n", {}, "a file must be one of .json, .jsonl, .parquet, .txt"),
        ("rows.jsonl", '{"body": "x"}\n', {}, 'has no field "text"; it has body'),
        ("rows.jsonl", '{"text": 3}\n', {}, "row 0 of .*: a text must be a string, not int"),
        ("rows.jsonl", '{"text": "x"}\n', {"kind": "chat"}, 'has no field "messages"'),
    ],
)
def test_sources_that_cannot_be_used_are_refused(tmp_path, name, text, changes, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_documents(str(path), "train", DataConfig(str(path), **changes), make_tokenizer())
