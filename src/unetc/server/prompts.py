"""Prompts and class labels of requests, as conditions of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unetc.artifacts.classes import Classes
from unetc.call import CLASS_LABELS, TIMESTEP_COND
from unetc.class_labels import encode_labels
from unetc.conditions import Conditions
from unetc.errors import RequestError
from unetc.runtime.bundle import Bundle
from unetc.runtime.text import TextEncoder

from .limits import MOST_DIGITS

_SHOWN = 20
"""Prompts of a bundle that a message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The contents of images, as a request describes them."""

    prompt: str | None
    negative_prompt: str | None
    label: int | None
    guidance_scale: float | None
    indices: Sequence[int]
    """Index of each image within its seed. Where the request names no prompt and no label, image k of a seed has row k
    of the bundle's own conditions, whatever other fields it names."""
    size: tuple[int, int]
    """Height and width of the images in pixels."""


class PromptReader:
    """Turns prompts and labels into conditions, as far as a bundle can."""

    def __init__(self, bundle: Bundle, encoder: TextEncoder | None) -> None:
        """Read the prompts of a bundle.

        Args:
            bundle: The bundle.
            encoder: Encodes free prompts; None to take only the bundle's own.
        """
        self._own = bundle.conditions
        self._classes = bundle.calls.classes
        conditioning = bundle.manifest.conditioning
        self.prompts = () if conditioning is None or self._classes is not None else conditioning.prompts
        """The bundle's own prompts; empty for a model without prompts."""
        self.guidance_scale = 1.0 if conditioning is None else conditioning.guidance_scale
        """Guidance scale of requests that name none."""
        self._encoder = encoder

    @property
    def classes(self) -> Classes | None:
        """Classes of a class-conditional model; None for others."""
        return self._classes

    @property
    def guided(self) -> bool:
        """Whether a request may name a guidance scale."""
        if self._classes is not None:
            return self._classes.no_class is not None
        return self.free or bool(self.prompts)

    @property
    def free(self) -> bool:
        """Whether any prompt can be encoded."""
        return self._encoder is not None

    def read(self, wanted: Wanted) -> Conditions | None:
        """Make one row of conditions per image; None stands for the bundle's own. Encoding may take a while.

        Raises:
            RequestError: If the bundle cannot take the prompt, the label or the scale.
        """
        if self._classes is not None:
            return self._labelled(wanted, self._classes)
        if wanted.label is not None:
            raise RequestError("this model has no classes. Omit label.", "label")
        if not self.prompts and self._encoder is None:
            self._refuse_prompts(wanted)
            return None
        if wanted.prompt is None and not self._must_encode(wanted):
            return None if wanted.guidance_scale is None else self._scaled(self._rows(wanted), wanted.guidance_scale)
        if self._encoder is not None:
            return self._encoded(self._encoder, wanted)
        if wanted.negative_prompt:
            raise RequestError(
                "this bundle has no text encoder, so negative prompts cannot be encoded. Omit negative_prompt.",
                "negative_prompt",
            )
        rows = self._own.take([self._index(wanted.prompt)] * len(wanted.indices))
        return rows if wanted.guidance_scale is None else self._scaled(rows, wanted.guidance_scale)

    def _labelled(self, wanted: Wanted, classes: Classes) -> Conditions | None:
        """Take a label, or the name or number of a class as the prompt."""
        label, scale = wanted.label, wanted.guidance_scale
        if wanted.prompt:
            found = classes.find(wanted.prompt)
            if label is not None or found is None:
                raise RequestError(f"this model takes a label and no other prompt: {classes.describe()}.", "prompt")
            label = found
        if wanted.negative_prompt or not self.guided:
            self._refuse_guidance(wanted)
        if label is None and scale is None:
            return None
        if label is not None and label not in range(classes.count):
            raise RequestError(f"label {label} is not one of 0 to {classes.count - 1}.", "label")
        own = self._rows(wanted).own[CLASS_LABELS].tolist()
        labels = own if label is None else [label] * len(wanted.indices)
        return encode_labels("the model", labels, classes, self.guidance_scale if scale is None else scale)

    def _refuse_prompts(self, wanted: Wanted) -> None:
        if wanted.prompt:
            raise RequestError("this model takes no prompts. Send an empty prompt, or none.", "prompt")
        self._refuse_guidance(wanted)

    @staticmethod
    def _refuse_guidance(wanted: Wanted) -> None:
        if wanted.negative_prompt:
            raise RequestError("this model takes no prompts. Omit negative_prompt.", "negative_prompt")
        if wanted.guidance_scale is not None:
            raise RequestError("this model has no guidance. Omit guidance_scale.", "guidance_scale")

    def _rows(self, wanted: Wanted) -> Conditions:
        """Select the bundle's own conditions of each image."""
        rows = self._own.rows or 1
        return self._own.take([index % rows for index in wanted.indices])

    def _must_encode(self, wanted: Wanted) -> bool:
        """Check whether the bundle's own prompts have to be encoded again, as their conditions cannot be changed."""
        if wanted.negative_prompt:
            return True
        scale = wanted.guidance_scale
        if scale is None or self._encoder is None or self._own.middle:
            return False
        return TIMESTEP_COND in self._own.own or (scale > 1 and not self._own.guided)

    def _encoded(self, encoder: TextEncoder, wanted: Wanted) -> Conditions:
        """Encode each prompt once: the prompt of the request, or else the bundle's own."""
        prompts, rows = self._texts(wanted)
        height, width = wanted.size
        return encoder.encode(
            prompts,
            # an empty one is encoded too, as in diffusers: without one, some models have zeros in its place
            negative=None if wanted.negative_prompt is None else [wanted.negative_prompt],
            guidance_scale=wanted.guidance_scale,
            height=height,
            width=width,
        ).take(rows)

    def _texts(self, wanted: Wanted) -> tuple[list[str], list[int]]:
        """Return the prompts to encode, and the position of each image's prompt among them."""
        if wanted.prompt is not None:
            return [wanted.prompt], [0] * len(wanted.indices)
        if not self.prompts or self._own.middle:
            field = "negative_prompt" if wanted.negative_prompt else "guidance_scale"
            raise RequestError(
                f"the prompts of this bundle cannot be encoded again. Send a prompt with {field}.", field
            )
        texts = [self.prompts[index % len(self.prompts)] for index in wanted.indices]
        distinct = list(dict.fromkeys(texts))
        return distinct, [distinct.index(text) for text in texts]

    def _index(self, prompt: str | None) -> int:
        """Find a prompt of the bundle by its text, or by #index."""
        text = (prompt or "").strip()
        if text in self.prompts:
            return self.prompts.index(text)
        number = text[1:] if text.startswith("#") else ""
        if number.isdecimal() and len(number) <= MOST_DIGITS and int(number) < len(self.prompts):
            return int(number)
        listed = ", ".join(map(repr, self.prompts[:_SHOWN])) + (", ..." if len(self.prompts) > _SHOWN else "")
        raise RequestError(f"this bundle has no text encoder. The prompt must be one of {listed}.", "prompt")

    def _scaled(self, rows: Conditions, scale: float) -> Conditions:
        """Change the scale of encoded prompts."""
        if TIMESTEP_COND in rows.own:
            if scale == rows.scale:
                return rows
            raise RequestError(
                f"guidance_scale is {scale}, but this model reads the scale itself, and the bundle has it encoded as "
                f"{rows.scale}. Omit guidance_scale, or send {rows.scale}.",
                "guidance_scale",
            )
        if scale <= 1 and not rows.middle:
            return replace(rows, negative={}, scale=1.0)
        if not rows.guided:
            raise RequestError(
                "the prompts of this bundle were encoded without guidance. Omit guidance_scale, or send 1.",
                "guidance_scale",
            )
        return replace(rows, scale=scale)
