"""An unknown target is refused, with the closest existing ones."""

from __future__ import annotations

import pytest
import torch

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


def test_torch_chooses_its_threads_again_where_no_number_is_given() -> None:
    own = torch.get_num_threads()
    try:
        for threads, expected in ((0, own), (own + 2, own + 2), (own + 1, own + 1), (0, own), (own + 2, own + 2)):
            open_backend("torch:cpu", threads=threads)
            assert torch.get_num_threads() == expected
        torch.set_num_threads(own + 3)  # by other code of the process
        open_backend("torch:cpu", threads=0)
        assert torch.get_num_threads() == own + 3
    finally:
        torch.set_num_threads(own)
