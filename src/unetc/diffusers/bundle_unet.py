"""The module that a pipeline takes for its UNet."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeGuard

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from unetc.artifacts.manifest import DIGEST, MANIFEST
from unetc.artifacts.record import write_atomically
from unetc.compiler.store import check_destination
from unetc.compiler.whole_folder import written_whole
from unetc.conditions import Conditions
from unetc.controlnet import PREFIX
from unetc.errors import ArtifactError, SessionError
from unetc.runtime.backends.registry import Memory
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session, backend_for

from .refusals import (
    CHANGE_LAYERS,
    HARMLESS,
    LISTS_OF_LAYERS,
    SAME_PROCESSORS,
    Refused,
    does_nothing,
    refusal,
    refusal_of_lookup,
    refused_names,
    warns_of_no_layers,
)
from .trajectories import Call, Place, Trajectories

_KEPT = frozenset(
    {
        "config",
        "config_name",
        "device",
        "dtype",
        "from_pretrained",
        "has_compatibles",
        "ignore_for_config",
        "is_gradient_checkpointing",
        "register_to_config",
        "save_pretrained",
        "set_attn_processor",
        "to_json_file",
        "to_json_string",
    }
)
"""Public names of UNets that work."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Where torch keeps the hooks around the call of a module."""

_INTERFACE = "_interface"
"""Name of the only parameter: empty, with the element type and the device for the latents of pipelines."""

_FULL_MODEL, _LEVEL = "full_model", "level"
"""Keys of the configuration in a saved folder."""


class _Kind(type):
    """Makes a class of drop-ins equal to the UNet's class, because `from_pipe` of diffusers compares them."""

    original: type | None = None
    """The UNet's class in diffusers."""

    def __eq__(cls, other: object) -> bool:
        """Compare with a class."""
        return cls is other or (cls.original is not None and cls.original is other)

    __hash__ = type.__hash__


