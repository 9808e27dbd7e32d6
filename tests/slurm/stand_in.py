"""Commands that stand in for others."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def tool(file: Path, body: str) -> None:
    """Write an executable bash script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)
