"""RULER's two counting tasks: the common words of a numbered list, and the frequent words of a coded text."""

from __future__ import annotations

import random

from d2o_dist.eval.tasks.ruler_parts import Draft, Material
from d2o_dist.eval.tasks.words import ADJECTIVES, NOUNS, letters, plain_words

NUM_COMMON = 10
# (occurrences of a common word, of another one): RULER's, and fewer where a short prompt could not hold them.
LONG, SHORT = (30, 3), (10, 1)
LONG_FROM = 4096

ZIPF_EXPONENT = 2.0
NUM_FREQUENT = 3
CODE_LETTERS = 6
_MOST_CODED = 1_000_000


def numbered_list(common: list[str], others: list[str], times: tuple[int, int], rng: random.Random) -> str:
    """All words so many times, shuffled and numbered."""
    words = common * times[0] + others * times[1]
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def draft_common_words(material: Material, rng: random.Random) -> Draft:
    """A piece is one more word that is not common. Before the list stands a short solved example of another one."""
    times = LONG if material.length >= LONG_FROM else SHORT
    most = len(set(ADJECTIVES)) * len(set(NOUNS)) // 2
    words = plain_words(most + NUM_COMMON, rng)
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    shown = plain_words(NUM_COMMON + 10, rng)
    listed = numbered_list(shown[:NUM_COMMON], shown[NUM_COMMON:], (3, 1), rng)
    seed = rng.getrandbits(64)

    def answer(names: list[str]) -> str:
        return " ".join(f"{number}. {word}" for number, word in enumerate(names, start=1))

    def make(count: int) -> tuple[str, str, list[str]]:
        body = numbered_list(common, others[:count], times, random.Random(seed))
        return body, f"Which {NUM_COMMON} words occur most often in the list above?", common

    return Draft(
        instruction=(
            f"In a numbered list of words some words occur more often than others. Example. {listed} The {NUM_COMMON} "
            f"most common words are: {answer(shown[:NUM_COMMON])}\n\nThe list:"
        ),
        make=make,
        most=most,
        prefix=f" The {NUM_COMMON} most common words in the list are:",
    )


def zipf_counts(total: int, vocabulary: int) -> list[int]:
    """Occurrences of the words of rank 1, 2, ... among about `total`, falling as `rank ** -ZIPF_EXPONENT`."""
    weights = [rank**-ZIPF_EXPONENT for rank in range(1, vocabulary + 1)]
    scale = total / sum(weights)
    return [round(weight * scale) for weight in weights]


def draft_frequent_words(material: Material, rng: random.Random) -> Draft:
    """A piece is one more word of the text. The most frequent of all is `...`, which does not count."""
    vocabulary = max(16, material.length // 50)
    coded: list[str] = []
    while len(coded) < vocabulary:
        word = letters(rng, CODE_LETTERS)
        coded += [word] if word not in coded else []
    seed = rng.getrandbits(64)

    def make(count: int) -> tuple[str, str, list[str]]:
        counts = zipf_counts(count, vocabulary + 1)
        words = [word for word, times in zip(["...", *coded], counts, strict=True) for _ in range(times)]
        random.Random(seed).shuffle(words)
        question = f"Without the dots (...), which {NUM_FREQUENT} coded words occur most often in the text above?"
        return " ".join(words), question, coded[:NUM_FREQUENT]

    return Draft(
        instruction="The text below is coded. Count how often each coded word occurs in it.",
        make=make,
        most=_MOST_CODED,
        # With fewer words the third and the fourth rank are not told apart by at least two occurrences.
        least=60,
        prefix=f" The {NUM_FREQUENT} most frequent coded words are:",
    )
