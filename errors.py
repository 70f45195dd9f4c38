"""The one exception for mistakes a user can make, the one place that turns it into a line and an exit code, and the
words that messages share.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NoReturn

LOST_EXIT_CODE, NOT_FINITE_EXIT_CODE, MEMORY_EXIT_CODE, DISK_EXIT_CODE = 1, 3, 4, 5


class UserError(Exception):
    """A mistake in a path, key, label line, picture, checkpoint or argument.

    The message is one line: the file, the line or key, what was found, and what was expected.
    `exit_code` is 2 for usage and data; the names above are of the others: a lost process of a run, numbers that are
    not finite, lack of memory, the disk.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split("\n")))
        self.exit_code = exit_code


class ArgumentParser(argparse.ArgumentParser):
    """A parser of arguments. Its help is `description` and `epilog` as they stand; its errors are UserErrors."""

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        as_it_stands = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=command, description=description, epilog=epilog, formatter_class=as_it_stands)

    def error(self, message: str) -> NoReturn:
        help_ = f"{self.prog} --help"
        if match := re.fullmatch(r"(.*: )?invalid choice: (\S+) \(choose from (.*)\)", message):
            message = f"{match[1] or ''}found {match[2]}, expected one of {match[3].replace(chr(39), '')}"
        elif match := re.fullmatch(r"(.*: )?invalid (\S+) value: (.*)", message):
            kind = {"int": "whole number", "float": "number"}.get(match[2], match[2])
            message = f"{match[1] or ''}found {match[3]}, expected a {kind}"
        elif match := re.fullmatch(r"the following arguments are required: (.*)", message):
            optional = {str(action.metavar) for action in self._actions if action.nargs == "*"}
            missing = [name for name in match[1].split(", ") if name not in optional]
            message = f"found no {', no '.join(missing)}; {help_} has an example"
        elif match := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            message = f"argument {match[1]}: no such argument; {help_} lists them"
        raise UserError(message)


def expect(is_met: bool, what: str, found: object, expected: str) -> None:
    """UserError `WHAT: found FOUND, expected EXPECTED` unless a condition is met. what: such as "key 'epochs'"."""
    if not is_met:
        raise UserError(f"{what}: found {found}, expected {expected}")


def counted(count: int, noun: str) -> str:
    """`1 class`, `2 classes`, `0 pictures`: a number and its noun, which ends in -es after s, x and tch, else in -s."""
    plural = noun + ("es" if noun.endswith(("s", "x", "tch")) else "s")
    return f"{count} {noun if count == 1 else plural}"


def shortened(names: Iterable[object], most: int = 12) -> str:
    """`a, b, c and 77 more`: the first names of a list that may be long, and how many others there are; "" for none."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


@contextlib.contextmanager
def naming(place: str, kind: type[Exception] | tuple[type[Exception], ...] = UserError) -> Iterator[None]:
    """An error of this kind, or these, inside becomes a UserError that begins with the place; its exit code stays."""
    try:
        yield
    except kind as error:
        raise UserError(f"{place}: {error}", getattr(error, "exit_code", 2)) from None


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Call `main(sys.argv[1:])` and exit with its result (None: 0).

    A UserError becomes one line on stderr, Ctrl-C one word. If the reader of our output closes it early (`| head`),
    the script ends without a traceback. A letter that the terminal does not have is printed as \\u and its number.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    raise SystemExit(code)


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional library. UserError with the install command where it is absent. Call it before any work."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs the package {module!r}: pip install '.[{extra}]'") from None
