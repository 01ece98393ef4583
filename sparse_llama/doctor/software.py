"""Which versions are installed, against what this project asks for, and whether they can be imported."""

import importlib
import json
import os
import platform
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sparse_llama import __version__
from sparse_llama.doctor.commands import ask, last_line
from sparse_llama.doctor.findings import Finding

NAME = "sparse-llama"
_ROOT = Path(__file__).parents[2]
_IMPORTED_AS = {"tensorboard": "torch.utils.tensorboard"}  # the part of it that is used


def check_versions() -> list[Finding]:
    """Return a row for Python, for this project, and for every package that it asks for."""
    system = Finding("system", "ok", platform.platform())
    return [system, _python(), _ourselves(), *(check_requirement(one) for one in requirements()), _triton()]


def requirements() -> list[Requirement]:
    """Return what this project asks for on this platform, without its extras."""
    parsed = [Requirement(line) for line in _declared()]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_requirement(asked: Requirement) -> Finding:
    """Return whether a package is installed in a version that will do."""
    wanted = str(asked.specifier) or "any version"
    command = f"pip install '{asked.name}{asked.specifier}'"
    try:
        found = version(asked.name)
    except PackageNotFoundError:
        return Finding(asked.name, "fail", f"not installed; asked for: {wanted}", command)
    if not asked.specifier.contains(found, prereleases=True):
        return Finding(asked.name, "fail", f"{found}; asked for: {wanted}", command)
    return Finding(asked.name, "ok", found)


def check_imports() -> Iterator[Finding]:
    """Yield a row for every package that is installed and does not import, or one for all that do."""
    broken = 0
    names = [one.name for one in requirements()]
    for name in names:
        try:
            importlib.import_module(_IMPORTED_AS.get(name, name))
        except ModuleNotFoundError as error:
            if error.name == name:
                continue  # its version says so already
            broken += 1
            yield Finding(name, "fail", f"does not import: {error}", f"pip install {error.name}")
        except Exception as error:  # of its own code, or of a library that it loads
            broken += 1
            told = f"does not import: {type(error).__name__}: {last_line(str(error))}"
            yield Finding(name, "fail", told, f"pip install --force-reinstall {name}")
    if not broken:
        yield Finding("imports", "ok", f"all {len(names)} packages import")


def check_torch() -> Finding:
    """Return what torch was built for, against the driver that is there."""
    import torch

    built = "the CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = f"built for {built}, " + (f"driver {driver}" if driver else "no NVIDIA driver")
    if driver and torch.version.cuda is None:
        advice = "this machine has a GPU: install a CUDA build of torch (pytorch.org/get-started)"
        return Finding("torch's CUDA", "fail", found, advice)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver and hidden in ("", "-1"):
        told = f"{found}; CUDA_VISIBLE_DEVICES={hidden} hides every GPU"
        return Finding("torch's CUDA", "warn", told, "unset it to use a GPU")
    if driver and not torch.cuda.is_available():
        advice = "torch cannot use the GPU: update the driver, or install torch for the CUDA of this driver"
        return Finding("torch's CUDA", "fail", found, advice)
    if driver:
        nccl = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version()))
        found += f", cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"
    return Finding("torch's CUDA", "ok", found)


def _declared() -> list[str]:
    try:
        return requires(NAME) or []
    except PackageNotFoundError:
        return _pyproject()["dependencies"]


def _pyproject() -> dict[str, Any]:
    """Return the project's own table, of a checkout that was not installed."""
    return tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _python() -> Finding:
    try:
        wanted = distribution(NAME).metadata["Requires-Python"]
    except PackageNotFoundError:
        wanted = _pyproject()["requires-python"]
    found = platform.python_version()
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("python", "fail", f"{found}; asked for: {wanted}", "make an environment with that one")
    return Finding("python", "ok", found)


def _ourselves() -> Finding:
    git = ("git", "-C", str(_ROOT))
    commit = ask(*git, "rev-parse", "--short=12", "HEAD") if (_ROOT / ".git").exists() else None
    changed = "+" if commit and ask(*git, "status", "--porcelain", "--untracked-files=no") else ""
    found = __version__ + (f", commit {commit}{changed}" if commit else "")
    try:
        installed = distribution(NAME)
    except PackageNotFoundError:
        advice = "pip install -e . in the checkout: the launcher finds no package that is not installed"
        return Finding(NAME, "fail", f"{found}, not installed", advice)
    home = _editable_home(installed.read_text("direct_url.json"))
    if home is not None and home != _ROOT:
        told = f"{found}, from {_ROOT}; installed is the one in {home}"
        return Finding(NAME, "warn", told, f"pip install -e {_ROOT} to use this one everywhere")
    return Finding(NAME, "ok", found)


def _editable_home(direct_url: str | None) -> Path | None:
    url = json.loads(direct_url or "{}")
    if not url.get("dir_info", {}).get("editable"):
        return None
    return Path(url["url"].removeprefix("file://"))


def _triton() -> Finding:
    """Return whether the kernels' compiler is there: it comes with torch's CUDA builds for Linux."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        import torch

        if torch.version.cuda is None:
            return Finding("triton", "none", "not installed; only GPUs need it")
        return Finding(
            "triton",
            "warn",
            "not installed; sparse attention computes the same without it, slower",
            "pip install triton" if sys.platform == "linux" else "",
        )
    return Finding("triton", "ok", found)
