"""CLIP's tokenizer: text -> ids of merged bytes.

    text ── clean_text ── split_words ── bytes ── merge pairs ── ids, between a start and an end id

Byte-pair encoding (Sennrich et al., arXiv:1508.07909) over bytes (GPT-2), with a mark on the last piece of each word
(Radford et al., arXiv:2103.00020, sec. 2.4). The merges are in a file of 1.4 MB that is not in this repository:
`python -m datasets.download clip_vocabulary`.

Differs from the released tokenizer in the cleaning of text only. The released one calls a library that guesses how to
repair damaged text; clean_text applies fixed rules with Unicode tables and lists what it omits. Class names and prompts
in ordinary writing get the same ids. Letters and numbers are those of Python's Unicode tables, so characters newer than
the interpreter count as neither. The Greek iota below (U+0345), which the released one loses, is kept.
"""

import gzip
import html
import re
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError

VOCABULARY_PATH = Path("data/clip/bpe_simple_vocab_16e6.txt.gz")  # the download command writes it there
FETCH = "python -m datasets.download clip_vocabulary"
MAX_VOCABULARY_BYTES = 16 << 20  # unpacked; the released file has 3.2 MB
NUM_MERGES = 48_894  # CLIP was trained with the first 48,894 of the file's 262,143 merges; 49,408 ids in all
CONTEXT_LENGTH = 77  # ids of a text, start and end included
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"

# Words that are matched before letters are grouped. The written-out special ids are those ids, as in the released code.
FIXED_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)
RUN_OF_KIND = re.compile("L+|N|x+| +")
QUOTES = {**dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'"), **dict.fromkeys(range(0x201C, 0x2020), '"')}
LIGATURES = [0x0132, 0x0133, 0x0149, *range(0x01C4, 0x01CD), *range(0x01F1, 0x01F4), *range(0xFB00, 0xFB07)]
WIDTHS = [0x3000, *range(0xFF01, 0xFFF0)]  # full-width Latin, half-width kana and symbols
CONTROLS = [*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
REPAIRS = {
    **dict.fromkeys(CONTROLS),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),  # half a surrogate pair is not a character
    **QUOTES,
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in LIGATURES + WIDTHS},
    0x0149: "'n",
    0xFB05: "\N{LATIN SMALL LETTER LONG S}t",
}


def clean_text(text: str) -> str:
    """The normalised text that is tokenized: lower case, one space between words. In this order:

    1. HTML entities become characters (twice, as in the released code).
    2. Control characters are removed; curly quotes become straight; Latin ligatures (fi) become letters; full- and
       half-width forms become the usual ones; half a surrogate pair becomes U+FFFD.
    3. Characters are composed (NFC); white space is collapsed and stripped; letters become lower case.

    The released tokenizer also repairs text decoded with the wrong table (mojibake) and recognises the color codes of
    terminals. This one does not.
    """
    text = html.unescape(html.unescape(text))
    text = unicodedata.normalize("NFC", text.translate(REPAIRS))
    return " ".join(text.split()).lower()


def split_words(text: str) -> list[str]:
    """Split into runs of letters, single digits, runs of other characters, and English contractions; drop white space.

    "don't run 12!" -> don 't run 1 2 !
    """
    kinds = "".join(kind_of(character) for character in text)
    words, at = [], 0
    while at < len(text):
        match = FIXED_WORDS.match(text, at) or RUN_OF_KIND.match(kinds, at)
        assert match is not None  # RUN_OF_KIND matches every kind
        if kinds[at] != " ":
            words.append(text[at : match.end()])
        at = match.end()
    return words


def kind_of(character: str) -> str:
    """The kind of a character by its Unicode category: "L" letter, "N" number, " " white space, "x" any other."""
    kind = unicodedata.category(character)[0]
    return " " if character.isspace() else kind if kind in "LN" else "x"


