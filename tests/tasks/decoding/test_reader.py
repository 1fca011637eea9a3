"""Text while tokens come: pieces that together are the answer's text, and never a character taken back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mtserve.tasks.decoding import Reader
from mtserve.tasks.decoding.stops import until_stop
from tests.tasks.decoding.drive import TOKENIZER
from tests.tiny import VOCAB

TEXTS = st.text(alphabet="ab cé🙂👩🏽‍🚀سلام عليكم🇵🇹\n", max_size=24)
STOPS = st.lists(st.text(alphabet="ab cé🙂س", min_size=1, max_size=4), max_size=3)


@cache
def byte_level() -> Tokenizer:
    """One token a byte, and a few merges, as GPT-2 has them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "c"), ("Ã", "©"), ("ð", "Ł")]
    vocab = {piece: at for at, piece in enumerate([*letters, *(left + right for left, right in merges)])}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def read(decode: Callable[[list[int]], str], ids: list[int], stops: list[str], sizes: list[int]) -> tuple[str, int]:
    """What a reader says of these ids, fed as many at once as `sizes` says, and how many tokens the answer has."""
    made = next((n for n in range(1, len(ids) + 1) if until_stop(decode(ids[:n]), stops)[1]), len(ids))
    reader, pieces, at = Reader(decode, stops), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        tokens = ids[at : min(at + size, made)]
        fed = reader.feed(tokens)
        assert len(fed) == len(tokens)
        pieces += fed
        at += size
        assert until_stop(decode(ids[:made]), stops)[0].startswith("".join(pieces))
        assert not any("\ufffd" in piece for piece in fed) or "\ufffd" in decode(ids[:made]).rstrip("\ufffd")
    assert len(pieces) == made
    return "".join(pieces) + reader.flush(), made


@settings(deadline=None, max_examples=300)
@given(text=TEXTS, stops=STOPS, sizes=st.lists(st.integers(1, 5), max_size=9))
def test_bytes_of_whole_characters(text: str, stops: list[str], sizes: list[int]) -> None:
    decode = byte_level().decode
    ids = byte_level().encode(text).ids
    said, made = read(decode, ids, stops, sizes)
    assert said == until_stop(decode(ids[:made]), stops)[0]
    if not stops:
        assert said == text


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 259), max_size=24), stops=STOPS, sizes=st.lists(st.integers(1, 5), max_size=9))
def test_any_bytes(ids: list[int], stops: list[str], sizes: list[int]) -> None:
    said, made = read(byte_level().decode, ids, stops, sizes)
    assert said == until_stop(byte_level().decode(ids[:made]), stops)[0]


@settings(deadline=None, max_examples=200)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), max_size=16),
    stops=st.lists(st.text(alphabet="adeo .", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=9),
    clean=st.booleans(),
)
def test_word_pieces(ids: list[int], stops: list[str], sizes: list[int], clean: bool) -> None:
    made = Tokenizer.from_str(TOKENIZER.to_str())
    made.decoder = decoders.WordPiece(cleanup=clean)
    said, number = read(made.decode, ids, stops, sizes)
    assert said == until_stop(made.decode(ids[:number]), stops)[0]


def test_what_may_begin_a_stop_string_waits() -> None:
    decode = byte_level().decode
    reader = Reader(decode, ["ccb", "\n"])
    assert reader.feed(byte_level().encode("xcca").ids) == ["x", "", "", "cca"]
    assert reader.feed(byte_level().encode("cc").ids) == ["", ""]
    assert reader.flush() == "cc"
    stopped = Reader(decode, ["ccb"])
    assert stopped.feed(byte_level().encode("xccb").ids) == ["x", "", "", ""]
    assert stopped.flush() == ""


def test_a_decoder_that_takes_back() -> None:
    """Byte fallback shows a run of bytes as a whole: nothing is said while it is broken, and nothing twice."""
    texts = {1: "é", 2: "\ufffd\ufffd\ufffd", 3: "é🙂"}
    reader = Reader(lambda ids: texts[len(ids)])
    assert reader.feed([7, 8, 9]) == ["é", "", "🙂"]
    assert reader.flush() == ""
