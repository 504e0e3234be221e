"""The blocks of code that a Markdown file shows, and whether tests run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("sh", "python")
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    marker: str
    language: str
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in COMMANDS and not self.marker.startswith("not run: ")

    @property
    def codes(self) -> set[int]:
        """With which exit codes it may end."""
        return {0, *map(int, re.findall(r"\d+", self.marker.partition("may end with: ")[2]))}

    @property
    def file(self) -> str | None:
        return self.marker.removeprefix("file: ") if self.marker.startswith("file: ") else None


def blocks(path: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(path.read_text(encoding="utf-8"))]
