"""The token of a cluster that this process starts.

Processes of Ray listen on all interfaces, and whoever reaches them without a token can run code there.

Source:
    https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import os
import secrets
import sys

LOCAL = "local"
"""Address of a cluster on this machine that lasts as long as the work."""


def guard(address: str) -> None:
    """Draw a token for a cluster that this process will start, unless the environment has settings of its own.

    Ray reads the mode when it is imported, so this comes before; after the import it does nothing.

    Args:
        address: The address of the cluster. One that runs already has its own rules.
    """
    if address == LOCAL and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
