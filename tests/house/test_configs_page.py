"""docs/configs.md is what docs/configs.py makes of the dataclasses, and leaves no key without a word about it."""

import importlib.util
import re

import pytest

from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("configs_page", ROOT / "docs" / "configs.py")
configs_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(configs_page)
PAGE = configs_page.page()


def test_the_page_is_up_to_date():
    assert configs_page.PAGE.read_text(encoding="utf-8") == PAGE, "write it anew with: python docs/configs.py"


def test_every_key_is_explained():
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 100
    assert not [key for key, *cells in rows if not all(cells) and not key.startswith("condense.matching.")]


@pytest.mark.parametrize(
    "row",
    [
        "| `epochs` | integer | `100` | ",
        "| `data.train_root` | text or null | `null` | ",
        "| `data.holdout_fraction` | number | `0.0` | ",
        "| `terms.0.student_maps` | list of texts | `[]` | ",
        "| `evaluation.protocol` | `coco`, `voc07`, `voc12` | `coco` | ",
        "| `student.arch` | text | required | ",
    ],
)
def test_known_rows(row):
    assert row in PAGE
