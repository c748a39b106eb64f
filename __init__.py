"""Import a clone called `unetc` from the folder above it.

Python looks in the folder of a script first. Where that folder holds a clone called `unetc`, `import unetc` finds the
clone before the finder of an editable installation, and without this file it makes an empty namespace package of it.
This file hands over to the package in `src/unetc`. It is part of no installation.
"""

import importlib.util
import sys
from pathlib import Path

if __name__ == "unetc":
    _root = Path(__file__).resolve().parent
    _spec = importlib.util.spec_from_file_location(
        __name__,
        _root / "src" / "unetc" / "__init__.py",
        # the root too: it holds the stages where a file system has no links
        submodule_search_locations=[str(_root / "src" / "unetc"), str(_root)],
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
