"""Stop strings that hold special tokens: with real tokenizers, token by token, and through whole runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from d2o_dist.cli import infer
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.loop import generate
from d2o_dist.engine.text import TextStream, decode_tokens
from tests.engine.tiny import make_folder, make_tokenizer, request

END, PLAIN = "<|im_end|>", "<|call|>"


def byte_level():
    """`<|im_end|>` is special by being added so, without a role; `<|call|>` is added, but not special."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(PLAIN, special=False, normalized=False)])
    return tokenizer


def leading_space():
    """As sentencepiece does it: a word has its space in front, which decoding drops where the text begins."""
    words = ["<s>", "</s>", "\u2581", *[f"\u2581{word}" for word in ("a", "fox", "jumps", "over")], "s", "x", ":", "\n"]
    raw = Tokenizer(models.Unigram([(word, -float(i + 1)) for i, word in enumerate(words)], unk_id=2))
    raw.normalizer = normalizers.Sequence([])
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=False)], special_tokens=True)
    return tokenizer


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: letters."""

    def __init__(self, **kwargs):
        self._known = {"<s>": 0, "</s>": 1, **{letter: 2 + n for n, letter in enumerate("abcdefgh ")}}
        super().__init__(bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self._known)

    def get_vocab(self):
        return dict(self._known)

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._known.get(token, 2)

    def _convert_id_to_token(self, index):
        return next(token for token, i in self._known.items() if i == index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def in_python():
    tokenizer = Letters()
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def ids_of(tokenizer, *parts) -> list[int]:
    """Token ids of pieces of text, each special token a piece of its own."""
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    found = []
    for part in parts:
        found += [special[part]] if part in special else tokenizer(part, add_special_tokens=False)["input_ids"]
    return found


def run(tokenizer, stop, ids) -> tuple[str, int, bool]:
    """The text, how many tokens it took, and whether it stopped; what is shown on the way is the text."""
    stream, shown, used = TextStream(tokenizer, stop), "", 0
    for token in ids:
        shown, used = shown + stream.push(token), used + 1
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == stream.text
    return stream.text, used, stream.stopped


@pytest.mark.parametrize(
    ("stop", "parts", "text", "stopped"),
    [
        ([END], ["a fox", END, " jumps"], "a fox", True),
        (["</s>"], ["a fox", "</s>", "x"], "a fox", True),
        # Text and special tokens together, in both orders and around.
        ([f"x{END}"], ["a fox", END, " jumps"], "a fo", True),
        ([f"{END} ju"], ["a fox", END, " jumps"], "a fox", True),
        ([f"x{END} ju"], ["a fox", END, " jumps"], "a fo", True),
        ([f"{END}</s>"], ["a", "</s>", END, "x", END, "</s>", "x"], "ax", True),
        # Not there, or not as a whole.
        ([f"y{END}"], ["a fox", END, " jumps"], "a fox jumps", False),
        ([f"x{END}"], ["a fox", "</s>", END, " jumps"], "a fox jumps", False),
        (["<|im", "end|>", "|"], ["a fox", END, " jumps"], "a fox jumps", False),
        # Others are found across special tokens, as the text has them.
        (["x jumps", f"{END}{END}"], ["a fox", END, " jumps"], "a fo", True),
        # The earliest place counts.
        (["fox", END], ["a fox", END], "a ", True),
        ([f"ox{END}", "fox jumps", f"fox{END}"], ["a fox", END, " jumps"], "a ", True),
        # Spelt out in ordinary tokens, and an added token that is not special.
        ([END], ["a ", "<", "|im_", "end", "|>", "x"], "a ", True),
        ([PLAIN], ["a fox", PLAIN, "x"], "a fox", True),
        ([f"{PLAIN}{END}"], ["a fox", PLAIN, END, "x"], "a fox", True),
        # Characters of several tokens in front of it, whole and broken.
        ([END], ["東京", END, "x"], "東京", True),
        ([f"京{END}"], ["東京", END, "x"], "東", True),
    ],
)
def test_stops_of_a_byte_level_tokenizer(stop, parts, text, stopped):
    tokenizer = byte_level()
    found, _, met = run(tokenizer, stop, ids_of(tokenizer, *parts))
    assert (found, met) == (text, stopped)


def test_it_stops_at_the_token_that_completes_it():
    tokenizer = byte_level()
    head, tail = ids_of(tokenizer, "a fox", END), ids_of(tokenizer, " jumps over")
    assert run(tokenizer, [END], head + tail) == ("a fox", len(head), True)
    assert run(tokenizer, [f"{END} "], head + tail)[1] == len(head) + 1


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [f"fox{END}x"])
    pieces = [stream.push(token) for token in ids_of(tokenizer, "a ", "f", "o", "x")]
    assert "".join(pieces) == "a "
    assert [stream.push(token) for token in ids_of(tokenizer, END)] == [""]
    assert stream.push(*ids_of(tokenizer, "y")) == "foxy" and not stream.stopped


def test_half_a_character_before_a_special_token():
    """It is never completed; what comes later is read as before."""
    tokenizer = byte_level()
    first, *_ = ids_of(tokenizer, "東")
    text, count, stopped = run(tokenizer, [END], [*ids_of(tokenizer, "a"), first, *ids_of(tokenizer, END)])
    assert stopped and text == decode_tokens(tokenizer, [*ids_of(tokenizer, "a"), first])
    assert run(tokenizer, [END], [first, 1, *ids_of(tokenizer, " fox")])[0].endswith(" fox")


def test_a_tokenizer_with_leading_spaces():
    tokenizer = leading_space()
    word = {w: tokenizer.convert_tokens_to_ids(w) for w in ("\u2581a", "\u2581fox", "s", ":", END, "</s>")}
    a, fox, s, colon, end, eos = word.values()
    assert tokenizer.decode([end, a, fox]) == f"{END} a fox", "the case that this test is about"
    assert run(tokenizer, [END], [a, fox, end, a]) == ("a fox", 3, True)
    assert run(tokenizer, [f"fox{END} a"], [a, fox, end, a]) == ("a ", 4, True)
    # Where the text begins its space is dropped, but not after a special token.
    assert run(tokenizer, [f"{END} a"], [end, a, fox]) == ("", 2, True)
    assert run(tokenizer, [f"{END} a fox:"], [end, a, fox, s, eos]) == ("a foxs", 5, False)
    assert run(tokenizer, ["</s>"], [end, a, fox, eos, a]) == ("a fox", 4, True)
    assert run(tokenizer, [" a"], [a, fox, end, fox, a]) == ("a fox fox", 5, True)


def test_a_tokenizer_in_python():
    tokenizer = in_python()
    ids = ids_of(tokenizer, "ab", END, "cd", "</s>", "ef")
    assert decode_tokens(tokenizer, ids) == "abcdef"
    assert run(tokenizer, [END], ids) == ("ab", 3, True)
    assert run(tokenizer, ["d</s>e"], ids) == ("abc", 7, True)


def test_a_special_token_that_is_shown_is_text():
    """A tokenizer need not agree with itself on what is special."""

    class Shows(Letters):
        def decode(self, ids, skip_special_tokens=False, **kwargs):
            return super().decode(ids, skip_special_tokens=False, **kwargs)

    tokenizer = Shows()
    ids = ids_of(tokenizer, "ab", "</s>", "cd")
    assert run(tokenizer, ["</s>c"], ids) == ("ab", 4, True)
    assert run(tokenizer, ["</s>a"], ids) == ("ab</s>cd", 5, False)


# ---- whole runs ----------------------------------------------------------------------------------------------------


class Script:
    """A session that says what it is told."""

    device = torch.device("cpu")
    cache = SimpleNamespace(ranks=None)

    def __init__(self, ids, vocabulary: int) -> None:
        self._ids, self._size = list(ids), vocabulary

    def prefill(self, *args):
        return self.decode(None, None)

    def decode(self, tokens, live):
        logits = torch.zeros(1, self._size)
        logits[0, self._ids.pop(0)] = 1
        return logits

    def row_usage(self, row):
        return None


def script(tokenizer, parts, stop, eos=(), ignore_eos=False):
    ids = ids_of(tokenizer, *parts)
    session = Script(ids, len(tokenizer))
    sampling = SamplingConfig(ignore_eos=ignore_eos)
    asked = request(0, ids_of(tokenizer, "a prompt ", END, "</s>"), len(ids), stop)
    (result,) = generate(session, [asked], sampling, tokenizer, eos_ids=frozenset(eos))
    return result.text, result.finish_reason, len(result.tokens)


def test_how_a_row_ends():
    tokenizer = byte_level()
    eos, count = 1, len(ids_of(tokenizer, "a fox"))
    parts = ["a fox", END, " jumps", "</s>", "x"]
    assert script(tokenizer, parts, [END], [eos]) == ("a fox", "stop", count + 1)
    assert script(tokenizer, parts, ["none"], [eos])[1] == "eos"
    # The end-of-sequence token may be part of a stop string, or be one; it may also end nothing by itself.
    assert script(tokenizer, parts, ["s</s>"], [eos])[:2] == ("a fox jump", "stop")
    assert script(tokenizer, parts, ["</s>"], [eos])[:2] == ("a fox jumps", "stop")
    assert script(tokenizer, parts, ["</s>"], [eos], ignore_eos=True)[:2] == ("a fox jumps", "stop")
    # The prompt holds both, the answer neither.
    assert script(tokenizer, ["a fox"], [END, "</s>", f"{END}a"])[1] == "length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that ends its texts with nothing, and says special tokens all the time."""
    folder = make_folder(tmp_path_factory.mktemp("model"), template=False)
    byte_level().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(byte_level()))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def records(folder, tmp_path, rows, *flags) -> list[dict]:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = infer.main(
        ["--model", str(folder), "--prompts", str(prompts), "--output", str(out), "device=cpu", "overwrite=true",
         "sampling.temperature=30.0", "sampling.ignore_eos=true", "sampling.max_new_tokens=200", *flags]
    )  # fmt: skip
    assert code == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_and_settings(folder, tmp_path):
    """At a high temperature any token comes: also the special one, long before 200 tokens are over in some row."""
    prompts = [{"prompt": f"the fox {END} and {n}"} for n in range(8)]
    free = records(folder, tmp_path, prompts, "chat_template=never")
    assert {row["finish_reason"] for row in free} == {"length"}
    by_setting = records(folder, tmp_path, prompts, "chat_template=never", f"sampling.stop=['{END}']")
    by_row = records(folder, tmp_path, [{**row, "stop": END} for row in prompts], "chat_template=never")
    stopped = [row for row in by_setting if row["finish_reason"] == "stop"]
    assert stopped and all(END not in row["text"] for row in by_setting)
    for one, other, whole in zip(by_setting, by_row, free, strict=True):
        assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
        assert whole["text"].startswith(one["text"].rstrip("\ufffd"))
        assert one["finish_reason"] == "length" or one["num_new_tokens"] < 200


def test_until_of_the_harness(folder):
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from d2o_dist.eval.lm_eval import D2OLM

    lm = D2OLM(str(folder), device="cpu", preset="full")
    end = ids_of(lm.tokenizer, END)[0]
    fox, said = ids_of(lm.tokenizer, "fox")[0], []

    def say(module, args, logits):
        said.append(fox if len(said) < 2 else end)
        return torch.zeros_like(logits).index_fill(-1, torch.tensor(said[-1]), 1)

    lm.model.model.lm_head.register_forward_hook(say)
    arguments = {"until": ["\n\n", END], "max_gen_toks": 9}
    (text,) = lm.generate_until([SimpleNamespace(args=(f"a {END} b", arguments))], True)
    assert text == 2 * decode_tokens(lm.tokenizer, [fox]) and said == [fox, fox, end]
