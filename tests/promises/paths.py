"""No path leads out of a bundle, the engine cache or an exported repository, and no field of a request names a file."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx

import unetc
from tests.disguises import DISGUISES, Hang, make_device, make_fifo, make_hard_link, make_symlink, within
from tests.nvidia.cached_engine import ENGINE_BYTES, KEY, ORIGIN, cache_in, differing, record
from tests.promises.audit import heard
from tests.promises.corruption import unread
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.runtime.forgery import UNSAFE, edit, forge, rename
from tests.runtime.parsers import PARSERS
from tests.server.local import local
from unetc.artifacts.manifest import MANIFEST
from unetc.errors import UnetcError
from unetc.nvidia.cache import ENGINE, RECORD, EngineCache, trim
from unetc.nvidia.kernels import KernelFile

SECONDS = 20
"""After which a try counts as a hang."""
SECRET = b"a file outside of the folder"
LONG = {"a name too long": "a" * 300, "a path too long": "a/" * 3000 + "a"}
FULL = "engines/full.onnx"

Try = Callable[[], object]


def broken(name: str, refused: Try) -> tuple[str, ...]:
    """Run a try, which must be refused in words."""
    try:
        with within(SECONDS):
            refused()
    except UnetcError:
        return ()
    except (Exception, Hang) as error:
        return (f"{name}: {type(error).__name__}: {error}",)
    return (f"{name}: accepted",)


# Bundles


def bundle_tries(original: Path, around: Path, dice: random.Random) -> Iterator[tuple[str, Try]]:
    """Break a copy of a bundle in each way."""

    def attempt(change: Callable[[Path], object], parsers: Any = PARSERS, **options: Any) -> None:
        shutil.rmtree(around, ignore_errors=True)
        bundle = Path(shutil.copytree(original, around / "bundle"))
        (around / "outside").write_bytes(SECRET)
        change(bundle)
        with unread(parsers):
            unetc.load(bundle, **options)

    files = sorted(str(path.relative_to(original)) for path in original.rglob("*") if path.is_file())
    listed = [one["path"] for one in json.loads((original / MANIFEST).read_bytes())["files"]]
    for way, disguise in DISGUISES.items():
        name = dice.choice(files)
        yield f"bundle: {name} is a {way}", partial(attempt, lambda at, d=disguise, n=name: d(at / n))
    for folder in sorted(path.name for path in original.iterdir() if path.is_dir()):
        yield f"bundle: folder {folder} is a link", partial(attempt, lambda at, n=folder: make_symlink(at / n))
    for way, path in (UNSAFE | LONG).items():
        name = dice.choice(listed)
        other = path.replace("{root}", str(around))
        yield f"bundle: {name} is called {way}", partial(attempt, lambda at, n=name, o=other: rename(at, n, o))
    yield "bundle: two names that differ in case", partial(attempt, partial(clash, name=dice.choice(listed)))
    for place in (str(around / "outside"), os.path.relpath(around / "outside", tempfile.gettempdir() + "/folder")):
        change = partial(with_weights_at, place=place)
        yield f"bundle: weights of a graph at {place}", partial(attempt, change, (), memory="low")


def clash(bundle: Path, *, name: str) -> None:
    """List a file a second time, in capitals."""
    shutil.copy(bundle / name, bundle / name.upper().replace("/", "-"))

    def add(manifest: dict[str, Any]) -> None:
        (one,) = (file for file in manifest["files"] if file["path"] == name)
        manifest["files"].append(one | {"path": name.swapcase()})

    edit(bundle, add)


def with_weights_at(bundle: Path, *, place: str) -> None:
    """Let a graph take its weights from another file."""
    model = onnx.load(bundle / FULL, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    forge(bundle, FULL, model.SerializeToString())


# The engine cache


def cache_tries(around: Path) -> Iterator[tuple[str, Try]]:
    """Break a cache with one engine in each way."""

    def attempt(change: Callable[[EngineCache], object], use: Callable[[EngineCache], object]) -> None:
        shutil.rmtree(around, ignore_errors=True)
        around.mkdir()
        cache = cache_in(around)
        KernelFile(cache, record(), ORIGIN).keep(b"kernels")
        change(cache)
        use(EngineCache(cache.root))

    for way, disguise in DISGUISES.items():
        for name in (ENGINE, RECORD, "secret"):
            if (name, way) == ("secret", "hard link"):
                continue  # the secret is drawn under two names
            path = partial(path_in_cache, name=name)
            change = partial(lambda cache, path, disguise: disguise(path(cache)), path=path, disguise=disguise)
            yield f"cache: {name} is a {way}", partial(attempt, change, lambda cache: cache.open(KEY))
        change = partial(lambda cache, disguise: disguise(kernels_in(cache)), disguise=disguise)
        yield f"cache: kernels are a {way}", partial(attempt, change, read_kernels)

    def link(cache: EngineCache) -> None:
        make_symlink(cache.folder(KEY))

    yield "cache: the folder is a link", partial(attempt, link, lambda cache: cache.open(KEY, trust=True))
    yield "cache: the folder is a link, written", partial(attempt, link, partial(write_through, elsewhere=around))
    yield "cache: the folder is a link, trimmed", partial(attempt, link, partial(trim_through, elsewhere=around))


def path_in_cache(cache: EngineCache, *, name: str) -> Path:
    """Find a file of the cache."""
    return cache.root / name if name == "secret" else cache.folder(KEY) / name


def kernels_in(cache: EngineCache) -> Path:
    """Find the file of kernels."""
    return KernelFile(cache, record(), ORIGIN).path


def read_kernels(cache: EngineCache) -> None:
    """Read kernels; those that are refused are made again, which no error says."""
    if KernelFile(cache, record(), ORIGIN).read() is None:
        raise UnetcError("refused")


def write_through(cache: EngineCache, *, elsewhere: Path) -> None:
    """Write an engine; the folder behind the link must not change."""
    behind = cache.folder(KEY).resolve() / ENGINE
    behind.write_bytes(SECRET)
    cache.put(record(), ENGINE_BYTES)
    if behind.read_bytes() == SECRET and cache.open(KEY)[1] == ENGINE_BYTES:
        raise UnetcError(f"nothing was written to {elsewhere}")


def trim_through(cache: EngineCache, *, elsewhere: Path) -> None:
    """Delete the engines that take too much; the folder behind the link must stay."""
    cache.put(record(differing("effort")), ENGINE_BYTES)
    behind = cache.folder(KEY).resolve() / ENGINE
    trim(cache.root.parent, 0)
    if behind.exists():
        raise UnetcError(f"nothing was deleted in {elsewhere}")


# Requests

POSTS: tuple[tuple[str, Mapping[str, Any], tuple[str, ...]], ...] = (
    (
        "/v1/images/generations",
        {},
        ("model", "prompt", "negative_prompt", "size", "quality", "min_quality", "image", "output_format", "seed"),
    ),
    ("/v1/jobs", {}, ("model", "prompt", "image", "quality", "background", "moderation", "label")),
    (
        "/sdapi/v1/txt2img",
        {},
        ("prompt", "sampler_name", "scheduler", "refiner_checkpoint", "script_name", "infotext", "styles", "quality"),
    ),
    ("/sdapi/v1/img2img", {"init_images": ["aGVsbG8="]}, ("init_images.0", "mask", "latent_mask")),
    ("/sdapi/v1/txt2img", {"override_settings": {}}, ("override_settings.sd_model_checkpoint",)),
    ("/sdapi/v1/options", {}, ("sd_model_checkpoint", "sd_vae", "outdir_samples")),
    (
        "/v2/models/plain/infer",
        {"inputs": [{"name": "quality", "datatype": "BYTES", "shape": [1], "data": ["auto"], "parameters": {}}]},
        ("inputs.0.name", "inputs.0.data.0", "inputs.0.datatype", "inputs.0.parameters.shared_memory_region"),
    ),
    ("/v2/models/plain/infer", {"parameters": {}}, ("parameters.output_datatype", "parameters.quality")),
    ("/v2/models/plain/infer", {"outputs": [{"name": "images"}]}, ("outputs.0.name",)),
)
"""Address, body, and the fields whose text names something."""
GETS = (
    "/v1/models/{}",
    "/v1/jobs/{}",
    "/v1/jobs/{}/preview",
    "/v1/jobs/{}/images/0",
    "/v2/models/{}",
    "/v2/models/{}/versions/1",
    "/v2/models/plain/versions/{}/ready",
    "/page/levels?steps=4&model={}",
)
"""Addresses of which a part names something."""


def request_names(around: Path) -> dict[str, str]:
    """Make files of each kind, and list the texts that could lead to them."""
    shutil.rmtree(around, ignore_errors=True)
    folder = around / "folder"
    folder.mkdir(parents=True)
    outside = around / "outside"
    outside.write_bytes(SECRET)
    names: dict[str, str] = {}
    for way, make in (("symbolic link", make_symlink), ("hard link", make_hard_link), ("pipe", make_fifo)):
        path = folder / way.replace(" ", "-") / "file"
        path.parent.mkdir()
        path.write_bytes(SECRET)
        make(path)
        names[way] = str(path)
    (around / "linked").symlink_to(folder)
    return (
        names
        | LONG
        | {
            "absolute": str(outside),
            "parent": os.path.relpath(outside),
            "address": outside.as_uri(),
            "linked folder": str(around / "linked" / "file"),
            "device": "/dev/zero",
            "case": "PLAIN",
            "NUL": f"{outside}\0",
        }
    )


def placed(body: Mapping[str, Any], field: str, value: str) -> dict[str, Any]:
    """Copy a body, with a value in one field."""
    copy: Any = json.loads(json.dumps(body))
    *above, last = [int(part) if part.isdecimal() else part for part in field.split(".")]
    inner = copy
    for part in above:
        inner = inner[part]
    inner[last] = value
    return dict(copy)


async def request_problems(bundle: Path, around: Path) -> tuple[int, list[str]]:
    """Send every name in every field."""
    problems: list[str] = []
    tries = 0
    names = request_names(around)
    async with local(bundle, images=2) as (client, _):
        for way, name in names.items():
            posts = [(path, field, placed(body, field, name)) for path, body, fields in POSTS for field in fields]
            gets = [(path.format(f"{_quoted(name)}"), "", None) for path in GETS]
            for path, field, body in [*posts, *gets]:
                tries += 1
                said = f"request: {path[:60]} {field} with {way}"
                with heard("open") as opened:
                    answer = await client.request("GET" if body is None else "POST", path, json=body)
                if not 400 <= answer.status_code < 500:
                    problems.append(f"{said}: {answer.status_code}")
                if leaks := [one for one in opened if leads_to(one[1][0], around)]:
                    problems.append(f"{said}: opened {leaks[0]}")
    return tries, problems


def _quoted(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode())


def leads_to(path: object, around: Path) -> bool:
    """Check whether a path that was opened is one of those that requests named."""
    return isinstance(path, str | bytes) and (os.fsdecode(path).startswith(str(around)) or path == "/dev/zero")


# Exported repositories


def export_tries(original: Path, around: Path, dice: random.Random) -> Iterator[tuple[str, Try]]:
    """Export to each bad place, under each bad name, and from each bad bundle."""
    folder = around / "repository"

    def attempt(
        place: Callable[[], Path] = lambda: folder, change: Callable[[Path], object] | None = None, name: str = "m"
    ) -> None:
        shutil.rmtree(around, ignore_errors=True)
        bundle = Path(shutil.copytree(original, around / "bundle"))
        (around / "outside").write_bytes(SECRET)
        if change is not None:
            change(bundle)
        unetc.export_triton(bundle, place(), unetc.ExportOptions(name=name))

    for way, name in (UNSAFE | LONG | {"parent alone": "..", "current alone": "."}).items():
        yield f"export: the model is called {way}", partial(attempt, name=name)
    for way, path in UNSAFE.items():
        other = path.replace("{root}", str(around))
        yield f"export: a graph is called {way}", partial(attempt, change=partial(rename, name=FULL, other=other))
    place = str(around / "outside")
    yield "export: weights of a graph elsewhere", partial(attempt, change=partial(with_weights_at, place=place))
    yield "export: within the bundle", partial(attempt, lambda: around / "bundle/r")
    yield "export: within the bundle by a link", partial(attempt, partial(linked, around / "bundle", folder))
    for way, path in LONG.items():
        yield f"export: to {way}", partial(attempt, lambda p=path: around / p)
    yield "export: to a NUL", partial(attempt, lambda: around / "a\0b")
    for way, make in (("pipe", make_fifo), ("device", make_device)):
        yield f"export: to a {way}", partial(attempt, partial(occupied, folder, make))
    yield "export: to a link to a folder of others", partial(attempt, partial(linked, around / "theirs", folder))
    yield "export: over a link in an earlier one", partial(replaced, original, around)


def linked(target: Path, path: Path) -> Path:
    """Make a link to a folder with a file of somebody else."""
    target.mkdir(exist_ok=True)
    (target / "theirs").write_bytes(SECRET)
    path.symlink_to(target)
    return path


def occupied(path: Path, make: Callable[[Path], None]) -> Path:
    """Put something else than a folder at a path."""
    path.write_bytes(b"")
    make(path)
    return path


def replaced(original: Path, around: Path) -> None:
    """Export twice, with a link in the first export; the folder behind it must stay."""
    shutil.rmtree(around, ignore_errors=True)
    folder = around / "repository"
    folder.parent.mkdir()
    options = unetc.ExportOptions(name="m")
    unetc.export_triton(original, folder, options)
    make_symlink(folder / "m-full")
    unetc.export_triton(original, folder, options)
    behind = around / "real"
    if any(path.is_file() for path in behind.rglob("*")) and not (folder / "m-full").is_symlink():
        raise UnetcError("the folder behind the link is as it was")


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Build a bundle."""
    bundle = place.tiny_build / "bundle"
    around = place.own / "around"

    def trial(number: int) -> Outcome:
        """Try every way on every door once; the number chooses the files."""
        dice = random.Random(number)
        tries = [
            *bundle_tries(bundle, around, dice),
            *cache_tries(around),
            *export_tries(bundle, around, dice),
        ]
        problems = [problem for name, one in tries for problem in broken(name, one)]
        requests, more = asyncio.run(request_problems(bundle, around))
        return Outcome(tries=len(tries) + requests, broken=(*problems, *more))

    yield trial


PROMISE = Promise(
    name="paths",
    promised="No path leads out of a bundle, the engine cache or an exported repository; no request names a file.",
    tried=(
        "Parent folders, absolute paths, links to files and folders, hard links, devices, pipes, names that differ in "
        "case, NUL, and names too long, on every door."
    ),
    prepare=prepare,
    trials=20,
    short=1,
    seconds=1.4,
)
