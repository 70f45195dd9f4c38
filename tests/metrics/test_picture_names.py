"""Which picture a name or an id means: every way people write it, and a refusal where it may be two."""

import unicodedata

import pytest

from errors import UserError
from metrics.picture_names import PictureFinder


def find(names, asked, ids=None):
    row_of_id = None if ids is None else {i: row for row, i in enumerate(ids)}
    return PictureFinder(names, row_of_id).find_names({name: f"{name}.txt" for name in asked})


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("a.jpg", "a"),
        ("a.jpg", "a.jpg"),
        ("a.jpg", "a.JPG"),
        ("a.JPEG", "a.png"),  # a copy in another format
        ("a.jpg", "imgs/a.jpg"),
        ("test/a.jpg", "a"),
        ("test/a.jpg", "C:\\set\\test\\a.jpg"),
        ("test\\a.jpg", "test/a"),
        ("test/a.jpg", "./other/a.jpg"),
        ("v1.0 frame.5.png", "v1.0 frame.5"),
        ("v1.0", "v1.0"),
        ("für Élise 猫.jpg", unicodedata.normalize("NFD", "für Élise 猫")),
        ("000012.jpg", "000012"),
    ],
)
def test_one_picture_by_many_names(name, asked):
    assert find(["other.jpg", name], [asked]) == {asked: 1}
    assert find([asked, "other.jpg"], [name]) == {name: 0}


def test_a_suffix_within_the_name():
    assert find(["a.jpg.png", "b.jpg"], ["a.jpg"]) == {"a.jpg": 0}
    with pytest.raises(UserError, match=r"called 'a\.jpg\.png'"):
        find(["a.jpg", "b.jpg"], ["a.jpg.png"])
    assert find(["a.jpg", "a.jpg.png"], ["a.jpg"]) == {"a.jpg": 0}
    with pytest.raises(UserError, match=r"both fit the image 'a\.jpg'"):
        find(["a.jpg", "a.jpg.png"], ["a", "a.jpg"])  # text files of both, named without the last suffix


@pytest.mark.parametrize("asked", ["b", "A", "12", "a.b", "frame", ""])
def test_no_picture(asked):
    with pytest.raises(UserError, match=r"no image of the ground truth is called") as error:
        find(["a.jpg", "000012.jpg", "frame.5.png"], ["a", asked])
    assert f"{asked}.txt: " in str(error.value)


def test_equal_names_in_folders_are_told_apart_by_the_folders():
    names = ["a.jpg", "x/a.jpg", "y/a.jpg", "y/x/a.jpg"]
    assert find(names, ["a", "x/a", "y/a", "y/x/a"]) == {"a": 0, "x/a": 1, "y/a": 2, "y/x/a": 3}
    paths = ["imgs/a.jpg", "imgs/x/a.jpg", "imgs/y/a.jpg", "imgs/y/x/a.jpg"]
    assert list(find(names, paths).values()) == [0, 1, 2, 3]
    assert list(find(paths, ["a", "x/a", "y/a", "y/x/a"]).values()) == [0, 1, 2, 3]
    assert list(find(paths, [f"/set/{path}" for path in paths]).values()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["x/a.jpg", "y/a.jpg"], "a"),
        (["x/a.jpg", "y/a.jpg"], "z/a.jpg"),
        (["p/x/a.jpg", "q/x/a.jpg"], "x/a"),
        (["imgs/x/a.jpg", "imgs/y/a.jpg"], "a"),
        (["a.jpg", "a.png"], "a"),
        (["a.jpg", "a.png"], "a.bmp"),
        (["a.jpg", "a.JPG"], "a.jpg"),
    ],
)
def test_a_name_that_two_pictures_have_is_refused(names, asked):
    with pytest.raises(UserError, match=r"fits '.*' and '.*' of the ground truth equally"):
        find(names, [asked])


