"""The tests marked weekly: few, left out by `make test`, run by the weekly job."""

import re

from tests.conftest import ROOT

MOST = 10


def test_few_tests_are_weekly_and_all_of_them_are_run():
    code = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    marked = {path.name for path, text in code.items() if "pytest.mark." + "weekly" in text}
    assert 0 < len(marked) <= MOST, sorted(marked)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^(test\S*):.*\n\t(.*)$", makefile, flags=re.MULTILINE))
    assert recipes["test-weekly"].endswith("-m weekly")
    assert all("not weekly" in recipes[name] for name in ("test", "test-fast"))
    assert "run: make test-weekly" in (ROOT / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8")
