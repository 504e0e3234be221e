"""What users and their scripts rely on, written down: flags, messages, columns, metadata, and files."""

from pathlib import Path

HERE = Path(__file__).parent
BEFORE = HERE / "before"  # files that version 0.1.0 has written
