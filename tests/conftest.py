"""The test command's time by folder, so that what grows is seen."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each folder under tests/, the largest first."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                parts = report.nodeid.split("::")[0].split("/")
                seconds[parts[1] if len(parts) > 2 else "tests"] += report.duration
    if seconds:
        shares = ", ".join(f"{folder} {total:.0f}" for folder, total in seconds.most_common())
        terminalreporter.write_line(f"seconds by folder: {shares}")
