"""LongBench's metrics (Bai et al., arXiv 2308.14508), by their definitions. All are in [0, 1]."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from d2o_dist.eval.metrics.rouge import f_measure, lcs_members

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
# Punctuation of Chinese text, full-width forms among it.
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_CODE_NOISE = ("`", "#", "//")

Metric = Callable[[str, str, Sequence[str]], float]


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and runs of white space."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def token_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """F-measure of two bags of tokens."""
    overlap = sum((Counter(predicted) & Counter(expected)).values())
    return f_measure(overlap, len(predicted), len(expected))


def qa_f1(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Token F1 of normalised English."""
    return token_f1(normalise(text).split(), normalise(answer).split())


def cut_chinese(text: str) -> list[str]:
    """The words of a Chinese text.

    Raises:
        ImportError: jieba is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise ImportError("the metrics of Chinese tasks need jieba: pip install jieba") from error
    return list(jieba.cut(text, cut_all=False))


def qa_f1_zh(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Token F1 of Chinese words, letter case and punctuation aside."""
    drop = set(string.punctuation) | set(_CHINESE_PUNCTUATION)

    def tokens(value: str) -> list[str]:
        words = ("".join(c for c in word.lower() if c not in drop and not c.isspace()) for word in cut_chinese(value))
        return [word for word in words if word]

    return token_f1(tokens(text), tokens(answer))


def rouge_l(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over sentences, as LongBench has it: sentences end at full stops; of every pair of an expected and a
    predicted sentence the words of a longest common subsequence are collected; precision and recall count different
    words."""
    predicted, expected = ([part.split() for part in value.split(".") if part] for value in (text, answer))
    union: set[str] = set()
    for theirs in expected:
        for mine in predicted:
            union |= lcs_members(theirs, mine)
    num_predicted, num_expected = (len({word for part in parts for word in part}) for parts in (predicted, expected))
    return f_measure(len(union), num_predicted, num_expected)


def rouge_l_zh(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of Chinese words."""
    return rouge_l(" ".join(cut_chinese(text)), " ".join(cut_chinese(answer)))


def classification(text: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of class names in the text, if the right one is among them. Names that are part of the right
    name do not count against it."""
    named = [name for name in classes if name in text and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def _share(numbers: Sequence[str], right: str) -> float:
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def _retrieval(text: str, answer: str, pattern: str) -> float:
    found = re.search(pattern, answer)
    if found is None:
        raise ValueError(f"the answer of a retrieval row names no paragraph: {answer!r}")
    return _share(_NUMBER.findall(text), found.group(1))


def retrieval(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the text that are the number of the paragraph."""
    return _retrieval(text, answer, r"Paragraph (\d+)")


def retrieval_zh(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same for Chinese answers."""
    return _retrieval(text, answer, r"段落(\d+)")


def count(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the text that are the right count."""
    return _share(_NUMBER.findall(text), answer)


def code_similarity(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Likeness of the first line of code to the right line, in whole percent."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _CODE_NOISE)), "")
    if not line or not answer:
        return float(line == answer)
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def best(metric: Metric, text: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """The best score over the accepted answers."""
    return max((metric(text, answer, classes) for answer in answers), default=0.0)