class BundleUNet(ModelMixin, ConfigMixin, metaclass=_Kind):  # type: ignore[misc]  # diffusers has no types
    """A bundle with the interface of a UNet of diffusers; it computes on the device of the bundle's target.

    `dtype` and `device` follow `to`, as pipelines make their latents with them. Samples are converted on the way in and
    out. Trajectories may take turns, also in several threads: see `unetc.diffusers.trajectories`. Calls are made one
    after another. An instance is one of the original UNet's class too, without its layers.

    The damage in the bundle's manifest holds for sampling from noise over the bundle's steps. Image to image, other
    schedulers and other numbers of steps have another damage. A pipeline's scheduler has no rows that are tuned to the
    plan, so `plain_damage` of the quality level holds here.
    """

    config_name = "config.json"

    def __new__(cls, session: Session, denoiser: str, *values: object, **options: object) -> Self:
        """Make an instance of the original UNet's class too."""
        made: Self = super().__new__(_KINDS[denoiser])
        return made

    def __init__(
        self,
        session: Session,
        denoiser: str,
        config: Mapping[str, Any],
        *,
        full_model: bool = False,
        level: str | None = None,
        bundle: Path | None = None,
    ) -> None:
        """Wrap a session in a module.

        Args:
            session: Session that runs the engines.
            denoiser: Class of the original UNet in diffusers.
            config: Its configuration.
            full_model: Whether to run the full model at every step.
            level: Quality level of the session, for `save_pretrained`; None for the default level.
            bundle: Folder of the bundle, for `save_pretrained`.
        """
        ModelMixin.__init__(self)  # and not the UNet's, which would make its layers
        assert session.calls is not None  # every bundle has them
        self._calls = session.calls
        original = getattr(diffusers, denoiser)
        parameters = inspect.signature(original.__init__).parameters
        defaults = {name: item.default for name, item in parameters.items() if item.default is not item.empty}
        self.register_to_config(**{**defaults, **config})
        self._arguments = inspect.signature(original.forward)
        self._denoiser = denoiser
        self._bundle = bundle
        self._session = session
        self._full_model = full_model
        self._level = level
        self._lock = threading.Lock()
        reuses = not full_model and any(engine.reused or engine.halves for engine in session.plan.engines)
        self._trajectories = Trajectories(lambda: session.rollout(full_model=full_model), reuses=reuses)
        # A parameter, as libraries ask the first one of a module for its device and type.
        self._parameters[_INTERFACE] = nn.Parameter(torch.empty(0), requires_grad=False)
        if self.config.get("addition_embed_type") == "text_time":  # SDXL pipelines compare this width with their own
            width = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def __getattr__(self, name: str) -> Any:
        """Find the only parameter; refuse the layers and the private methods of a UNet by name."""
        if name == _INTERFACE and name in (parameters := self.__dict__.get("_parameters", {})):
            return parameters[name]
        raise refusal_of_lookup(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse layers, which no engine would run."""
        if isinstance(value, nn.Module | nn.Parameter):
            raise refusal(name)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Share the engines, and no trajectory."""
        own = type(self)(
            self._session,
            self._denoiser,
            self.config,
            full_model=self._full_model,
            level=self._level,
            bundle=self._bundle,
        )
        own.to(self.device, self.dtype)
        own.train(self.training)
        for name in _HOOKS:
            setattr(own, name, copy.copy(getattr(self, name)))
        memo[id(self)] = own
        return own

    def __copy__(self) -> Self:
        """Share the engines, and no trajectory."""
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be pickled: an engine belongs to its process."""
        raise refusal("pickled form")

    @property
    def dtype(self) -> torch.dtype:
        """Element type for the latents of pipelines."""
        dtype: torch.dtype = self._interface.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device for the latents of pipelines."""
        device: torch.device = self._interface.device
        return device

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Change nothing: a bundle has nothing to train."""
        return self

    def reset(self) -> None:
        """Begin a new trajectory at the next call."""
        with self._lock:
            self._trajectories.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile leaves the call as it is
    def forward(self, *values: Any, **named: Any) -> UNet2DConditionOutput | UNet2DOutput | tuple[Tensor]:
        """Predict as the denoiser would, up to the treatments of the plan.

        Args:
            values: Arguments of the original UNet's `forward`, in its order.
            named: The same by name. `timestep` must be the same for all samples. Arguments without effect on the
                prediction of this bundle must be None or empty.

        Returns:
            The prediction, [batch, channel, height, width], on the device and in the type of `sample`, in an object
            with the attribute `sample`, or in a tuple with `return_dict=False`.

        Raises:
            SessionError: If the pipeline passes an argument that engines cannot take, or omits one that they need, if
                a timestep is outside the bundle's range, or if a gradient is expected.
            NonFiniteError: If the full model, which repeats every non-finite step, produces NaN or infinity itself.
        """
        given = self._arguments.bind(self, *values, **named).arguments
        given.pop("self")
        as_object = given.pop("return_dict", True)
        sample, timestep = given.pop("sample"), given.pop("timestep")
        if not _has_data(sample) or not sample.is_floating_point():
            raise SessionError(f"the sample is {_kind(sample)}. Expected a torch tensor of real numbers.")
        _refuse_gradient([sample, timestep, given])
        own, conditions = self._calls.of_unet_call(sample, _harmless_removed(given))
        for name, value in conditions.items():
            if not _has_data(value):
                raise SessionError(f"{name} is {_kind(value)}. Expected a torch tensor of numbers.")
        arrays = self._calls.read({name: _to_array(value) for name, value in conditions.items()})
        array = _to_array(own, copied=True)  # the trajectory keeps it, and the caller may write over the sample
        arrays = self._calls.fill(arrays, len(array))
        self._calls.check(array, arrays)
        value = _one_of(timestep, len(array))
        constant = {name: array for name, array in arrays.items() if not name.startswith(PREFIX)}
        call = Call(
            sample=array,
            dtype=sample.dtype,
            timestep=value,
            log_snr=self._session.scheduler.log_snr_at(value),
            place=Place.of(timestep),
            conditions=Conditions(own=constant).sha256(),
        )
        with self._lock:
            predicted = self._predict(call, arrays)
        prediction = torch.from_numpy(predicted).to(sample, copy=True)  # the trajectory keeps its own
        if not as_object:
            return (prediction,)
        kind = UNet2DOutput if self._denoiser == "UNet2DModel" else UNet2DConditionOutput
        return kind(sample=prediction)

    def _predict(self, call: Call, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Call the engine for a call's place in its trajectory."""
        device = self._session.device
        conditions = Conditions(own=arrays, controlnet=self._session.conditions.controlnet).on(device)
        trajectory = self._trajectories.of(call)
        try:
            predicted = trajectory.rollout.predict(
                device.put(call.sample),
                call.timestep,
                call.log_snr,
                conditions,
                paired=call.repeats,
                halve=trajectory.guided,
            )
            prediction = device.to_array(predicted)
        except BaseException:
            self._trajectories.drop(trajectory)
            raise
        self._trajectories.add(trajectory, prediction)
        return prediction

    def set_attn_processor(self, processor: Any) -> None:
        """Accept processors that compute the same attention in another way; they change nothing.

        Args:
            processor: A processor, or processors by layer.

        Raises:
            SessionError: If a processor computes something else.
        """
        for one in processor.values() if isinstance(processor, Mapping) else (processor,):
            if type(one).__name__ not in SAME_PROCESSORS:
                raise refusal(f"attention processor of class {type(one).__name__}")

    def save_pretrained(self, save_directory: str | Path, *, variant: str | None = None, **options: object) -> None:
        """Copy the bundle, so that `from_pretrained` of a pipeline finds it; `unetc.diffusers` must be imported there.

        Args:
            save_directory: Folder to write.
            variant: Becomes a part of the name of the bundle's folder.
            options: Options of diffusers about the weights of a UNet; a bundle's weights are copied as they are.

        Raises:
            ArtifactError: If the bundle has changed since it was opened, or the folder cannot be written.
        """
        if (source := self._bundle) is None:
            raise ArtifactError("this drop-in was not loaded from a bundle, so there is nothing to save.")
        names = [*(file.path for file in Bundle.open(source).manifest.files), DIGEST, MANIFEST]
        folder = Path(save_directory)
        bundle = folder / _saved(variant)
        check_destination(bundle)
        with written_whole(bundle, "bundle") as temporary:
            for name in names:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, temporary / name)
        settings = {"_class_name": type(self).__name__, _FULL_MODEL: self._full_model, _LEVEL: self._level}
        write_atomically(folder / self.config_name, json.dumps(settings, indent=2).encode())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, subfolder: str | None = None, variant: str | None = None, **options: Any
    ) -> Self:
        """Load a bundle that a pipeline saved; the settings of the target are the bundle's own.

        Args:
            folder: The folder.
            subfolder: Folder within it.
            variant: As it was saved.
            options: Options of diffusers. Only the element type has an effect: that of the interface.

        Raises:
            ArtifactError: If the folder holds no such bundle, or the bundle is damaged.
        """
        path = Path(folder) / subfolder if subfolder else Path(folder)
        try:
            settings = json.loads((path / cls.config_name).read_text())
            full_model, level = bool(settings[_FULL_MODEL]), settings.get(_LEVEL)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"cannot read {path / cls.config_name}: {error}. Save the pipeline again.") from error
        loaded = cls._load(path / _saved(variant), level=level, full_model=full_model)
        dtype = options.get("torch_dtype") or options.get("dtype")
        if isinstance(dtype, torch.dtype):
            loaded.to(dtype)
        return loaded

    @classmethod
    def _load(
        cls,
        path: Path,
        *,
        level: str | None = None,
        target: str | None = None,
        threads: int | None = None,
        memory: Memory | str = Memory.FAST,
        full_model: bool = False,
    ) -> Self:
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        backend = backend_for(manifest, target=target, threads=threads, memory=memory)
        session = Session.of(bundle, backend, level=level)
        denoiser, config = manifest.model.denoiser, manifest.denoiser_config
        loaded = cls(session, denoiser, config, full_model=full_model, level=level, bundle=path)
        loaded.eval()
        return loaded


