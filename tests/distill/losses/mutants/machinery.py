"""Wrong losses, to test the tests: a loss's checks must tell it from each of its mutants.

A row of the table is a LossCase: a loss, its checks, and at least four mutants. A check is a function of one loss that
raises AssertionError where the loss is wrong; tests.distill.losses.properties makes the usual ones.
tests/distill/test_mutants runs the checks on the loss, where all must pass, and on every mutant, where one must fail.

To add a row, append to CASES of the file of your family in this folder (features, logits, ...; a new file is named
in table.py):

    LossCase(
        "cwd",
        channel_wise_kl,  # at the top level of its module: mutants are compiled from that module's source
        checks=(  # cheap ones first
            matches_reference(reference.channel_wise_kl, {"usual": dict(s_map=s, t_map=t)}),
            ...,
        ),
        mutants={
            "no T^2": Edit("temperature**2 * kl.mean()", "kl.mean()"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "mean over pixels": lambda *, s_map, t_map, temperature=1.0: ...,  # where an edit would be long
        },
    )

A loss is a public function with keyword-only s_ and t_ arguments; one without a row fails test_mutants.

`old` of an Edit must stand exactly once in the source of the loss, or of the function or class of the same module
that `within` names. A mutant must run: any error but AssertionError fails the test, since a crash proves nothing. A
mutant that computes the same numbers is no mutant, and will survive.
"""

import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

Loss = Callable
Check = Callable[[Loss], None]


@dataclass(frozen=True)
class Edit:
    """Replace `old` by `new` in the source of the loss, or of `within`.

    within: a function or class in the loss's module, by name; or a function of kernels/, itself, on which it rests.
    """

    old: str
    new: str
    within: str | Callable | None = None


@dataclass(frozen=True)
class LossCase:
    """A loss (function or class of a module in distill/), its checks, and its mutants by what is wrong with them."""

    name: str
    loss: Loss
    checks: tuple[Check, ...]
    mutants: dict[str, Edit | Loss]

    def check(self, loss: Loss) -> None:
        """Run every check on `loss`, in order; AssertionError at the first that fails."""
        for check in self.checks:
            check(loss)

    def mutant(self, wrong: str) -> Loss:
        """The mutant of that description, ready to be called as the loss."""
        change = self.mutants[wrong]
        return apply_edit(self.loss, change) if isinstance(change, Edit) else change


def apply_edit(loss: Loss, edit: Edit) -> Loss:
    """`loss` from a fresh copy of its module with the edit made; LookupError where the edit does not fit once."""
    module = sys.modules[loss.__module__]
    edited = edit.within or loss
    if isinstance(edited, str):
        edited = getattr(module, edited)
    home = sys.modules[edited.__module__]
    source = Path(home.__file__).read_text(encoding="utf-8")
    part = inspect.getsource(edited)
    if part.count(edit.old) != 1 or source.count(part) != 1:
        raise LookupError(f"{home.__name__}.{edited.__name__}: {edit.old!r} does not stand there once")
    namespace = run_source(home, source.replace(part, part.replace(edit.old, edit.new)), edit.new)
    if home is not module:  # what the loss's module imports from there, it gets from the edited copy
        originals = {id(value): name for name, value in vars(home).items()}
        changed, namespace = namespace, run_source(module, Path(module.__file__).read_text(encoding="utf-8"), "")
        for name, value in list(namespace.items()):
            if id(value) in originals and not name.startswith("__"):
                namespace[name] = changed[originals[id(value)]]
    return namespace[loss.__name__]


def run_source(module: ModuleType, source: str, what: str) -> dict:
    """The names that the source defines, run in place of the module's own."""
    file = f"<mutant of {module.__name__}: {what}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # where Triton reads a kernel
    namespace = {"__name__": module.__name__}
    exec(compile(source, file, "exec"), namespace)
    return namespace
