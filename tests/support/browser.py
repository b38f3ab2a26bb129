"""Pages in a real browser: headless Chromium, without network."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page: Path, *options: str) -> tuple[str, list[str]]:
    """The DOM of a page after it was loaded, as text, and what the console said."""
    if CHROMIUM is None:
        pytest.skip("a page is opened in Chromium, which this machine does not have (apt install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"]
        command = [CHROMIUM, *flags, *options, "--dump-dom", page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", done.stderr)
