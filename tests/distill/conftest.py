"""Reports how many wrong losses the checks told from the right ones."""


def pytest_terminal_summary(terminalreporter):
    count = lambda outcome: sum(
        "test_mutant_is_killed" in getattr(report, "nodeid", "") for report in terminalreporter.stats.get(outcome, [])
    )
    killed, survived = count("passed"), count("failed") + count("error")
    if killed + survived:
        terminalreporter.write_line(f"killed {killed} of {killed + survived} mutants")
