"""Fixtures shared by all tests: the small real data beside the checkout, and the golden files."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data that development checkouts have beside them; tests of it are skipped without."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the small real data (../shared/data) is not beside this checkout")
    return path


def read_golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and meta of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(bytes(arrays.pop("meta")))


@pytest.fixture(scope="session")
def golden():
    return read_golden
