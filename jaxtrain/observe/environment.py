"""Where a program runs: versions, devices, memory, the commit, and which optional packages are missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

_GIB = 2**30
# What changes where a run computes, what it downloads and where its caches are. Tokens are not shown.
_VARIABLES = (
    *("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"),
    *("JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"),
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID"),
)


def environment() -> dict[str, dict[str, Any]]:
    """Section -> {name: value}."""
    memory = psutil.virtual_memory()
    return {
        "system": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform(),
            "cpu cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
            "disk here": f"{shutil.disk_usage(Path.cwd()).free / _GIB:.1f} GiB free",
            "git commit here": git_commit(Path.cwd()) or "none",
        },
        "devices": _devices(),
        "packages": {"jaxtrain": version("jaxtrain"), **_installed("")},
        "optional packages": {
            extra: _what_is_missing(extra)
            for extra in metadata("jaxtrain").get_all("Provides-Extra") or []
            if extra != "dev"
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def git_commit(folder: Path) -> str:
    """The commit that is checked out in a folder, and whether files differ from it; empty where there is none."""
    try:
        options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 10.0, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + (", with changed files" if changed else "")


def _devices() -> dict[str, Any]:
    import jax

    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not here, or another process holds it
        return {"error": str(error)}
    found: dict[str, Any] = {"backend": jax.default_backend()}
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        found[str(device)] = device.device_kind + (f", {limit / _GIB:.1f} GiB" if limit else "")
    return found


def _installed(extra: str) -> dict[str, str | None]:
    """The version of each package that jaxtrain requires, or the extra; None where it is missing."""
    found: dict[str, str | None] = {}
    for text in requires("jaxtrain") or []:
        each = Requirement(text)
        if each.marker.evaluate({"extra": extra}) if each.marker else not extra:
            found[each.name] = _version(each.name)
            for of_package in each.extras if found[each.name] else ():  # jax[tpu] brings packages of its own
                found |= _brought(each.name, of_package)
    return found


def _brought(package: str, extra: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for each in map(Requirement, requires(package) or []):
        if each.marker and each.marker.evaluate({"extra": extra}) and not each.marker.evaluate({"extra": ""}):
            found[each.name] = _version(each.name)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _what_is_missing(extra: str) -> str:
    missing = sorted(name for name, found in _installed(extra).items() if found is None)
    return f"missing: {', '.join(missing)} (pip install 'jaxtrain[{extra}]')" if missing else "installed"
