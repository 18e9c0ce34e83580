"""Write the questions of retrieval: facts that lie far apart in a text, and what is asked of them.

A task is text; `indexcache.data.retrieval` makes token ids of it and puts filler between its facts.
The kinds are those by which long-context models are commonly tested (RULER, arXiv 2404.06654;
multi-round co-reference and graph walks). Each is written so that the right answer is one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "river mountain garden window letter engine bridge market island forest castle harbor village "
    "kitchen basket candle mirror pocket ladder hammer pencil bottle carpet curtain blanket "
    "pillow ticket wallet helmet jacket button ribbon needle feather shadow thunder rainbow "
    "desert valley meadow canyon glacier volcano lantern compass anchor rocket planet comet "
    "galaxy crystal diamond copper silver marble velvet cotton leather pepper ginger lemon orange "
    "cherry melon pumpkin carrot onion potato tomato rabbit turtle falcon dolphin tiger monkey "
    "donkey spider beetle lizard piano violin trumpet guitar doctor farmer sailor painter baker "
    "teacher"
)
ADJECTIVES = _words(
    "quiet broken golden distant narrow gentle frozen hidden ancient hollow bitter clever crimson "
    "dusty eager faint giant humble jagged keen little mellow noble odd patient rapid silent tall"
)
VERBS = _words(
    "carries follows crosses watches covers reaches leaves opens paints repairs remembers finds "
    "guards lifts moves passes shakes touches visits warms"
)
NAMES = _words(
    "Adams Baker Clark Davis Evans Foster Green Harris Irving Jones King Lewis Moore Nelson Owens "
    "Parker Quinn Roberts Smith Taylor Underwood Vance Walker Young"
)
FORMS = ("poem", "letter", "story", "list", "speech", "riddle")
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Task:
    """One task, in words.

    Attributes:
        facts: texts that are spread over the filler, in this order.
        questions: (question, answer) pairs that follow each other at the end.
        shown: so many of the first answers are examples and do not count.
    """

    facts: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    shown: int = 0


Writer = Callable[[np.random.Generator, int], Task]


def _some(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))[:count]]


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(map(str, rng.integers(0, 10, count)))


def _shuffled(rng: np.random.Generator, facts: Sequence[str]) -> tuple[str, ...]:
    return tuple(_some(rng, facts, len(facts)))


def passkey(rng: np.random.Generator, size: int) -> Task:
    """Write one line with a key of five digits, which the end asks for."""
    key = _digits(rng, 5)
    fact = f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
    return Task((fact,), (("\n\nWhat is the pass key? The pass key is", f" {key}"),))


def needles(rng: np.random.Generator, size: int) -> Task:
    """Write `size` names with a code; the end asks for up to eight, of which two are shown."""
    names = _some(rng, NAMES, size)
    codes = {n: _digits(rng, 4) for n in names}
    facts = tuple(f"\n\nThe code of {n} is {codes[n]}.\n\n" for n in names)
    asked = _some(rng, names, 8)
    questions = tuple((f"\nThe code of {n} is", f" {codes[n]}") for n in asked)
    return Task(facts, questions, shown=2)


def key_value(rng: np.random.Generator, size: int) -> Task:
    """Write `size` pairs of a key and a value, all words; the end asks for up to eight values."""
    keys: dict[str, str] = {}
    while len(keys) < size:
        first, second, value = _some(rng, NOUNS, 3)
        keys[f"{first} {second}"] = value
    facts = _shuffled(rng, [f"\nNote: {k} = {v}\n" for k, v in keys.items()])
    asked = _some(rng, list(keys), 8)
    return Task(facts, tuple((f"\nRecall: {k} =", f" {keys[k]}") for k in asked), shown=2)


def variables(rng: np.random.Generator, size: int) -> Task:
    """Write `size` chains of variables; the end asks for the value at the end of up to four."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    names: dict[str, None] = {}
    while len(names) < 3 * size:
        names["".join(letters[i] for i in rng.integers(0, len(letters), 3))] = None
    chains = np.array(list(names)).reshape(size, 3)
    values = [_digits(rng, 5) for _ in chains]
    # A variable is defined before another takes its value; the chains are mixed.
    order = rng.permutation(np.repeat(np.arange(size), 3))
    step = [0] * size
    facts = []
    for c in order.tolist():
        right = f"VAR {chains[c][step[c] - 1]}" if step[c] else values[c]
        facts.append(f"\nVAR {chains[c][step[c]]} = {right}\n")
        step[c] += 1
    asked = rng.permutation(size)[:4].tolist()
    questions = tuple((f"\nThe value of VAR {chains[c][2]} is", f" {values[c]}") for c in asked)
    return Task(tuple(facts), questions, shown=1)


