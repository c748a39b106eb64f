"""Bundles that an attacker has changed: the hashes are right, the contents are not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unetc.artifacts.manifest import DIGEST, MANIFEST

UNSAFE = {
    "parent": "../outside",
    "hidden parent": "engines/../../outside",
    "inner parent": "engines/../engines/full.onnx",
    "absolute": "{root}/outside",
    "current folder": "./engines/full.onnx",
    "doubled slash": "engines//full.onnx",
    "trailing slash": "engines/full.onnx/",
    "NUL": "engines/full.onnx\0",
    "NUL and more": "engines/full.onnx\0.txt",
    "newline": "engines/full.onnx\n",
    "drive": "C:full.onnx",
    "backslash": "engines\\full.onnx",
    "other script": "engines/full.onnx\N{CYRILLIC SMALL LETTER A}",
    "empty": "",
}
"""Paths that could leave a bundle; `{root}` stands for the folder around it."""


NESTED = b'{"schema": 8, "notes": ' + b"[" * 10**6 + b"]" * 10**6 + b"}"
MALFORMED = {
    "empty": b"",
    "not JSON": b"\x80\x04]",
    "null": b"null",
    "a list": b"[1]",
    "half": b'{"schema": 8, "unetc": "',
    "no schema": b"{}",
    "schema as text": b'{"schema": "8"}',
    "no fields": b'{"schema": 8}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "invalid UTF-8": b'{"schema": 8, "unetc": "\xff\xfe"}',
    "lone surrogate": rb'{"schema": 8, "unetc": "\ud800"}',
    "deep lists": b"[" * 10**6,
    "deep objects": b'{"a":' * 10**6,
    "deep in a field": NESTED,
    "deep in an unknown field": NESTED.replace(b"notes", b"other"),
    "deep before the schema": NESTED[:-1].replace(b'"schema": 8, ', b"") + b', "schema": 7}',
    "a long number": b'{"schema": ' + b"9" * 10**6 + b"}",
}
"""Texts that are no manifest."""
CONTAINERS = ("pickle", "npy", "npz")
"""Formats that can hold a pickle."""


def reseal(bundle: Path, text: bytes) -> None:
    """Write a manifest with a matching digest."""
    (bundle / MANIFEST).write_bytes(text)
    (bundle / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}\n")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and reseal it."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    change(manifest)
    reseal(bundle, json.dumps(manifest).encode())


def rename(bundle: Path, name: str, other: str) -> None:
    """Write another path wherever the manifest names a file."""
    old, new = json.dumps(name).encode(), json.dumps(other).encode()
    reseal(bundle, (bundle / MANIFEST).read_bytes().replace(old, new))


def forge(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file and its hash."""
    (bundle / name).write_bytes(data)
    (old,) = (file for file in json.loads((bundle / MANIFEST).read_bytes())["files"] if file["path"] == name)
    new = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, lambda manifest: manifest["files"].__setitem__(manifest["files"].index(old), new))


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def packed(payload: Payload, container: str) -> bytes:
    """Pickle a payload."""
    buffer = io.BytesIO()
    if container == "pickle":
        pickle.dump(payload, buffer)
    else:
        save = np.save if container == "npy" else np.savez
        save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    return buffer.getvalue()
