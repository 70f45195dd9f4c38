"""benchmarks/open_set.py: the generated set is read without a fault, and every object of it."""

import re

from benchmarks import open_set


def test_every_object_of_the_set_is_read(capsys):
    assert open_set.main(["--pictures", "20"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"20 pictures, \d+ objects: opened in \S+ CPU seconds, counted in \S+, [1-9]\d* MB at most\n", said
    )
