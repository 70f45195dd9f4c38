"""teachers.clip_tokenizer: ids against recorded public ones, the cleaning of text, and files that are no vocabulary."""

import gzip

import numpy as np
import pytest
import torch

from errors import UserError
from teachers import clip_tokenizer
from teachers.clip_tokenizer import CONTEXT_LENGTH, ClipTokenizer, byte_letters, clean_text, split_words


@pytest.fixture(scope="module")
def tokenizer(shared_data) -> ClipTokenizer:
    return ClipTokenizer(shared_data / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz")


@pytest.mark.parametrize("name", ["clip_vit_b32", "clip_vit_b16"])
def test_the_released_models_own_ids(tokenizer, golden, name):
    arrays, meta = golden(name)
    ids = tokenizer(meta["texts"])
    assert ids.dtype == torch.int64 and np.array_equal(ids.numpy(), arrays["tokens"])


def test_ids_of_many_kinds_of_text(tokenizer, golden):
    """Prompts, scripts, emoji, numbers, quotes, entities, control characters and noise, by a public tokenizer."""
    arrays, meta = golden("clip_tokens")
    ends = arrays["counts"].cumsum()
    for text, end, count in zip(meta["texts"], ends, arrays["counts"], strict=True):
        assert tokenizer.encode(text) == arrays["ids"][end - count : end].tolist(), ascii(text)
    assert len(ends) > 500 and (arrays["counts"] > CONTEXT_LENGTH).any()


def test_decoding_gives_the_cleaned_words_back(tokenizer):
    text = "A Photo of 2 naïve café-dogs, 日本 \U0001f600!"
    row = tokenizer([text])[0].tolist()
    assert row[0] == tokenizer.start_id == 49406 and max(row) == tokenizer.end_id == 49407
    assert tokenizer.decode(row) == " ".join(split_words(clean_text(text)))
    assert tokenizer.decode(tokenizer.encode("")) == "" == tokenizer.decode([])
    broken = tokenizer.decode([tokenizer.ids[byte_letters()[0xE2] + "</w>"]])  # the first byte of a longer character
    assert broken == "\N{REPLACEMENT CHARACTER}"


def test_every_id_has_one_piece(tokenizer):
    assert len(tokenizer.pieces) == len(set(tokenizer.pieces)) == 49408
    assert sorted(byte_letters()) == list(range(256)) and len(set(byte_letters().values())) == 256


def test_long_text(tokenizer):
    fits = " ".join(["dog"] * 75)
    ids = tokenizer([fits, "dog"])
    assert ids.shape == (2, 77) and ids[0, -1] == tokenizer.end_id and (ids[1, 3:] == 0).all()
    with pytest.raises(UserError, match=r"text 'dog dog .*\.\.\.': 76 tokens, expected at most 75"):
        tokenizer([fits + " dog"])
    assert torch.equal(tokenizer([fits + " dog"], truncate=True)[0], ids[0])
    assert tokenizer([]).shape == (0, 77)


def test_special_ids_written_out(tokenizer):
    assert tokenizer.encode("<|StartOfText|>dog<|endoftext|>") == [49406, *tokenizer.encode("dog"), 49407]


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  A \t\n b\u00a0c ", "a b c"),
        ("&lt;R&amp;amp;D&gt;", "<r&d>"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u2018a\u2019 \u201cb\u201d", "'a' \"b\""),
        ("\ufb01n \uff21\uff11", "fin a1"),
        ("a\x00\x1b\ufeffb", "ab"),
        ("half \ud83d", "half \ufffd"),
        ("", ""),
    ],
)
def test_clean_text(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.parametrize(
    "text, words",
    [
        ("don't run 12!", ["don", "'t", "run", "1", "2", "!"]),
        ("('s')", ["('", "s", "')"]),  # a contraction starts a word, it does not cut one
        ("we'll'd", ["we", "'ll", "'d"]),
        ("a_b", ["a", "_", "b"]),
        ("½Ⅷ", ["½", "Ⅷ"]),
        ("\u0627 \u4e00\u4e8c", ["\u0627", "\u4e00\u4e8c"]),
        (" ", []),
    ],
)
def test_split_words(text, words):
    assert split_words(text) == words


def test_no_vocabulary_says_how_to_fetch_it(tmp_path):
    with pytest.raises(UserError, match=r"none.txt.gz: no such file.*`python -m datasets.download clip_vocabulary`"):
        ClipTokenizer(tmp_path / "none.txt.gz")
    assert str(clip_tokenizer.VOCABULARY_PATH) == "data/clip/bpe_simple_vocab_16e6.txt.gz"


MERGES = b"header\na b</w>\n"
WRONG = {
    "empty": (gzip.compress(b""), "0 merges, expected at least 48894"),
    "short": (gzip.compress(MERGES), "expected two pieces"),
    "cut": (gzip.compress(np.random.default_rng(0).bytes(9000))[:4000], "ended before"),
    "plain": (MERGES, "Not a gzipped file"),
    "not text": (gzip.compress(b"\xff\xfe" * 9), "can't decode"),
    "three parts": (gzip.compress(b"header\na b c\n"), ":2: 'a b c', expected two pieces"),
    "unknown parts": (gzip.compress(b"header\n" + b"ab c\n" * 48_894), ":2: 'ab' 'c' does not follow"),
    "twice": (gzip.compress(b"header\n" + b"a b\n" * 48_894), ":3: 'a' 'b' does not follow"),
    "bomb": (gzip.compress(bytes(20 << 20)), "unpacks to more than"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_vocabulary(tmp_path, case):
    path = tmp_path / "words.txt.gz"
    path.write_bytes(WRONG[case][0])
    with pytest.raises(UserError, match=WRONG[case][1]) as caught:
        ClipTokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="directory"):
        ClipTokenizer(tmp_path)
