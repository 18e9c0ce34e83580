"""Test retrieval sequences: lengths, places of answers, seeds, filler, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from indexcache.data import Batch, digest_of, make_batches, seen_in
from indexcache.data.retrieval import parse_kinds, retrieval_batches
from indexcache.data.tasks import KINDS, NOUNS
from indexcache.models.lm import counted_losses, found_answers, hidden_states, token_losses
from indexcache.vacuity import share_of
from tests.support import documents, refused


def characters(text: str) -> list[int]:
    return [min(ord(c), 127) for c in text]


def text_of(ids) -> str:
    return "".join(map(chr, ids))


def made(kinds=("all",), encode=characters, **changes):
    settings = {"length": 2500, "sequences": 2} | changes
    return retrieval_batches(encode, 128, kinds, **settings)


@pytest.fixture(scope="module")
def words():
    """The packaged tokenizer, which joins characters and spaces to words."""
    from importlib import resources

    file = resources.files("indexcache") / "assets" / "tiny" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    return tokenizer, lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_facts(kind):
    for batch in made([kind], sequences=3, batch=2):
        for row, spans, counted in zip(batch.ids, batch.answers, batch.counted, strict=True):
            text = text_of(row)
            assert len(text) == 2500
            assert spans
            assert spans[-1][1] == 2500
            assert counted.nonzero()[:, 0].tolist() == [i for a, b in spans for i in range(a, b)]
            for start, stop in spans:
                check_answer(kind, text, text[:start], text[start:stop].strip())


def check_answer(kind: str, text: str, before: str, answer: str) -> None:
    question = before[before.rindex("\n") + 1 :]
    if kind == "graph":
        walk = [question.removeprefix("Walk: ").removesuffix(" ->"), *answer.split(" -> ")]
        assert len(walk) == 4
        assert all(f"\n{a} -> {b}\n" in before for a, b in itertools.pairwise(walk))
    elif kind.endswith("words"):
        facts = [line for line in before.splitlines() if line.startswith("Words: ")]
        listed = [w for line in facts for w in line.removeprefix("Words: ").split(", ")]
        counts = sorted({(-listed.count(w), w) for w in listed})
        place = ["The most", "The second", "The third"].index(" ".join(question.split()[:2]))
        assert counts[place][1] == answer
        assert counts[place][0] < counts[place + 1][0]  # There is no tie.
    elif kind == "variables":
        name = question.removeprefix("The value of VAR ").removesuffix(" is")
        while not name.isdigit():
            definition = before.index(f"VAR {name} = ")
            name = before[definition:].split("\n")[0].split(" = ")[1].removeprefix("VAR ")
        assert name == answer
    elif kind == "repeat":
        asked = before[before.rindex("User: Repeat the ") :].split()
        nth = ["first", "second", "third", "fourth"].index(asked[3])
        request = f"User: Write a {asked[4]} about the {asked[7]}\nAssistant: "
        assert before.split(request)[nth + 1].split("\n")[0] == answer
    else:
        assert answer in before[: before.rindex("\n")]


def test_any_length_is_exact_in_a_tokenizer_of_words(words):
    tokenizer, encode = words
    for length in (701, 1024, 4096):
        batches = retrieval_batches(encode, 4096, ["all"], length=length, sequences=1)
        assert [tuple(b.ids.shape) for b in batches] == [(1, length)] * len(KINDS)
        assert [b.domain for b in batches] == [f"retrieval:{kind}" for kind in KINDS]
        for b in batches:
            (start, stop), row = b.answers[0][0], b.ids[0].tolist()
            answer, before = tokenizer.decode(row[start:stop]), tokenizer.decode(row[:start])
            assert answer.startswith(" ")
            assert before.split()[-1] in ("is", "=", "->", "Assistant:")


def test_seed_split_and_kind_decide_everything():
    assert digest_of(made()) == digest_of(made())
    others = [made(seed=1), made(split="calibration"), made(split="heldout"), made(length=2501)]
    assert len({digest_of(b) for b in [made(), *others]}) == 5
    # What one kind gives does not depend on the others, nor on the size of a batch.
    alone = made(["graph"], batch=2)[0].ids
    together = [b.ids for b in made() if b.domain == "retrieval:graph"]
    assert torch.equal(alone, torch.cat(together))
    assert parse_kinds(["graph", "passkey", "graph"]) == ("passkey", "graph")
    assert parse_kinds(["all"]) == tuple(KINDS)


def test_a_single_fact_lies_at_evenly_spread_depths():
    texts = [text_of(b.ids[0]) for b in made(["passkey"], sequences=8)]
    places = [text.index("The pass key is") / 2500 for text in texts]
    assert [int(8 * p / 0.95) for p in places] == list(range(8))


def test_filler_is_the_users_text_and_counts_as_seen():
    docs = documents(count=4, length=2000)
    for batch in made(["passkey", "repeat"], documents=docs):
        assert {d.digest for d in docs} & set(batch.digests)
        ids = batch.ids[0].numpy()
        row = " ".join(map(str, ids))
        assert any(" ".join(map(str, d.ids[300:340])) in row for d in docs)
        assert seen_in([batch]).digests >= {d for d in batch.digests if d}
    refused(lambda: made(documents=docs[:1]), "2000 tokens", "give more text")


def test_bad_input_is_refused_in_one_sentence():
    refused(lambda: made(["needle"]), "'needle' is no kind", "needles, key-value")
    refused(lambda: made(length=150), "needs sequences of at least", "not 150")
    refused(lambda: made(sequences=0), "sequences must be at least 1")
    refused(lambda: made(split="test"), "not 'test'")
    refused(lambda: made(encode=lambda t: [9 if c.isdigit() else ord(c) for c in t]), "same tokens")
    refused(lambda: made(encode=lambda t: [999 for _ in t]), "token id 999 is outside")
    refused(lambda: made(encode=lambda t: []), "tokens")


def test_losses_of_the_tokens_that_count_are_those_of_all_losses(glm):
    batch = make_batches(documents(), length=64, sequences=4, batch=2)[0]
    counted = torch.zeros(batch.ids.shape, dtype=torch.bool)
    counted[0, 40:44] = counted[1, 1] = counted[1, 63] = True
    with torch.no_grad():
        hidden = hidden_states(glm, batch.ids)
        best = glm.get_output_embeddings()(hidden).argmax(-1)[:, :-1]
    losses, right = counted_losses(glm, hidden, batch.ids, counted)
    every = token_losses(glm, hidden, batch.ids)[counted[:, 1:]]
    torch.testing.assert_close(losses, every, atol=1e-5, rtol=1e-5)
    assert torch.equal(right, (best == batch.ids[:, 1:])[counted[:, 1:]])
    everything = torch.ones_like(counted)
    refused(lambda: Batch(batch.ids, "d", ("a", "b"), (), only=everything), "the first token")
    refused(lambda: Batch(batch.ids, "d", ("a", "b"), (), only=counted[:1]), "(1, 64)")


def test_an_answer_is_found_if_all_its_tokens_are():
    counted = torch.zeros(2, 9, dtype=torch.bool)
    counted[0, 2:6] = counted[1, 5:9] = True
    right = [True, True, True, False, False, True, True, True]
    found = found_answers(right, counted, [[(2, 4), (4, 6)], [(5, 6), (6, 9)]])
    assert found.tolist() == [1, 1]
    assert found_answers([True] * 8, counted, [[(2, 4), (4, 6)], [(5, 9)]]).tolist() == [2, 1]


def test_only_counted_tokens_decide_what_share_is_seen():
    ids = torch.zeros(1, 100, dtype=torch.int64)
    late = Batch(ids, "d", ("a",), ("a",), answers=(((90, 100),),))
    assert not late.plain
    assert share_of([late], 80).beyond == 1.0
    plain = Batch(ids, "d", ("a",), ("a",))
    assert plain.plain
    assert share_of([plain], 80).beyond == 0.2
    assert digest_of([late]) != digest_of([plain])


def test_words_are_different_ones():
    assert len(set(NOUNS)) == len(NOUNS)
    assert all(np.char.islower(NOUNS))


def test_a_model_makes_its_own_sequences(tiny):
    batches = tiny.retrieval(["passkey"], "calibration", split="calibration", sequences=2)
    assert [tuple(b.ids.shape) for b in batches] == [(1, 1024)] * 2
    assert len(batches[0].digests) > 1
    again = tiny.retrieval(["passkey"], length=1024, sequences=2, split="calibration")
    assert batches[0].answers == again[0].answers
    assert len(again[0].digests) == 1  # Generated filler is no document.
    refused(lambda: tiny.retrieval(["passkey"], length=64), "use at least 128 tokens")
