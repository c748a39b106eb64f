"""A bundle on a backend: every graph is loaded once, however many plans share it."""

from __future__ import annotations

from functools import cached_property, partial

from unetc.artifacts.manifest import BundleEngine
from unetc.backend import Backend, Program, TargetBackend
from unetc.precision import Precision
from unetc.runtime.backends.registry import takes_graphs

from .bundle import Bundle
from .decoder import Decoder
from .encoder import Encoder
from .engine_pool import LoadedLater, tried
from .text import TextEncoder


class LoadedBundle:
    """Loads the graphs of a bundle for the sessions that share them."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        """Take the weights; no graph is loaded yet.

        Args:
            bundle: The bundle.
            backend: Runs its graphs.
        """
        self.bundle = bundle
        self.backend = backend
        target = backend if isinstance(backend, TargetBackend) else None
        self._reads = target.reads if target else Precision.FP32
        self._exact = target.exact() if target else None
        self._loader = backend.open_weights(bundle.weights)
        self._programs: dict[str, Program] = {}

    def program(self, engine: BundleEngine) -> Program:
        """Load the graph of an engine, or return the program that was loaded for it before."""
        if engine.graph not in self._programs:
            self._programs[engine.graph] = tried(self._loader.load(self.bundle.graph_of(engine, self._reads)))
        return self._programs[engine.graph]

    @property
    def full(self) -> Program:
        """The full model; loaded when it is first called, unless it is an engine of a session anyway."""
        return self._programs.get(self.bundle.manifest.full.graph, self._full_later)

    @cached_property
    def _full_later(self) -> Program:
        return LoadedLater(partial(self._loader.load, self.bundle.graph_of(self.bundle.manifest.full, self._reads)))

    @cached_property
    def exact(self) -> Program | None:
        """The full model in float32, loaded when it is first called; None if the backend computes in float32."""
        if (backend := self._exact) is None:
            return None
        full = self.bundle.graph_of(self.bundle.manifest.full)
        return LoadedLater(lambda: backend.open_weights(self.bundle.weights).load(full))

    @cached_property
    def decoder(self) -> Decoder | None:
        """The decoder; None if samples are images."""
        own, shape = self.bundle.manifest.decoder, self.bundle.manifest.sample_shape
        return Decoder(self.bundle.graphs[own.graph], own.scale, self.backend, shape) if own else None

    @cached_property
    def encoder(self) -> Encoder | None:
        """The encoder of images; None if samples are images, or the bundle has none."""
        own, channels = self.bundle.manifest.encoder, self.bundle.manifest.sample_shape[0]
        if own is None:
            return None
        graph = self.bundle.graphs[own.graph]
        return Encoder(graph, own.scale, channels, self._around, lets_go=self._streams)

    @cached_property
    def text(self) -> TextEncoder | None:
        """The text encoders; None if the bundle has none."""
        manifest = self.bundle.manifest
        if manifest.text is None:
            return None
        return TextEncoder.open(self.bundle, self._around, threads=manifest.threads, lets_go=self._streams)

    @property
    def _streams(self) -> bool:
        """Whether the programs are on the device only while they are needed, to save memory."""
        return any(isinstance(program, LoadedLater) for program in self._programs.values())

    @cached_property
    def _around(self) -> Backend:
        """Backend of the graphs that are not engines."""
        return takes_graphs(self.backend, threads=self.bundle.manifest.threads)
