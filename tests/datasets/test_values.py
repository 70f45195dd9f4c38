"""What a value in an annotation file means: one table of flags, numbers, ids, sizes and boxes."""

import math

import pytest

from datasets.values import box_fault, read_flag, read_id, read_number, read_size


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", " 1\n", "1.0", "true", "True", "TRUE", "yes", "Y", "t"])
def test_set_flags(value):
    assert read_flag(value) is True


@pytest.mark.parametrize(
    "value",
    [None, False, 0, 0.0, -0.0, "", " ", "0", "0.0", "00", "false", "False", "FALSE", "no", "N", "none", "Unspecified"],
)
def test_flags_that_are_not_set(value):
    assert read_flag(value) is False


@pytest.mark.parametrize(
    "value", [2, -1, 0.5, "2", "maybe", "difficult", "nan", math.nan, math.inf, [], {}, [1], "1_0"]
)
def test_flags_without_a_meaning(value):
    with pytest.raises(ValueError, match=r"found .*, expected 0 or 1"):
        read_flag(value)


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), (0.25, 0.25), ("3", 3.0), (" 2.5e1 ", 25.0), ("-.5", -0.5), (-7, -7.0)]
)
def test_numbers(value, expected):
    assert read_number(value) == expected and isinstance(read_number(value), float)


@pytest.mark.parametrize(
    "value", [None, True, False, math.nan, math.inf, "nan", "inf", "-Infinity", "", "x", "1,5", "1_000", [], 10**400]
)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"found .*, expected a finite number"):
        read_number(value)


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (1.0, 1), ("1", "1"), ("000012", "000012"), (-3, -3), (0, 0)])
def test_ids(value, expected):
    assert read_id(value) == expected and type(read_id(value)) is type(expected)


@pytest.mark.parametrize("value", [None, True, 1.5, math.nan, math.inf, "", [1], {}, 1 << 63])
def test_what_is_no_id(value):
    with pytest.raises(ValueError, match=r"found .*, expected a whole number or a text"):
        read_id(value)


def test_sizes():
    assert read_size(96.0, "64") == (96.0, 64.0)
    for size in ((0, 0), (96, None), (None, None), ("", ""), (-1, 5), ("wide", 5), (math.inf, 5)):
        assert read_size(*size) is None


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ((1, 2, 3, 4), None),
        ((3, 2, 1, 4), "box turned inside out"),
        ((1, 4, 3, 2), "box turned inside out"),
        ((3, 2, 1, 2), "box turned inside out"),
        ((1, 2, 1, 4), "zero-size box"),
        ((1, 2, 3, 2), "zero-size box"),
        ((1, 2, math.nan, 4), "not a number"),
        ((1, 2, math.inf, 4), "not a number"),
    ],
)
def test_boxes(box, kind):
    fault = box_fault(*box)
    assert (fault and fault[1]) == kind
    assert kind is None or fault[0].startswith(kind)
