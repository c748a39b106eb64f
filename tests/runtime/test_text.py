"""Text encoders of a bundle give the conditions of the pipeline, from tokens of their own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as untyped_diffusers
import msgspec
import numpy as np
import pytest
import torch

from tests.loras import save_lora
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from unetc.artifacts.manifest import BundleText, BundleTextEncoder
from unetc.call import CONTEXT, EXTRA_CHANNELS, POOLED, TIME_IDS, TIMESTEP_COND
from unetc.compiler import text as compiled
from unetc.compiler.text import _RECORD, PROBES, check_text, prepare_text
from unetc.conditions import Conditions
from unetc.errors import (
    CompileError,
    CorruptArtifactError,
    MissingDependency,
    ModelError,
    SessionError,
    ShapeMismatch,
)
from unetc.models.find import ModelSource, find_model
from unetc.models.lora import Lora
from unetc.models.text import TextEncoders
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.runtime.text import OneEncoder, TextEncoder, no_text

PROMPTS = (*PROBES, "a red square", "A RED  SQUARE", "red,blue;(circle) 12345 \t\n a<|endoftext|>b", "ß¼Ⅷ", "x" * 300)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Text encoders as a build makes them, and the pipeline's."""

    loaded: TextEncoders
    text: BundleText
    files: dict[str, bytes]

    def encoder(self, target: str = "onnxruntime:cpu", **changes: Any) -> TextEncoder:
        backend = open_backend(target, threads=1)
        encoders = [
            OneEncoder(one, self.files[one.graph], self.files[one.weights], self.files[one.tokenizer], backend)
            for one in self.text.encoders
        ]
        options = {"calls": self.loaded.calls, "size": self.loaded.size, "guidance_scale": 5.0, **changes}
        return TextEncoder(self.text, encoders, **options)


def export(source: ModelSource | str, work: Path) -> Exported:
    model = find_model(source)
    work.mkdir()
    prepared = prepare_text(SimpleNamespace(model=model, work=work))  # type: ignore[arg-type]
    loaded = model.load_text()
    assert prepared is not None
    assert loaded is not None
    return Exported(
        loaded=loaded, text=prepared.text, files={path: file.read_bytes() for path, file in prepared.files.items()}
    )


diffusers: Any = untyped_diffusers

KINDS = ("prompted-digits", "sd", "sdxl", "refiner", "lcm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of the exported text encoders."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Exported]:
    sources = {
        "prompted-digits": "prompted-digits",
        "sd": save_stable_diffusion(folder / "sd"),
        "sdxl": save_stable_diffusion_xl(folder / "sdxl"),
        "refiner": save_stable_diffusion_xl(folder / "refiner", kind="StableDiffusionXLImg2ImgPipeline", refiner=True),
        "lcm": save_stable_diffusion(folder / "lcm", kind="LatentConsistencyModelPipeline", time_cond_proj_dim=33),
    }
    return {kind: export(str(source), folder / f"work-{kind}") for kind, source in sources.items()}


