"""Text files with one entry a line: labels, lists of pictures, class names. LF or CRLF, UTF-8 with or without BOM."""

from pathlib import Path

from errors import UserError

MAX_BYTES = 64 << 20


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, stripped text) of each non-empty line. UserError for a file that is not such text."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: more than {MAX_BYTES} bytes, expected a text file")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = text.split("\n") if "\n" in text else text.split("\r")  # str.splitlines also splits at U+2028 and others
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_names(path: Path) -> tuple[str, ...]:
    """Class names, one a line. UserError for no name, and for a name that stands there twice."""
    return check_names([name for _, name in read_lines(path)], str(path))


def check_names(names: list[str], source: str) -> tuple[str, ...]:
    """The names as a tuple. UserError for no name, and for a name that stands there twice."""
    if not names:
        raise UserError(f"{source}: no class names, expected at least one")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{source}: class {twice!r} is named twice")
    return tuple(names)