def byte_letters() -> dict[int, str]:
    """A visible character for each of the 256 bytes, in the order of their ids.

    First the bytes with a visible Latin-1 character, as that; then the others, as the characters from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class ClipTokenizer:
    """`tokenizer(["a photo of a dog."])` -> ids (1, 77) int64; `encode` and `decode` for one text.

    Ids: 256 bytes, the same 256 at the end of a word, 48,894 merges, start 49406, end 49407.
    """

    def __init__(self, path: str | Path = VOCABULARY_PATH) -> None:
        """path: the released vocabulary file, gzipped. UserError if it is missing or another file."""
        merges = read_merges(Path(path))
        self.letters = byte_letters()
        pieces = [*self.letters.values()]
        pieces += [letter + WORD_END for letter in pieces]
        earlier = set(pieces)
        for line, (left, right) in enumerate(merges, start=2):
            if left not in earlier or right not in earlier or left + right in earlier:
                raise UserError(f"{path}:{line}: {left!r} {right!r} does not follow from the merges before it")
            pieces.append(left + right)
            earlier.add(left + right)
        pieces += [START, END]
        self.pieces = pieces
        self.ids = {piece: number for number, piece in enumerate(pieces)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id = self.ids[START], self.ids[END]

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end; [] for a text without words."""
        return [number for word in split_words(clean_text(text)) for number in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        """The ids of a word by byte-pair encoding: merge the pair with the lowest rank until no pair has a rank."""
        if word in (START, END):
            return [self.ids[word]]
        pieces = [self.letters[byte] for byte in word.encode()]
        pieces[-1] += WORD_END
        while len(pieces) > 1:
            best = min(pairwise(pieces), key=lambda pair: self.ranks.get(pair, NUM_MERGES))
            if best not in self.ranks:
                break
            merged: list[str] = []
            at = 0
            while at < len(pieces):
                is_best = tuple(pieces[at : at + 2]) == best
                merged.append("".join(best) if is_best else pieces[at])
                at += 2 if is_best else 1
            pieces = merged
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The cleaned text of ids, with a space between words. Start, end and padding are left out."""
        pieces: list[str] = []
        for number in ids:
            if number == self.end_id:
                break
            if number != self.start_id:
                pieces.append(self.pieces[number])
        bytes_of = {letter: byte for byte, letter in self.letters.items()}
        words = "".join(pieces).split(WORD_END)
        return " ".join(bytes(bytes_of[c] for c in word).decode(errors="replace") for word in words).strip()

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> Tensor:
        """T texts -> (T, 77) int64: start, ids, end, then zeros.

        A text of more than 75 ids is a UserError; with `truncate` the rest is cut off.
        """
        room = CONTEXT_LENGTH - 2
        rows = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = self.encode(text)
            if len(ids) > room and not truncate:
                raise UserError(f"text {shorten(text)!r}: {len(ids)} tokens, expected at most {room}")
            ids = [self.start_id, *ids[:room], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def shorten(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of pieces that CLIP merges, in order. UserError for a file that is not the released vocabulary."""
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_VOCABULARY_BYTES + 1)
        lines = text.decode().split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected CLIP's vocabulary; `{FETCH}` fetches it") from None
    except (EOFError, zlib.error, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: {error}, expected CLIP's vocabulary; `{FETCH}` fetches it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected CLIP's vocabulary") from None
    if len(text) > MAX_VOCABULARY_BYTES:
        raise UserError(f"{path}: unpacks to more than {MAX_VOCABULARY_BYTES:,} bytes, expected CLIP's vocabulary")
    merges = [tuple(line.split(" ")) for line in lines[1 : NUM_MERGES + 1]]  # the first line is a header
    wrong = next((n for n, pair in enumerate(merges, start=2) if len(pair) != 2 or not all(pair)), None)
    if wrong is not None:
        raise UserError(f"{path}:{wrong}: {shorten(lines[wrong - 1])!r}, expected two pieces of text")
    if len(merges) < NUM_MERGES:
        raise UserError(f"{path}: {len(merges)} merges, expected at least {NUM_MERGES}")
    return [(left, right) for left, right in merges]
