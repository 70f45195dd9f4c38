"""CONTRIBUTING.md's recipe for a loss, followed to the letter: two files change, and a term of that name learns."""

import re
import sys
import types
from pathlib import Path

import torch

import distill.losses
from config import TermConfig
from distill import checks, criterion, probing, terms, trained_parts
from distill.losses import masked
from structures import Targets
from tests.conftest import ROOT
from tests.distill.test_criterion import IMAGES, TinyDetector


def recipe() -> list[str]:
    """The blocks of code of the section: the loss, the term and the row of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## How to add a distillation loss\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def changed(module: types.ModuleType, source: str, monkeypatch) -> types.ModuleType:
    """The module as it would be with this source, used instead of the module itself."""
    new = types.ModuleType(module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, new)
    exec(compile(source, module.__file__, "exec"), vars(new))
    return new


def test_a_loss_is_added_as_the_recipe_says(monkeypatch):
    loss, term, row = recipe()
    source = Path(masked.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr(distill.losses, "masked", changed(masked, source + "\n\n" + loss, monkeypatch))
    source = Path(terms.__file__).read_text(encoding="utf-8")
    head, table = source.split("@dataclass(frozen=True)\nclass Term:")
    table = table.replace("LOSSES = {\n", "LOSSES = {\n" + row)
    edited = changed(terms, f"{head}{term}\n\n@dataclass(frozen=True)\nclass Term:{table}", monkeypatch)
    for module in (checks, criterion, probing, trained_parts):
        monkeypatch.setattr(module, "LOSSES", edited.LOSSES)
    assert set(edited.LOSSES) - set(terms.LOSSES) == {"box_l1"}

    torch.manual_seed(0)
    student, teacher = TinyDetector(4), TinyDetector(6).requires_grad_(False).eval()
    config = TermConfig("t", "box_l1", 1.0, ("p3", "p4"), adapter="conv1x1", parameters={"strength": 0.5})
    distillation = criterion.Criterion((config,), student=student, teachers={"t": teacher}, epochs=1, image_size=32)
    optimizer = torch.optim.SGD([*student.parameters(), *distillation.parameters()], lr=0.01)
    box, zero = torch.tensor([[4.0, 4.0, 28.0, 24.0]]), torch.zeros(1, dtype=torch.int64)
    values = []
    for _ in range(3):
        losses = distillation(student(IMAGES), {"t": teacher(IMAGES)}, Targets(box, zero, zero, zero.bool()), 0.0)
        optimizer.zero_grad()
        losses["box_l1_t"].backward()
        optimizer.step()
        values.append(losses["box_l1_t"].item())
    assert values[0] > values[-1] > 0
