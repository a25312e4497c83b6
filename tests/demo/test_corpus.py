"""The essays as files to train on: nothing lost, nothing in both."""

from launch.demo import corpus


def test_texts_are_cut_between_paragraphs(tmp_path, monkeypatch):
    text = "\n\n".join(f"paragraph {number} " + "word " * 20 for number in range(100))
    monkeypatch.setattr(corpus, "essays", lambda: text)
    folder = corpus.prepare_corpus(tmp_path / "corpus")
    train, held_out = ((folder / f"{name}.txt").read_text() for name in ("train", "validation"))
    assert train + "\n\n" + held_out == text
    assert 0.84 < len(train) / len(text) < 0.88
    assert corpus.prepare_corpus(tmp_path / "corpus") == folder
    assert sorted(path.name for path in folder.iterdir()) == ["train.txt", "validation.txt"]
