"""The container image is made of what is there."""

import re

from tests.conftest import ROOT


def test_the_dockerfile_is_short_and_copies_what_is_there():
    lines = (ROOT / ".ci" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 15
    copied = [name for line in lines if (match := re.match(r"COPY (.*) \S+$", line)) for name in match[1].split()]
    assert {"pyproject.toml", "constraints.txt", "Makefile"} <= set(copied)  # all that `make setup` reads
    assert all((ROOT / name).exists() for name in copied)
    assert lines[-1] == 'CMD ["make", "app"]' and "\napp: " in (ROOT / "Makefile").read_text(encoding="utf-8")