for _name in LISTS_OF_LAYERS:
    setattr(BundleUNet, _name, warns_of_no_layers(_name))
for _name in HARMLESS:
    setattr(BundleUNet, _name, does_nothing(_name))
for _name in {*refused_names(_KEPT), *CHANGE_LAYERS}:
    setattr(BundleUNet, _name, Refused(_name))


def _kind_of(original: Any) -> type[BundleUNet]:
    """Make the class of drop-ins for a class of UNets; saved pipelines know all of them as `BundleUNet`."""
    methods = {name for name in set(dir(original)) - set(dir(BundleUNet)) if callable(getattr(original, name))}
    body = {"original": original, "__module__": __name__, "__doc__": BundleUNet.__doc__}
    kind: Any = _Kind(
        BundleUNet.__name__, (BundleUNet, original), {**{name: Refused(name) for name in methods}, **body}
    )
    made: type[BundleUNet] = kind
    return made


_KINDS = {original.__name__: _kind_of(original) for original in (diffusers.UNet2DConditionModel, diffusers.UNet2DModel)}


def load(
    path: str | Path,
    *,
    level: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    memory: Memory | str = Memory.FAST,
    full_model: bool = False,
) -> BundleUNet:
    """Open a bundle as the denoiser of a pipeline.

    Assign it to `pipe.unet`, or pass it to `from_pretrained(folder, unet=...)`, which then needs no original weights.

    Args:
        path: The bundle's folder.
        level: Name of a quality level, such as "40%"; the level of the smallest budget when not given.
        target: Target to run on; by default the target of the build.
        threads: Number of CPU threads; by default the number used for the measurements. 0 lets the backend choose.
        memory: "fast" or "low", see `unetc.runtime.backends.registry.Memory`.
        full_model: Whether to run the full model at every step.

    Raises:
        ArtifactError: If the bundle cannot be read or is damaged.
        SessionError: If the level, the target or the memory mode is unknown.
        MissingDependency: If the backend's library is not installed.
    """
    return BundleUNet._load(
        Path(path), level=level, target=target, threads=threads, memory=memory, full_model=full_model
    )


