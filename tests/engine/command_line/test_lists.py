"""train.py --keys and --list: everything there is, one line each."""

import pytest

import models
import train
from distill.terms import LOSSES
from engine.command_line import keys, models_list
from errors import UserError


def test_keys_are_those_of_the_page(capsys):
    train.main(["--keys"])
    printed = capsys.readouterr().out
    for _, prefix, cls in keys.SECTIONS:
        for key in keys.keys_of(prefix, cls):
            assert f"\n{key.name} " in printed and key.comment in printed
    train.main(["--keys", "turns"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# augment" and [line.split()[0] for line in lines[1:]] == ["augment.hue"]
    with pytest.raises(UserError, match="no key, default or comment has 'mozaic'"):
        train.main(["--keys", "mozaic"])


def test_list_has_every_model_and_loss_with_a_line(capsys, monkeypatch):
    count = models_list.count_parameters(lambda name: models.build(name, 80), "yolov8n")
    assert count == 3_157_184  # published: 3 157 200, with the 16 distances of a box edge
    monkeypatch.setattr(models_list, "count_parameters", lambda build, name: 1_234_000)  # all of them take seconds
    train.main(["--list"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    lines = {line.split()[0]: line for line in printed}
    assert set(lines) == {*models.ARCHITECTURES, *models.TEACHERS, *LOSSES}
    assert all(f"  1.2 M   {models_list.describe(name)}" in lines[name] for name in lines if name not in LOSSES)
    assert all(models_list.describe(name) for name in lines if name not in LOSSES)
    assert "map      Channel-wise distillation (CWD): match the spatial attention" in lines["cwd"]
    assert all(len(lines[name].split()) > 3 for name in LOSSES)
    assert len({lines[name].split(maxsplit=2)[2] for name in LOSSES}) == len(LOSSES)  # two terms may share a loss
