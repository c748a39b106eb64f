"""The text encoders of a bundle, which turn any prompt into conditions, without torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from threading import Lock
from typing import Any

import numpy as np

from unetc.arguments import texts, whole_number
from unetc.artifacts.manifest import BundleText, BundleTextEncoder
from unetc.backend import Array, Backend, SerialisedGraph
from unetc.call import CONTEXT, EXTRA_CHANNELS, POOLED, TIME_IDS, TIMESTEP_COND, CallSignature
from unetc.conditions import Conditions, read_scale
from unetc.errors import CorruptArtifactError, MissingDependency, SessionError, ShapeMismatch, brief
from unetc.models.prompts import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE, cut_note, list_prompts, size_numbers
from unetc.tensors import load_tensors

from .backends.registry import takes_graphs
from .bundle import Bundle
from .engine_pool import LoadedLater, let_go

TOKENS = "input_ids"
"""Name of the graphs' input, [1, length] int64."""

_END_OF_WORD = "</w>"
"""Ends the tokens of CLIP that end a word."""

_NO_EFFECT: Mapping[bool, str] = {
    False: (
        "the negative prompt has no effect: without guidance, which needs a scale above 1, the model does not read it"
    ),
    True: (
        "the negative prompt has no effect: the model reads the guidance scale itself and takes no negative prompt at "
        "any scale"
    ),
}
"""Notes on a negative prompt, by whether the denoiser reads the guidance scale itself."""

_KEPT = 256
"""Number of prompts whose states are kept."""