def _saved(variant: str | None) -> str:
    """Name the folder of a saved bundle; diffusers wants a dot in every name, with the variant after the first."""
    return ".".join(["bundle", *([variant] if variant else []), "unetc"])


def _harmless_removed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove arguments whose value changes nothing: a LoRA scale of 1."""
    attention = arguments.get("cross_attention_kwargs")
    if isinstance(attention, Mapping) and dict(attention) == {"scale": 1.0}:
        return {name: value for name, value in arguments.items() if name != "cross_attention_kwargs"}
    return arguments


def _refuse_gradient(values: Sequence[object]) -> None:
    """Refuse calls whose result would silently lack a gradient."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors_in(values)):
        raise SessionError(
            "a gradient is wanted, but none passes through engines. Call the pipeline under torch.no_grad(), or use "
            "the pipeline's original UNet for guidance by gradients and for training."
        )


def _tensors_in(value: object) -> Iterator[Tensor]:
    """List the tensors in a value, in mappings and sequences too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for one in value:
            yield from _tensors_in(one)


def _one_of(timestep: Tensor | float, batch: int) -> float:
    """Return the only timestep of a call, which has one for each of a batch or one for all."""
    elements = _floats(timestep)
    if elements is None:
        raise SessionError(f"the timestep is {_kind(timestep)}. Expected a number, or a tensor of numbers.")
    if len(elements) not in (1, batch):
        raise SessionError(
            f"the timestep has {len(elements)} elements. Expected one, or one for each of the {batch} samples."
        )
    if len(values := set(elements)) != 1:
        raise SessionError(f"one call has the timesteps {sorted(values)}. Expected one timestep for all samples.")
    return values.pop()


def _floats(value: Tensor | float) -> list[float] | None:
    """Read a number or a tensor of numbers; None for any other kind of value."""
    if isinstance(value, Tensor) and not _has_data(value):
        return None
    try:
        return [float(one) for one in torch.as_tensor(value).flatten()]
    except (RuntimeError, TypeError, ValueError):
        return None


def _has_data(value: object) -> TypeGuard[Tensor]:
    """Check whether a value is a tensor that an array can have the elements of."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested or value.is_quantized)
    )


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of class {type(value).__name__}"
    if value.is_meta:
        return "a tensor on the meta device, without data"
    layout = "" if _has_data(value) else "sparse, nested or quantized "
    return f"a {layout}tensor of {value.dtype}"


def _to_array(tensor: Tensor, *, copied: bool = False) -> NDArray[Any]:
    """Convert to a C-contiguous float32 or integer array; copies only if needed or wanted."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    array: NDArray[Any] = tensor.detach().to("cpu", dtype, copy=copied).contiguous().numpy(force=True)
    return array
