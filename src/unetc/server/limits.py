"""Limits of values that clients send, and of requests where nobody sets others."""

from __future__ import annotations

LARGEST_SEED = 2**63 - 1
LARGEST_WHOLE = 2**63 - 1
"""Largest whole number in a body: Python fails to print or to divide numbers of thousands of digits."""
MOST_DIGITS = 18
"""Most digits of a number in a header or a prompt."""
DRAWN_SEEDS = 2**32
"""Seeds that are drawn for requests without one: short enough to type."""
LARGEST_SCALE = 100.0
"""Largest guidance scale."""
MOST_IMAGES = 16
"""Most images of a request."""
LONGEST_PROMPT = 4000
"""Most characters of a prompt."""
