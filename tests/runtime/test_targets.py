"""An unknown target is refused, with the closest existing ones."""

from __future__ import annotations

import pytest

from unetc.errors import SessionError
from unetc.runtime.backends.registry import open_backend


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("cuda", "Close ones: torch:cuda, torch:cuda:compiled, onnxruntime:cuda."),
        ("tensorrt_rtx", "Close ones: tensorrt-rtx."),
        ("torch", "torch:cpu"),
        ("Torch:CPU", "Close ones: torch:cpu"),
        ("tensorrt-rtx:fp32", "A target without a suffix is one of fp32: tensorrt-rtx."),
        ("abacus", "Available: onnxruntime:cpu, torch:cpu, torch:cpu:compiled, torch:cuda, "),
    ],
)
def test_an_unknown_target_is_refused_with_the_closest_ones(target: str, advice: str) -> None:
    with pytest.raises(SessionError) as caught:
        open_backend(target, threads=1)
    message = str(caught.value)
    assert message.startswith(f"no backend for target {target!r}. ")
    assert advice in message
    assert message.endswith("`unetc doctor` lists all.")
    assert "null" not in message
    assert len(message) < 250


def test_the_null_target_exists_but_is_not_offered() -> None:
    assert open_backend("null", threads=1).device is not None
    with pytest.raises(SessionError, match=r"Available: onnxruntime:cpu, (?!.*null)"):
        open_backend("nul", threads=1)
