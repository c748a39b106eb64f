"""Keys that clients show."""

from __future__ import annotations

import base64


def key_of(authorization: str) -> str:
    """Read the key in a header `Authorization`; nothing if it has none.

    A key may be the password of HTTP Basic: clients of A1111 send nothing else.
    """
    kind, _, key = authorization.partition(" ")
    match kind.lower():
        case "bearer":
            return key.strip()
        case "basic":
            try:
                return base64.b64decode(key.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                return ""
    return ""