def _counted(rng: np.random.Generator, counts: dict[str, int]) -> Task:
    """Write each word as often as it says; the end asks for the three most frequent, in order."""
    listed = _some(rng, [w for w, n in counts.items() for _ in range(n)], sum(counts.values()))
    facts = tuple(f"\nWords: {', '.join(listed[i : i + 8])}\n" for i in range(0, len(listed), 8))
    best = sorted(counts, key=lambda w: -counts[w])[:3]
    asked = ("most frequent", "second most frequent", "third most frequent")
    pairs = zip(asked, best, strict=True)
    return Task(facts, tuple((f"\nThe {a} word is", f" {w}") for a, w in pairs))


def common_words(rng: np.random.Generator, size: int) -> Task:
    """Write three words many times among `size` words that stand there twice."""
    words = _some(rng, NOUNS, size + 3)
    often = dict(zip(words[:3], (3 + size // 2, 3 + size // 3, 3 + size // 6), strict=True))
    return _counted(rng, {w: often.get(w, 2) for w in words})


def frequent_words(rng: np.random.Generator, size: int) -> Task:
    """Write `size` made-up words with frequencies that fall as 1 / rank."""
    letters = "abcdefghijklmnoprstuvw"
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(letters[i] for i in rng.integers(0, len(letters), 4))] = None
    return _counted(rng, {w: max(2 * size // (i + 1), 1) for i, w in enumerate(words)})


def graph(rng: np.random.Generator, size: int) -> Task:
    """Write a graph of `size` nodes with one edge from each; the end walks three steps of it."""
    nodes = _some(rng, NOUNS, size)
    after = {a: nodes[(i + 1) % size] for i, a in enumerate(nodes)}
    facts = _shuffled(rng, [f"\n{a} -> {b}\n" for a, b in after.items()])
    questions = []
    for start in _some(rng, nodes, 4):
        walk = [start]
        for _ in range(3):
            walk.append(after[walk[-1]])
        questions.append((f"\nWalk: {start} ->", " " + " -> ".join(walk[1:])))
    return Task(facts, tuple(questions), shown=1)


def repeat(rng: np.random.Generator, size: int) -> Task:
    """Write `size` requests, some of them several times; the end asks for the n-th answer again."""
    topics = _some(rng, NOUNS, -(-size // 3))
    requests = [(FORMS[i % len(FORMS)], t) for i, t in enumerate(topics)]
    turns = [requests[i % len(requests)] for i in rng.permutation(size).tolist()]
    facts: list[str] = []
    answers: dict[tuple[str, str, int], str] = {}
    for form, topic in turns:
        words = " ".join(_some(rng, NOUNS, 6))
        done = sum(key[:2] == (form, topic) for key in answers)
        answers[form, topic, done] = words
        facts.append(f"\n\nUser: Write a {form} about the {topic}.\nAssistant: {words}\n\n")
    asked = _some(rng, [f"{i}" for i in range(size)], 3)
    questions = []
    for i in map(int, asked):
        form, topic, nth = list(answers)[i]
        question = f"\n\nUser: Repeat the {ORDINALS[nth]} {form} about the {topic}.\nAssistant:"
        questions.append((question, f" {answers[form, topic, nth]}"))
    return Task(tuple(facts), tuple(questions), shown=1)


# Of each kind: how it is written, and the most and the least number of facts.
KINDS: dict[str, tuple[Writer, int, int]] = {
    "passkey": (passkey, 1, 1),
    "needles": (needles, 16, 4),
    "key-value": (key_value, 64, 4),
    "variables": (variables, 12, 2),
    "common-words": (common_words, 24, 6),
    "frequent-words": (frequent_words, 24, 6),
    "graph": (graph, 48, 5),
    "repeat": (repeat, 12, 4),
}


def filler_sentence(rng: np.random.Generator) -> str:
    """Write a sentence that means nothing, for the space between facts."""
    first, second, third = _some(rng, NOUNS, 3)
    one, two = _some(rng, ADJECTIVES, 2)
    verb = VERBS[int(rng.integers(len(VERBS)))]
    return f" The {one} {first} {verb} the {two} {second} near the {third}."
