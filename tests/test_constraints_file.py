"""constraints.txt names every package that an installation brings."""

import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = Path(__file__).parents[1] / "constraints.txt"
EXTRAS = ("", "serve", "grammar", "remote", "math")


def installed(name: str, extras: tuple[str, ...], found: dict[str, set[str]]) -> None:
    """Adds the packages that `name` needs, and what they need, to `found`, each with the extras that were followed."""
    for requirement in map(Requirement, requires(name) or ()):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        needed, wanted = canonicalize_name(requirement.name), {"", *requirement.extras}
        if new := wanted - found.get(needed, set()):
            found.setdefault(needed, set()).update(new)
            installed(needed, tuple(new), found)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the file is that of Python 3.11")
def test_every_package_that_is_installed_has_a_line():
    found: dict[str, set[str]] = {}
    installed("jaxtrain", EXTRAS, found)
    lines = [line.split("==")[0] for line in FILE.read_text().splitlines() if not line.startswith("#")]
    names = [canonicalize_name(line) for line in lines]
    missing = [f"{name}=={version(name)}" for name in sorted(set(found) - set(names))]
    assert not missing, "add to constraints.txt: " + " ".join(missing)
    assert sorted(names) == sorted(set(names))
