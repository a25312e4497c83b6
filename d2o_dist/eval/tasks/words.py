"""Plain English words that synthetic tasks are made of, and identifiers drawn from a seeded generator."""

from __future__ import annotations

import random
import string

ADJECTIVES = """
able ancient angry autumn bitter black blue bold brave brief bright broad broken brown busy calm careful cheap cheerful
clean clear clever cold cool crisp crooked curious dark deep dry dusty eager early eastern easy empty faint fair false
famous fast firm flat fond fresh frozen full gentle giant glad golden grand grateful gray green happy hard heavy hidden
high hollow honest hungry icy idle jolly keen kind large late lazy light little lively lonely long loose loud lucky
lively mild modern narrow neat nervous noble noisy northern odd old pale patient plain polite proud quick quiet rapid
rare ready red rich rough round royal rusty sharp short shy silent silver simple slim slow small smooth soft solid
southern spare square steady steep still stormy strange strong subtle sudden sunny sweet swift tall tame thick thin tidy
tiny tired tough vast warm weak western wide wild wise young
""".split()

NOUNS = """
acorn airport anchor apple apron arrow badge bakery balcony banjo barrel basket beacon beard bench berry blanket bottle
bridge broom bucket button cabin cactus camel camera candle canyon carpet castle cellar chalk cherry chimney circle
clock cloud coffee compass copper corner cotton cradle crayon cricket crystal curtain daisy desert dolphin donkey drawer
drum eagle elbow engine falcon feather fence fiddle forest fountain garden garlic gate giraffe glacier glove goose
granite guitar hammer harbor harvest helmet hill honey horse island ivory jacket jungle kettle kitchen ladder lagoon
lantern lemon library lizard locket lumber magnet mango maple marble market meadow melon mirror mitten monkey mountain
mustard napkin needle nest oasis oatmeal ocean olive onion orchard otter oven owl paddle palace parrot pebble pencil
pepper piano pillow pilot planet plum pocket pond potato pumpkin puzzle quarry quilt rabbit radish railway ribbon river
rocket saddle sailor salad salmon sandal saucer scarf shelter shovel spider spoon squirrel statue stove summit swan
table teapot temple thimble thunder ticket tiger timber tomato tower tractor trumpet tulip tunnel turtle umbrella valley
velvet village violin wagon walnut walrus whistle willow window winter zebra
""".split()


def plain_words(count: int, rng: random.Random) -> list[str]:
    """`count` different words: single ones in random order, then pairs such as `quiet-harbor`.

    Raises:
        ValueError: more than there are.
    """
    singles = sorted(set(ADJECTIVES) | set(NOUNS))
    rng.shuffle(singles)
    if count <= len(singles):
        return singles[:count]
    pairs = [f"{adjective}-{noun}" for adjective in sorted(set(ADJECTIVES)) for noun in sorted(set(NOUNS))]
    if count > len(singles) + len(pairs):
        raise ValueError(f"{count} different words are wanted; there are {len(singles) + len(pairs)}")
    return singles + rng.sample(pairs, count - len(singles))


def word_pairs(count: int, rng: random.Random) -> list[str]:
    """`count` different `adjective-noun` keys."""
    adjectives, nouns = sorted(set(ADJECTIVES)), sorted(set(NOUNS))
    places = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[place // len(nouns)]}-{nouns[place % len(nouns)]}" for place in places]


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def uuid(rng: random.Random) -> str:
    """A random identifier in the form of a UUID."""
    text = f"{rng.getrandbits(128):032x}"
    return "-".join([text[:8], text[8:12], text[12:16], text[16:20], text[20:]])


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """Random letters."""
    return "".join(rng.choice(alphabet) for _ in range(count))
