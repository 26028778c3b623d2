"""Files that results are written to."""

from __future__ import annotations

import json
from pathlib import Path

from ..training.errors import UserError

__all__ = ["check_writable", "write_json"]


def check_writable(path: Path) -> None:
    """Raises UserError if the directory of ``path`` is missing: said before hours of measuring, not after."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {path.parent}")


def write_json(path: Path, content: object) -> None:
    """Replaces the file as a whole: an interruption leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