@pytest.fixture
def work(exported: dict[str, Exported], folder: Path, tmp_path: Path) -> Path:
    """Copy the cache of one model's text encoders."""
    return Path(shutil.copytree(folder / "work-prompted-digits", tmp_path / "work"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (_RECORD, lambda file: file.write_text("{")),
        ("encoder-0.safetensors", Path.unlink),
        ("encoder-0.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1])),
    ],
    ids=["damaged record", "missing weights", "damaged weights"],
)
def test_a_missing_or_damaged_file_in_the_cache_is_made_again(
    exported: dict[str, Exported], work: Path, name: str, change: Callable[[Path], None]
) -> None:
    one = exported["prompted-digits"]
    (file,) = work.glob(f"text-*/{name}")
    change(file)
    again = prepare_text(SimpleNamespace(model=find_model("prompted-digits"), work=work))  # type: ignore[arg-type]
    assert again is not None
    assert again.text == one.text
    assert {path: file.read_bytes() for path, file in again.files.items()} == one.files


def check_equal(actual: Conditions, expected: Conditions) -> None:
    own, wanted = actual.to_arrays(), expected.to_arrays()
    assert own.keys() == wanted.keys()
    for name, array in own.items():
        assert array.dtype == wanted[name].dtype
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert (actual.scale, actual.size, actual.notes) == (expected.scale, expected.size, expected.notes)


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_conditions_equal_those_of_the_pipeline(exported: dict[str, Exported], kind: str, scale: float) -> None:
    one = exported[kind]
    encoded = one.encoder().encode(PROMPTS, guidance_scale=scale)
    check_equal(encoded, one.loaded.encode(PROMPTS, scale))
    assert encoded.guided == (scale > 1 and kind != "lcm")
    assert (POOLED in encoded.own) == (TIME_IDS in encoded.own) == (kind in ("sdxl", "refiner"))
    assert (TIMESTEP_COND in encoded.own) == (kind == "lcm")


@pytest.mark.parametrize("target", ["torch:cpu", "null"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_backend_takes_tokens(exported: dict[str, Exported], kind: str, target: str) -> None:
    one = exported[kind]
    encoded = one.encoder(target).encode(PROMPTS, guidance_scale=3.0)
    expected = one.loaded.encode(PROMPTS, 3.0)
    if target == "null":
        assert encoded.shapes() == expected.shapes()
    else:
        check_equal(encoded, expected)


@pytest.mark.parametrize("lets_go", [False, True])
def test_graphs_are_released_after_every_call_to_save_memory(exported: dict[str, Exported], lets_go: bool) -> None:
    encoder = exported["sdxl"].encoder(lets_go=lets_go)
    expected = exported["sdxl"].encoder()
    for prompts in (["a red square"], ["a blue circle"]):
        check_equal(encoder.encode(prompts), expected.encode(prompts))
        assert [one._program._program is None for one in encoder._encoders] == [lets_go] * 2


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_negative_prompts_equal_those_of_the_pipeline(exported: dict[str, Exported], kind: str) -> None:
    one = exported[kind]
    prompts, negative = ["a red circle", "large"], ["a blue square", ""]
    encoded = one.encoder().encode(prompts, negative=negative, guidance_scale=3.0)
    pipeline = one.loaded.pipeline
    with torch.no_grad():
        made = pipeline.encode_prompt(
            prompts,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
        )
    np.testing.assert_allclose(encoded.own[CONTEXT], made[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(encoded.negative[CONTEXT], made[1].numpy(), atol=1e-5)
    if kind == "sdxl":
        np.testing.assert_allclose(encoded.negative[POOLED], made[3].numpy(), atol=1e-5)
        assert encoded.negative[POOLED].any(), "only no negative prompt at all is zero"
    same = one.encoder().encode(prompts, negative=negative[:1], guidance_scale=3.0)
    np.testing.assert_array_equal(same.negative[CONTEXT][1], encoded.negative[CONTEXT][0])


def test_no_negative_prompt_is_zero_where_the_pipeline_says_so(exported: dict[str, Exported]) -> None:
    encoded = exported["sdxl"].encoder().encode(["a red circle"])
    assert not encoded.negative[CONTEXT].any()
    assert not encoded.negative[POOLED].any()
    assert encoded.scale == 5.0


def test_sdxl_takes_the_size_of_the_image(exported: dict[str, Exported]) -> None:
    encoded = exported["sdxl"].encoder().encode(["a", "b"], height=40, width=64)
    np.testing.assert_array_equal(encoded.own[TIME_IDS], [[40, 64, 0, 0, 40, 64]] * 2)
    assert encoded.size == (40, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_pipeline(exported: dict[str, Exported], kind: str) -> None:
    one = exported[kind]
    suffixes = ["", "_2"] if kind == "sdxl" else ["_2"] if kind == "refiner" else [""]
    encoders = one.encoder()._encoders
    assert len(encoders) == len(suffixes)
    for suffix, encoder in zip(suffixes, encoders, strict=True):
        tokenizer = getattr(one.loaded.pipeline, f"tokenizer{suffix}")
        for prompt in PROMPTS:
            expected = tokenizer(
                prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
            ).input_ids
            assert encoder.tokens(prompt) == expected


def test_a_lora_is_fused_before_the_export(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    lora = save_lora(folder, tmp_path / "style.safetensors")
    plain = export(str(folder), tmp_path / "plain")
    styled = export(ModelSource(str(folder), loras=(Lora(path=lora),)), tmp_path / "styled")
    encoded = styled.encoder().encode(PROMPTS)
    check_equal(encoded, styled.loaded.encode(PROMPTS, 5.0))
    assert np.abs(encoded.own[CONTEXT] - plain.encoder().encode(PROMPTS).own[CONTEXT]).max() > 1e-3


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Text encoders with a textual inversion of three vectors and one of a single vector."""
    folder = tmp_path_factory.mktemp("inverted")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(save_stable_diffusion(folder / "sd"))
    generator = torch.Generator().manual_seed(0)
    pipeline.load_textual_inversion(torch.randn(3, 16, generator=generator), token="<cat>")
    pipeline.load_textual_inversion(torch.randn(1, 16, generator=generator), token="<dog>")
    pipeline.save_pretrained(folder / "inverted")
    (folder / "inverted" / "prompts.txt").write_text("a <cat>\na red square\na blue circle\na <dog>\n")
    return export(str(folder / "inverted"), folder / "work")


@pytest.mark.parametrize("prompt", ["a <cat>", "<cat>", "a <dog>", "a <cat> red square", "<cat><cat> and <dog>"])
def test_a_textual_inversion_is_read_with_all_its_vectors(inverted: Exported, prompt: str) -> None:
    encoded = inverted.encoder().encode([prompt])
    pipeline = inverted.loaded.pipeline
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([prompt], "cpu", 1, False)
    np.testing.assert_allclose(encoded.own[CONTEXT], expected.numpy(), atol=1e-5)
    check_equal(encoded, inverted.loaded.encode([prompt], 5.0))


def test_words_that_the_vectors_of_a_textual_inversion_push_out_are_noted(inverted: Exported) -> None:
    for encoder in (inverted.encoder().encode, inverted.loaded.encode):
        (note,) = encoder(["a <cat> red square"], guidance_scale=5.0).notes
        assert "cut at 6 tokens; lost: 'red square'" in note


def test_a_bundle_that_reads_one_vector_of_a_textual_inversion_is_refused(
    inverted: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneEncoder, "_expanded", lambda self, prompt: prompt)
    with pytest.raises(CompileError, match="the bundle's"):
        check_text(inverted.text, inverted.files, inverted.loaded, ("a red square",))


def test_cut_prompts_are_noted_with_the_lost_words(exported: dict[str, Exported]) -> None:
    (note,) = exported["sd"].encoder().encode(["a red square red red blue circle", "a"]).notes
    assert note == (
        "the prompt 'a red square red red blue circle'… is cut at 6 tokens; lost: 'red blue circle'. Shorten it"
    )


def test_a_prompt_is_encoded_alike_in_every_batch(exported: dict[str, Exported]) -> None:
    many, alone = (exported["sdxl"].encoder().encode(prompts) for prompts in (PROMPTS, PROMPTS[3:4]))
    for name, array in alone.own.items():
        np.testing.assert_array_equal(array[0], many.own[name][3])


@pytest.mark.parametrize("negative", [["a", "b"], []])
def test_a_wrong_number_of_prompts_is_refused(exported: dict[str, Exported], negative: Sequence[str]) -> None:
    encoder = exported["sd"].encoder()
    with pytest.raises(ShapeMismatch, match=f"{len(negative)} negative prompts for 3 prompts. Give one, or one per"):
        encoder.encode(["a", "b", "c"], negative=negative)
    with pytest.raises(SessionError, match="negative is 3, a int"):
        encoder.encode(["a"], negative=3)  # type: ignore[arg-type]
    for encode in (encoder.encode, lambda prompts: exported["sd"].loaded.encode(prompts, 7.5)):
        with pytest.raises(ShapeMismatch, match="there is no prompt"):
            encode([])
        with pytest.raises(SessionError, match="is not Unicode text"):
            encode(["a \udcff b"])


def test_the_settings_of_the_libraries_hold_again_after_encoding(exported: dict[str, Exported]) -> None:
    logging = diffusers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        exported["sd"].loaded.encode(["a"], 7.5)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def test_a_damaged_tokenizer_is_refused(exported: dict[str, Exported]) -> None:
    one = exported["sd"]
    damaged = replace(one, files={**one.files, one.text.encoders[0].tokenizer: b'{"version": 7}'})
    with pytest.raises(CorruptArtifactError, match=r"text/tokenizer-0\.json is not a tokenizer"):
        damaged.encoder().encode(["a"])


def test_without_the_library_the_extra_is_named(exported: dict[str, Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'unetc\[text\]'"):
        exported["sd"].encoder().encode(["a"])


def test_an_encoder_that_differs_from_the_pipeline_is_refused(exported: dict[str, Exported]) -> None:
    one = exported["sdxl"]
    first, second = one.text.encoders
    other = msgspec.structs.replace(one.text, encoders=(msgspec.structs.replace(first, padding=0), second))
    for text in (other, msgspec.structs.replace(one.text, zero_negative=False)):
        with pytest.raises(CompileError, match=r"differ from the pipeline's by .* more than 1e-04"):
            check_text(text, one.files, one.loaded, ())


def test_a_model_that_cannot_be_exported_names_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_stable_diffusion(tmp_path / "sd", kind="StableDiffusionInpaintPipeline", in_channels=9)
    with pytest.raises(ModelError, match="takes an image with every prompt"):
        find_model(str(folder)).load_text()
    assert find_model("digits").load_text() is None
    text = find_model(str(save_stable_diffusion(tmp_path / "other"))).load_text()
    assert text is not None
    text.pipeline.text_encoder.config.use_attention_mask = True
    with pytest.raises(ModelError, match="use_attention_mask"):
        compiled.text_parts(text)


def test_a_record_of_an_encoder_is_checked() -> None:
    with pytest.raises(ValueError, match="begin and end"):
        BundleTextEncoder(graph="a", weights="b", tokenizer="c", length=1, padding=0, width=1)
    with pytest.raises(ValueError, match="must be a text encoder"):
        BundleText(encoders=())


@pytest.mark.parametrize("scale", [math.inf, -math.inf, -1.0, 1000.0])
def test_a_guidance_scale_out_of_range_is_refused(exported: dict[str, Exported], scale: float) -> None:  # G1
    one = exported["sd"]
    encoder = one.encoder("null")
    for encode in (
        lambda: encoder.encode(["a"], guidance_scale=scale),
        lambda: one.loaded.encode(["a"], scale),
        lambda: replace(encoder.encode(["a"], guidance_scale=3.0), scale=scale),
        lambda: replace(encoder.encode(["a"], guidance_scale=3.0), middle_scale=scale),
    ):
        with pytest.raises(SessionError, match=r"a guidance scale lies in \[0, 1000\)"):
            encode()


def test_a_negative_prompt_without_guidance_is_noted(exported: dict[str, Exported]) -> None:
    encoder = exported["sd"].encoder("null")
    for scale in (0.0, 0.5, 1.0):
        (note,) = encoder.encode(["a"], negative=["red"], guidance_scale=scale).notes
        assert "the negative prompt has no effect" in note
    for negative, scale in ((["red"], 1.5), ([""], 1.0), (None, 1.0)):
        assert encoder.encode(["a"], negative=negative, guidance_scale=scale).notes == ()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"guidance_scale": "3"}, "a guidance scale is '3', a str"),
        ({"guidance_scale": math.nan}, "a guidance scale is nan"),
        ({"height": "512"}, "height is '512', a str"),
        ({"width": 16.0}, "width is 16.0, a float"),
    ],
)
def test_numbers_of_another_type_are_refused(
    exported: dict[str, Exported], numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        exported["sdxl"].encoder("null").encode(["a"], **numbers)


def test_a_model_that_reads_the_scale_takes_no_negative_prompt(exported: dict[str, Exported]) -> None:
    for scale in (1.0, 8.5):
        (note,) = exported["lcm"].encoder("null").encode(["a"], negative=["red"], guidance_scale=scale).notes
        assert "has no effect: the model reads the guidance scale itself" in note


def test_a_text_alone_is_one_prompt(exported: dict[str, Exported]) -> None:
    one = exported["sd"]
    check_equal(one.encoder().encode("a red", negative="blue"), one.encoder().encode(["a red"], negative=["blue"]))
    check_equal(one.encoder().encode("a red", negative=""), one.encoder().encode(["a red"], negative=[""]))
    check_equal(one.encoder().encode("a red"), one.loaded.encode("a red", 5.0))


def test_a_text_encoder_that_knows_no_end_of_a_prompt_is_refused(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    with pytest.raises(ModelError, match=r"text_encoder/config\.json: eos_token_id is null"):
        find_model(str(folder)).load_text()


def test_images_of_the_conditions_are_not_mixed_with_others() -> None:
    """A bundle that inpaints or edits has no text encoders, and its conditions hold the images it was built with."""
    bundle: Any = SimpleNamespace(
        path="bundle",
        calls=SimpleNamespace(names={CONTEXT, EXTRA_CHANNELS}),
        manifest=SimpleNamespace(conditioning=SimpleNamespace(prompts=("a", "b"))),
    )
    assert "takes an image with every prompt" in no_text(bundle)
    assert "--text" not in no_text(bundle)
    own = Conditions(own={EXTRA_CHANNELS: np.zeros((1, 5, 4, 4), np.float32)})
    session: Any = SimpleNamespace(
        conditions=own, steps=1, tuned=None, scheduler=SimpleNamespace(table=lambda steps: None)
    )
    with pytest.raises(SessionError, match="would only replace the start"):
        Session.start(session, image=np.zeros((1, 4, 4, 4), np.float32))
