"""The page of schedulers is up to date."""

from __future__ import annotations

from pathlib import Path

from unetc.compiler.schedulers.page import page

PAGE = Path(__file__).parents[3] / "docs/schedulers.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m unetc.compiler.schedulers.page docs/schedulers.md"
