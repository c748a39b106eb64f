"""A bundle with a second quality level, made of another bundle's engines."""

from __future__ import annotations

from pathlib import Path

import msgspec

from unetc.artifacts.manifest import MANIFEST, Manifest
from unetc.compiler.store import write_bundle


def add_level(bundle: Path, folder: Path, name: str = "90%") -> None:
    """Copy a bundle, with a level that runs the first level's last engine throughout.

    Args:
        bundle: The bundle.
        folder: Folder of the copy.
        name: Name of the new level.
    """
    manifest = Manifest.load(bundle / MANIFEST)
    level = manifest.levels[0]
    phases = tuple(msgspec.structs.replace(phase, cycle=(len(level.plan.engines) - 1,)) for phase in level.plan.phases)
    other = msgspec.structs.replace(level, name=name, plan=msgspec.structs.replace(level.plan, phases=phases))
    write_bundle(
        folder,
        {record.path: bundle / record.path for record in manifest.files},
        lambda files: msgspec.structs.replace(manifest, levels=(*manifest.levels, other), files=files),
    )
