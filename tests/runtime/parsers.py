"""Functions that read the contents of a bundle, for tests that only verified contents are read."""

from __future__ import annotations

import numpy as np
import onnxruntime

import unetc.runtime.bundle
from unetc.sampler.table import SchedulerTables

PARSERS = (
    (unetc.runtime.bundle, "load_tensors"),
    (np, "load"),
    (SchedulerTables, "from_array"),
    (onnxruntime, "InferenceSession"),
)
"""Owner and name of each."""