def test_the_suffix_tells_two_apart():
    assert find(["a.jpg", "a.png"], ["a.png", "a.jpg"]) == {"a.png": 1, "a.jpg": 0}


@pytest.mark.parametrize("asked", [["x/a", "y/a"], ["a.jpg", "a.png"], ["one/a.jpg", "two/a.jpg"]])
def test_two_names_of_one_picture_are_refused(asked):
    with pytest.raises(UserError, match=r"both fit the image 'a.jpg'"):
        find(["a.jpg", "b.jpg"], asked)
    assert find(["a.jpg"], ["./a.jpg", "a.jpg"]) == {"./a.jpg": 0, "a.jpg": 0}


def test_a_name_goes_before_an_id():
    names, ids = ["0.jpg", "1.jpg", "2.jpg"], [1, 2, 3]
    assert find(names, ["0", "1"], ids) == {"0": 0, "1": 1}
    assert find(names, ["1"], ids) == {"1": 1}
    assert find(["p.jpg", "q.jpg", "r.jpg"], ["3", "1"], ids) == {"3": 2, "1": 0}
    assert find([None, None, None], ["3", "1"], ids) == {"3": 2, "1": 0}
    with pytest.raises(UserError, match="called '3', nor has its id"):
        find(names, ["3", "4"], ids)
    with pytest.raises(UserError, match="called '3', but one is called '1': expected names for all"):
        find(names, ["1", "2", "3"], ids)  # some by name, some by id: whose numbering?
    assert find(["1.jpg", "2.jpg", None], ["1", "2", "3"], ids) == {"1": 0, "2": 1, "3": 2}  # both say the same


def test_ids():
    finder = PictureFinder(["1.jpg", "0.jpg"], {0: 0, 1: 1})
    assert finder.find_ids({0: "", 1: ""}) == {0: 0, 1: 1}
    assert finder.names_like_ids({0: 0, 1: 1}) == [
        "image_id is read as an id of the ground truth: 0 is '1.jpg', though '0.jpg' is there too"
    ]
    assert PictureFinder(["0.jpg", "1.jpg"], {0: 0, 1: 1}).names_like_ids({0: 0, 1: 1}) == []  # both say the same
    assert PictureFinder(["1.jpg", "2.jpg"], {0: 0, 1: 1}).names_like_ids({0: 0, 1: 1}) == []  # 0 is no name
    with pytest.raises(UserError, match=r"'0' may be the image of this id, '1\.jpg', and '0\.jpg'"):
        finder.find_ids({"0": "", "1": ""})
    assert PictureFinder(["1.jpg", "0.jpg"], {5: 0, 6: 1}).find_ids({"0": "", "1": ""}) == {"0": 1, "1": 0}
    with pytest.raises(UserError, match="image_id: found 2, expected one of the ground truth's"):
        finder.find_ids({0: "", 2: ""})
    assert PictureFinder(["b.jpg", "a.jpg"], {"a": 0, "b": 1}).find_ids({"a": ""}) == {"a": 0}  # its own id
    digits = PictureFinder(["000007", "x/000012"])
    assert digits.find_ids({7: "", 12: ""}) == {7: 0, 12: 1}
    with pytest.raises(UserError, match="image_id: found 7"):
        PictureFinder(["07", "7"]).find_ids({7: ""})


def test_the_name_that_an_annotation_states():
    finder = PictureFinder(["0001", "0002"], other_names=["b.jpg", "a.jpg"])
    assert finder.find_names({"a": "", "b": ""}) == {"a": 1, "b": 0}
    assert finder.find_names({"0001": "", "0002": ""}) == {"0001": 0, "0002": 1}
    with pytest.raises(UserError, match="called 'a'"):
        finder.find_names({"a": "", "0001": ""})
    with pytest.raises(UserError, match="called '0003'"):
        PictureFinder(["0001", "0002"], other_names=["0002", "0003"]).find_names({"0002": "", "0003": ""})
