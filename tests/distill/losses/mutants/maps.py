"""Pairs of maps, and the checks that hold for every loss of one pair."""

from tests.distill.losses.properties import (
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    minimum_at_teacher,
    only_student_learns,
    random_pair,
    takes_inference_teacher,
    zero_when_empty,
)


def maps(*shape: int, **others) -> dict:
    return random_pair("map", shape or (2, 3, 4, 5), **others)


def shapes(**others) -> dict[str, dict]:
    """The usual, odd, empty and saturated pairs of maps."""
    return {
        "usual": maps(**others),
        "one pixel": maps(1, 1, 1, 1, **others),
        "odd": maps(3, 2, 5, 7, **others),
        "no images": maps(0, 3, 4, 5, **others),
        "no pixels": maps(2, 3, 0, 5, **others),
        "saturated": maps(scale=1e3, **others),
    }


def every_map_loss(**others) -> tuple:
    """Checks that hold for every loss of one pair of maps."""
    return (
        zero_when_empty(maps(0, 3, 4, 5, **others), maps(2, 3, 0, 5, **others)),
        minimum_at_teacher(maps(**others)),
        only_student_learns(maps(**others)),
        takes_inference_teacher(maps(**others)),
        gradient_is_right(maps(2, 3, 3, 3, **others)),
        computes_in_float32(maps(**others)),
        finite_when_saturated(maps(scale=1e3, **others)),
    )
