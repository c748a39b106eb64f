"""Names of served models, which stand in addresses and name folders."""

from __future__ import annotations

import re
from pathlib import PurePath

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def short_name(name: str) -> str:
    """Shorten a model's name, which may be a path or a Hub id, so that answers reveal no folders."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(name).name).strip("-._") or "model"
