"""Writes RESULTS.md: every benchmark replaces its section, with machine, versions and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def write_section(name: str, title: str, text: str) -> None:
    """Replace the text between the markers of section `name`; a new section is appended to the file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n## {title}\n\n{text.strip()}\n{end}"
    page = RESULTS.read_text() if RESULTS.exists() else "# Results\n\nEach section is written by its benchmark.\n"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page = pattern.sub(lambda _: section, page) if pattern.search(page) else f"{page.rstrip()}\n\n{section}\n"
    RESULTS.write_text(page)


def machine(*packages: str) -> str:
    """One line: date, processor, cores, versions of `packages`."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{datetime.date.today()}, {_processor()}, {len(os.sched_getaffinity(0))} cores, {versions}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