class TextEncoder:
    """The text encoders of a bundle; tokenizers and graphs are loaded when the first prompt is encoded."""

    def __init__(
        self,
        text: BundleText,
        encoders: Sequence[OneEncoder],
        *,
        calls: CallSignature,
        size: tuple[int, int],
        guidance_scale: float,
        lets_go: bool = False,
    ) -> None:
        """Put text encoders together; `open` reads them from a bundle.

        Args:
            text: The part of the manifest about them.
            encoders: One per encoder of the manifest.
            calls: The calls of the denoiser.
            size: Default height and width of images in pixels.
            guidance_scale: Default scale of classifier-free guidance.
            lets_go: Whether to release the graphs after every call, to save memory.
        """
        self._lets_go = lets_go
        self._text = text
        self._encoders = tuple(encoders)
        self._widths: Mapping[str, Any] = {item.name: item.axes[-1] for item in calls.conditions if item.axes}
        self._calls = calls
        self._size = size
        self._guidance_scale = guidance_scale

    @classmethod
    def open(cls, bundle: Bundle, backend: Backend, *, threads: int = 0, lets_go: bool = False) -> TextEncoder:
        """Read the text encoders of a bundle.

        Args:
            bundle: A bundle whose manifest has a `text`.
            backend: Backend that runs them; `takes_graphs` replaces a backend whose engines are built in advance.
            threads: Number of CPU threads of the other backend; 0 lets it choose.
            lets_go: Whether to release the graphs after every call, to save memory.

        Raises:
            SessionError: If the bundle has no text encoders.
        """
        manifest = bundle.manifest
        if manifest.text is None:
            raise SessionError(no_text(bundle))
        backend = takes_graphs(backend, threads=threads)
        usual = manifest.conditioning
        _, height, width = manifest.sample_shape
        scale = 1 if manifest.decoder is None else manifest.decoder.scale
        return cls(
            manifest.text,
            [
                OneEncoder(
                    one,
                    bundle.graphs[one.graph],
                    bundle.text[one.weights],
                    bundle.text[one.tokenizer],
                    backend,
                )
                for one in manifest.text.encoders
            ],
            calls=bundle.calls,
            size=(height * scale, width * scale),
            guidance_scale=1.0 if usual is None else usual.guidance_scale,
            lets_go=lets_go,
        )

    def encode(
        self,
        prompts: Sequence[str],
        *,
        negative: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Conditions:
        """Encode prompts as the model's pipeline does.

        A denoiser that reads the guidance scale itself gets it as `timestep_cond`; there are no negative conditions.

        Args:
            prompts: One prompt per row; a text alone is one prompt.
            negative: Negative prompts, one per row or one for all; the pipeline's own when not given. They need
                guidance.
            guidance_scale: Scale of classifier-free guidance; 1 or less means no guidance. The bundle's when not given.
            height: Height of the images in pixels; the model's own when not given. SDXL takes it as a condition.
            width: Width of the images in pixels.

        Returns:
            The conditions that the denoiser takes. Their notes name the words of prompts that are too long, and a
            negative prompt that has no effect.

        Raises:
            ShapeMismatch: If there is no prompt, or another number of negative prompts.
            SessionError: If the guidance scale is out of range, a value is no number, or a text encoder cannot be
                run.
            MissingDependency: If the library `tokenizers` is not installed.
        """
        scale = read_scale(self._guidance_scale if guidance_scale is None else guidance_scale)
        reads_scale = TIMESTEP_COND in self._widths
        guided = scale > 1 and not reads_scale
        prompts = list_prompts(prompts)
        others = self._negative(prompts, negative)
        size = (
            self._size[0] if height is None else whole_number("height", height),
            self._size[1] if width is None else whole_number("width", width),
        )
        own = self._values(prompts, size, AESTHETIC_SCORE)
        if reads_scale:
            own[TIMESTEP_COND] = np.repeat(self._embedded(scale), len(prompts), axis=0)
        opposite: dict[str, Any] = {}
        if guided:
            opposite = self._values(others or [""] * len(prompts), size, NEGATIVE_AESTHETIC_SCORE)
            if others is None and self._text.zero_negative:
                opposite |= {name: np.zeros_like(opposite[name]) for name in (CONTEXT, POOLED) if name in opposite}
        if self._lets_go:
            for encoder in self._encoders:
                encoder.let_go()
        read = [*prompts, *(others or ())] if guided else prompts
        notes = [note for encoder in self._encoders for note in encoder.cut(read)]
        if any(others or ()) and not guided:
            notes.append(_NO_EFFECT[reads_scale])
        return Conditions(
            own=own,
            negative=opposite,
            scale=scale if reads_scale else max(1.0, scale),
            size=size if TIME_IDS in self._widths else None,
            notes=tuple(dict.fromkeys(notes)),
            controlnet=self._calls.controlnet,
        )

    def _negative(self, prompts: Sequence[str], negative: Sequence[str] | None) -> list[str] | None:
        """Repeat a single negative prompt for every row."""
        if negative is None:
            return None
        others = [*texts("negative", negative, SessionError)]
        if len(others) == 1:
            others *= len(prompts)
        if len(others) != len(prompts):
            raise ShapeMismatch(
                f"there are {len(others)} negative prompts for {len(prompts)} prompts. Give one, or one per prompt."
            )
        return list_prompts(others)

    def _values(self, prompts: Sequence[str], size: tuple[int, int], score: float) -> dict[str, Any]:
        """Compute the conditions of prompts, by name."""
        states = [[encoder.states(prompt) for encoder in self._encoders] for prompt in prompts]
        values: dict[str, Any] = {
            CONTEXT: np.concatenate([np.concatenate([own for own, _ in row], axis=-1) for row in states])
        }
        if POOLED in self._widths:
            values[POOLED] = np.concatenate([pooled for row in states for _, pooled in row if pooled is not None])
        if TIME_IDS in self._widths:
            numbers = size_numbers(size, self._widths[TIME_IDS], score)
            values[TIME_IDS] = np.tile(np.array(numbers, np.float32), (len(prompts), 1))
        return values

    def _embedded(self, scale: float) -> Array:
        """Embed the guidance scale, [1, width], as `get_guidance_scale_embedding` of diffusers does."""
        angles = np.float32(scale - 1) * np.float32(1000) * np.array(self._text.frequencies, np.float32)
        values = np.concatenate([np.sin(angles, dtype=np.float64), np.cos(angles, dtype=np.float64)])
        padding = self._widths[TIMESTEP_COND] - len(values)
        return np.pad(values, (0, padding)).astype(np.float32)[None]


class OneEncoder:
    """One text encoder with its tokenizer."""

    def __init__(
        self, facts: BundleTextEncoder, graph: bytes, weights: bytes, tokenizer: bytes, backend: Backend
    ) -> None:
        """Keep the files; they are read when they are first needed.

        Args:
            facts: The part of the manifest about the encoder.
            graph: Its ONNX graph.
            weights: Its weights file.
            tokenizer: Its tokenizer, in the JSON of the library `tokenizers`.
            backend: Backend that runs the graph.
        """
        self._facts = facts
        self._json = tokenizer
        self._tokenizer: Any = None
        self._inversions: dict[str, str] = {}
        """Tokens of textual inversions with several vectors, and what to write in their place."""
        self._lock = Lock()
        self._kept: OrderedDict[str, tuple[Array, Array | None]] = OrderedDict()
        self._device = backend.device
        self._program = LoadedLater(
            lambda: backend.open_weights(weights).load(
                SerialisedGraph(graph=graph, weights=frozenset(load_tensors(weights)))
            )
        )

    def states(self, prompt: str) -> tuple[Array, Array | None]:
        """Compute the state of every token, [1, length, width], and of the whole prompt, [1, pooled] or None."""
        with self._lock:
            if prompt not in self._kept:
                self._kept[prompt] = self._computed(prompt)
            self._kept.move_to_end(prompt)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[prompt]

    def let_go(self) -> None:
        """Release the graph; it is loaded again for a prompt whose states are not known."""
        let_go(self._program, self._device)

    def _computed(self, prompt: str) -> tuple[Array, Array | None]:
        facts, device = self._facts, self._device
        tokens = self.tokens(prompt)
        with device.stream():
            states = device.empty((1, facts.length, facts.width))
            further = self._program({TOKENS: device.put(np.array([tokens], np.int64))}, states)
            if facts.pooled is None:
                return device.to_array(states), None
            pooled = next(map(device.to_array, further.values()), None)
            nothing = np.zeros((1, facts.pooled), np.float32)  # from a backend that computes nothing
            return device.to_array(states), nothing if pooled is None else pooled

    def tokens(self, prompt: str) -> list[int]:
        """Split a prompt into exactly the tokens that the encoder reads: cut or padded to its length."""
        tokens, length = self._split(prompt), self._facts.length
        if len(tokens) > length:
            tokens = [*tokens[: length - 1], tokens[-1]]
        return [*tokens, *[self._facts.padding] * (length - len(tokens))]

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Describe the prompts that have more tokens than the encoder reads."""
        notes = []
        for prompt in dict.fromkeys(prompts):
            tokens = self._split(prompt)
            if len(tokens) > self._facts.length:
                lost = self._read().decode(tokens[self._facts.length - 1 : -1], skip_special_tokens=True)
                words = lost.replace(_END_OF_WORD, " ").split()
                notes.append(cut_note(prompt, self._facts.length, " ".join(words)))
        return notes

    def _split(self, prompt: str) -> list[int]:
        """Split a prompt into tokens, with begin and end."""
        tokenizer = self._read()
        tokens: list[int] = tokenizer.encode(self._expanded(prompt)).ids
        return tokens

    def _expanded(self, prompt: str) -> str:
        """Write the further tokens of a textual inversion after its first: `<cat>` becomes `<cat> <cat>_1`.

        Source:
            `maybe_convert_prompt` in TextualInversionLoaderMixin of diffusers 0.42.1.
        """
        if not self._inversions:
            return prompt
        for token in dict.fromkeys(self._tokenizer.encode(prompt, add_special_tokens=False).tokens):
            prompt = prompt.replace(token, self._inversions.get(token, token))
        return prompt

    def _read(self) -> Any:
        """Read the tokenizer, once."""
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise MissingDependency("encoding prompts needs tokenizers: pip install 'unetc[text]'") from error
            try:
                tokenizer: Any = Tokenizer.from_str(self._json.decode())
            except Exception as error:  # the library raises the class Exception
                raise CorruptArtifactError(
                    f"{self._facts.tokenizer} is not a tokenizer: {brief(error)}. Build the bundle again."
                ) from error
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._inversions = _inversions(tokenizer)
            self._tokenizer = tokenizer
        return self._tokenizer


def _inversions(tokenizer: Any) -> dict[str, str]:
    """List the added tokens that others continue, with all of them: `<cat>` with `<cat> <cat>_1`."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    found = {}
    for token in added:
        further = list(takewhile(added.__contains__, (f"{token}_{i}" for i in count(1))))
        if further:
            found[token] = " ".join([token, *further])
    return found


def no_text(bundle: Bundle) -> str:
    """Describe that a bundle cannot encode prompts."""
    if bundle.manifest.conditioning is None or CONTEXT not in bundle.calls.names:
        return f"{bundle.path} takes no prompts: its model is not conditioned on text."
    known = ", ".join(map(repr, bundle.manifest.conditioning.prompts[:4]))
    if EXTRA_CHANNELS in bundle.calls.names:
        return (
            f"{bundle.path} takes an image with every prompt, so it takes only the prompts that it was built with: "
            f"{known} and so on. For other prompts and images, use unetc.diffusers in the model's pipeline."
        )
    return (
        f"{bundle.path} has no text encoders, so it takes only the prompts that it was built with: {known} and so on. "
        "Build it with --text."
    )
