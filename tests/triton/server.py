"""Triton at its documented boundary: a repository's models in onnxruntime, and `triton_python_backend_utils`.

Every request is held to the configuration, as Triton does: names, types, sizes, the largest batch, and reshapes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from tests.triton.schema import parse, type_name

NUMPY: Mapping[str, Any] = {
    "TYPE_FP32": np.float32,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_UINT8": np.uint8,
    "TYPE_STRING": np.object_,
}
ONNX: Mapping[str, str] = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)", "TYPE_INT32": "tensor(int32)"}

Arrays = Mapping[str, NDArray[Any]]


class Refused(Exception):
    """Triton would not pass a request on, or an answer back."""


def check(config: Any, described: Any, array: NDArray[Any], rows: int | None) -> None:
    """Hold a tensor to an input or output of a configuration."""
    if array.dtype != NUMPY[type_name(described.data_type)]:
        raise Refused(f"{config.name}: {described.name} is {array.dtype}")
    shape = array.shape if rows is None else array.shape[1:]
    fits = len(shape) == len(described.dims)
    fits = fits and all(dim in (-1, size) for dim, size in zip(described.dims, shape, strict=True))
    if not fits or (rows is not None and array.shape[0] != rows):
        raise Refused(f"{config.name}: {described.name} has shape {array.shape}, expected {[*described.dims]}")


class OnnxModel:
    """One model of the onnxruntime backend."""

    def __init__(self, folder: Path) -> None:
        self.config = parse((folder / "config.pbtxt").read_text())
        assert self.config.name == folder.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "1/model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.calls: list[int] = []
        """Rows of every request."""
        pairs = (self.config.input, self.session.get_inputs()), (self.config.output, self.session.get_outputs())
        for described, real in pairs:
            assert [one.name for one in described] == [one.name for one in real]
            for one, own in zip(described, real, strict=True):
                self._compare(one, own)

    def _compare(self, described: Any, real: Any) -> None:
        """Compare a configuration with the graph as onnxruntime has read it."""
        assert real.type == ONNX[type_name(described.data_type)]
        sizes = [-1 if isinstance(size, str) else size for size in real.shape]
        if self.config.max_batch_size:
            assert sizes[0] == -1, "Triton demands a free batch"
            sizes = sizes[1:]
        if described.HasField("reshape"):
            assert ([*described.dims], [*described.reshape.shape]) == ([1], sizes)
        else:
            assert [*described.dims] == sizes
            assert sizes, "Triton demands a size after the batch"

    def infer(self, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run a request."""
        config = self.config
        if {*inputs} != {one.name for one in config.input}:
            raise Refused(f"{config.name}: unexpected inputs {sorted(inputs)}")
        rows = len(next(iter(inputs.values()))) if config.max_batch_size else None
        if rows is not None and not 1 <= rows <= config.max_batch_size:
            raise Refused(f"{config.name}: {rows} rows, at most {config.max_batch_size}")
        given = {}
        for one in config.input:
            check(config, one, inputs[one.name], rows)
            given[one.name] = inputs[one.name][:, 0] if one.HasField("reshape") else inputs[one.name]
        self.calls.append(rows or 1)
        names = [one.name for one in config.output]
        found = dict(zip(names, self.session.run(names, given), strict=True))
        for one in config.output:
            check(config, one, found[one.name], rows)
        return {name: found[name] for name in outputs}

    def warm_up(self) -> None:
        """Make the calls that the configuration asks for."""
        for one in self.config.model_warmup:
            inputs = {
                name: np.zeros((one.batch_size, *own.dims), NUMPY[type_name(own.data_type)])
                for name, own in one.inputs.items()
            }
            assert all(own.zero_data for own in one.inputs.values())
            self.infer(inputs, [])


