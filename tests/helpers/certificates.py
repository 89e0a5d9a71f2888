"""Certificates for TLS between Ray's processes, made with the commands of cluster/SECURITY.md."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.helpers.data import PROJECT

GUIDE = PROJECT / "cluster" / "SECURITY.md"
NAMES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def commands() -> list[str]:
    """The shell commands of the section on TLS: certificates, and the environment."""
    section = GUIDE.read_text().partition("## TLS")[2].partition("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


def made_certificates(folder: Path, host: str = "127.0.0.1") -> dict[str, str]:
    """Certificates of a new authority, as the guide makes them; gives the environment."""
    folder.mkdir()
    make, export = commands()
    done = subprocess.run(
        ["bash", "-euc", f"{make}\n{export}\nenv"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOST": host},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return {name: lines[name] for name in NAMES}
