"""`--faults whole` runs every case of the matrix and prints the table; without it a sample runs."""

from collections import Counter

import pytest

from tests.faults.matrix import ELSEWHERE, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=("sample", "whole"), default="sample", help="cases of the matrix of faults")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("--faults") != "whole":
        return
    counts: Counter[tuple[str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, rows in report.user_properties:
                    if name == "counts":
                        counts.update({(kind, outcome): count for kind, outcome, count in rows})
    terminalreporter.section("matrix of faults")
    for line in table(counts):
        terminalreporter.write_line(line)
    for kind, files in ELSEWHERE.items():
        terminalreporter.write_line(f"{kind}: {files}")