class Tensor:
    """`pb_utils.Tensor`."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, np.ascontiguousarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class TritonError:
    """`pb_utils.TritonError`."""

    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class InferenceResponse:
    """`pb_utils.InferenceResponse`."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = [*output_tensors], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Server:
    """All models of a repository."""

    def __init__(self, repository: Path | None = None) -> None:
        self.models: dict[str, OnnxModel] = {}
        self._sampling: Any = None
        self._config: Any = None
        folders = [] if repository is None else sorted(path for path in repository.iterdir() if path.is_dir())
        for folder in folders:
            config = parse((folder / "config.pbtxt").read_text())
            if config.platform == "onnxruntime_onnx":
                self.models[folder.name] = OnnxModel(folder)
            else:
                assert config.backend == "python"
                assert self._config is None
                self._config = config
        if repository is not None:
            with self.imported():
                self._sampling = self._open(repository / self._config.name)

    @property
    def utilities(self) -> Any:
        """The module `triton_python_backend_utils`."""
        server = self

        class InferenceRequest:
            """`pb_utils.InferenceRequest`, with the arguments that the documentation names."""

            def __init__(
                self,
                *,
                model_name: str,
                requested_output_names: list[str],
                inputs: list[Tensor],
                model_version: int = -1,
                preferred_memory: object = None,
            ) -> None:
                assert model_version in (-1, 1)
                assert preferred_memory == ("CPU", 0)
                self._name, self._outputs, self._inputs = model_name, requested_output_names, inputs

            def exec(self) -> InferenceResponse:
                """Run the model and wait."""
                try:
                    inputs = {tensor.name(): tensor.as_numpy() for tensor in self._inputs}
                    found = server.models[self._name].infer(inputs, self._outputs)
                except Refused as error:
                    return InferenceResponse(error=TritonError(str(error)))
                return InferenceResponse([Tensor(name, array) for name, array in found.items()])

        def find(tensors: Sequence[Tensor], name: str) -> Tensor | None:
            return next((tensor for tensor in tensors if tensor.name() == name), None)

        return SimpleNamespace(
            Tensor=Tensor,
            TritonError=TritonError,
            InferenceRequest=InferenceRequest,
            InferenceResponse=InferenceResponse,
            PreferredMemory=lambda kind, device=0: (kind, device),
            TRITONSERVER_MEMORY_CPU="CPU",
            get_input_tensor_by_name=lambda request, name: find(request.inputs(), name),
            get_output_tensor_by_name=lambda response, name: find(response.output_tensors(), name),
        )

    @contextmanager
    def imported(self) -> Iterator[None]:
        """Let `import triton_python_backend_utils` find the stub, as in Triton's processes alone."""
        module = ModuleType("triton_python_backend_utils")
        vars(module).update(vars(self.utilities))
        sys.modules[module.__name__] = module
        try:
            yield
        finally:
            del sys.modules[module.__name__]

    def _open(self, folder: Path) -> Any:
        """Load model.py as the Python backend does."""
        spec = spec_from_file_location("exported_model", folder / "1/model.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize({"model_repository": str(folder), "model_version": "1"})
        return model

    def execute(self, *requests: Arrays, outputs: Sequence[str] = ("images", "seed", "samples")) -> list[Any]:
        """Send requests to the model that samples, in one call."""
        known = {one.name: one for one in self._config.input}
        for request in requests:
            if unknown := request.keys() - known.keys():
                raise Refused(f"unexpected inputs {sorted(unknown)}")
            for name, array in request.items():
                check(self._config, known[name], array, None)
        assert all(one.optional for one in known.values())
        tensors = [[Tensor(name, array) for name, array in request.items()] for request in requests]
        asked = [
            SimpleNamespace(inputs=lambda own=own: own, requested_output_names=lambda: list(outputs)) for own in tensors
        ]
        responses: list[Any] = self._sampling.execute(asked)
        assert len(responses) == len(requests)
        return responses

    def infer(self, *, outputs: Sequence[str] = ("images", "seed", "samples"), **values: Any) -> dict[str, Any]:
        """Send one request with scalars or lists as inputs, and hold the answer to the configuration."""
        known = {one.name: one for one in self._config.input}
        inputs = {name: tensor_of(value, type_name(known[name].data_type)) for name, value in values.items()}
        (response,) = self.execute(inputs, outputs=outputs)
        if response.has_error():
            raise Refused(f"{response.error().code()}: {response.error().message()}")
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        for one in self._config.output:
            if one.name in found:
                check(self._config, one, found[one.name], None)
        return found


def tensor_of(value: Any, kind: str) -> NDArray[Any]:
    """Make a tensor of a scalar or a list; text becomes bytes."""
    listed = value if isinstance(value, list) else [value]
    return np.array([one.encode() if isinstance(one, str) else one for one in listed], NUMPY[kind])
