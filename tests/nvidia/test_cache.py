"""The cache returns an engine only if its key is as requested, its bytes are unchanged, and it was built here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.disguises import DISGUISES, within
from tests.nvidia.cached_engine import (
    ENGINE_BYTES,
    FIELDS,
    GPU,
    KEY,
    ONE,
    ORIGIN,
    OTHER_ORIGIN,
    cache_in,
    differing,
    record,
)
from unetc.compiler.tensorrt.wanted import find_engines
from unetc.errors import ArtifactError, StaleEngineError
from unetc.nvidia.cache import ENGINE, RECORD, EngineCache, EngineRecord, trim
from unetc.nvidia.key import EngineKey, Origin
from unetc.nvidia.sizes import Range, Shape, Sizes
from unetc.precision import Precision
from unetc.progress import ignore
from unetc.temporary import claim_file, prefix_for


def find(
    cache: EngineCache, here: Origin = ORIGIN, precision: Precision = Precision.FP32, **call: Shape
) -> EngineRecord:
    return cache.find(KEY.graph_sha256, KEY.weights_sha256, precision, here, call)[0]


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return cache_in(tmp_path)


def test_an_engine_that_was_put_in_comes_out(cache: EngineCache) -> None:
    found, engine = EngineCache(cache.root).open(KEY)
    assert (found.key, engine) == (KEY, ENGINE_BYTES)
    assert sorted(path.name for path in cache.folder(KEY).iterdir()) == [ENGINE, RECORD]
    assert (cache.root / "secret").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("field", FIELDS)
def test_a_key_that_differs_in_one_field_is_refused(cache: EngineCache, field: str) -> None:
    other = differing(field)
    with pytest.raises(StaleEngineError, match="there is no engine"):
        cache.open(other, trust=True)
    shutil.copytree(cache.folder(KEY), cache.folder(other))  # as if two keys had one hash, or someone moved it
    with pytest.raises(StaleEngineError, match=f"differs from the requested one in {field}"):
        cache.open(other, trust=True)


@pytest.mark.parametrize("field", ["name", "compute_capability", "driver"])
def test_another_gpu_or_driver_is_refused(cache: EngineCache, field: str) -> None:
    here = msgspec.structs.replace(ORIGIN, gpu=msgspec.structs.replace(GPU, **{field: "another"}))
    with pytest.raises(StaleEngineError):
        cache.open(msgspec.structs.replace(KEY, origin=here), trust=True)
    with pytest.raises(StaleEngineError, match=r"1 for gpu NVIDIA L40S.* \(here .*another.*\)\. Build it"):
        find(cache, here)


def test_a_changed_byte_is_refused(cache: EngineCache) -> None:
    path = cache.folder(KEY) / ENGINE
    for changed in (ENGINE_BYTES[:-1] + b"!", ENGINE_BYTES[:-1], ENGINE_BYTES + b"!", b""):
        path.write_bytes(changed)
        with pytest.raises(StaleEngineError):
            cache.open(KEY, trust=True)
    path.unlink()
    with pytest.raises(StaleEngineError, match="there is no engine"):
        cache.open(KEY, trust=True)


@pytest.mark.parametrize("field", sorted({*EngineRecord.__struct_fields__} - {"seal"}))
def test_an_edited_record_is_refused(cache: EngineCache, field: str) -> None:
    path = cache.folder(KEY) / RECORD
    edited = json.loads(path.read_text())
    match edited[field]:
        case int() | float() as number:
            edited[field] = number + 1
        case str() as text:
            edited[field] = text[::-1] + "0"
        case dict() as fields if field == "key":
            fields["origin"]["library"] = "11.4.2"
        case dict() as fields if field == "spent":
            fields["optimization_level"] = 1
        case dict() as fields:
            fields["timestep"] = [[1], [1], [1]]
        case None:
            edited[field] = 1
    path.write_text(json.dumps(edited))
    with pytest.raises(StaleEngineError):
        cache.open(KEY)


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("name", [ENGINE, RECORD])
def test_only_plain_files_are_read(cache: EngineCache, name: str, disguise: Callable[[Path], None]) -> None:
    disguise(cache.folder(KEY) / name)
    with within(20):
        with pytest.raises(StaleEngineError, match=name):
            cache.open(KEY, trust=True)
        with pytest.raises(StaleEngineError, match="no tensorrt engine in fp32"):
            find(cache)


SECRET_OF_FRIENDS = """
import sys
from pathlib import Path
from unetc.nvidia.cache import EngineCache
for number in range(100):
    print(EngineCache(Path(sys.argv[1]) / str(number)).seal(b"x").hex())
"""


def test_processes_that_draw_the_secret_together_get_the_same(tmp_path: Path) -> None:
    """The one that comes second may take the file of the first for abandoned."""
    command = [sys.executable, "-c", SECRET_OF_FRIENDS, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    seals = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert len(seals) == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"secret"}


def test_the_other_name_of_a_secret_is_deleted_if_its_writer_was_killed(cache: EngineCache) -> None:
    seal = cache.seal(b"x")
    os.link(cache.root / "secret", cache.root / ".secret.unetc-a1b2c3d4")
    assert cache.seal(b"x") == seal
    assert [path.name for path in cache.root.iterdir() if path.is_file()] == ["secret"]


def test_a_secret_survives_who_deletes_its_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, cache = os.link, EngineCache(tmp_path / "cache")

    def link(drawn: Path, path: Path) -> None:
        original(drawn, path)
        drawn.unlink()  # as another process would that took it for abandoned

    monkeypatch.setattr(os, "link", link)
    seal = cache.seal(b"x")
    monkeypatch.undo()
    assert EngineCache(tmp_path / "cache").seal(b"x") == seal


@pytest.mark.parametrize("disguise", [one for name, one in DISGUISES.items() if name != "hard link"])
def test_a_secret_that_is_no_plain_file_is_refused(cache: EngineCache, disguise: Callable[[Path], None]) -> None:
    disguise(cache.root / "secret")
    with within(20), pytest.raises(ArtifactError, match="/secret"):
        cache.open(KEY)


def test_the_folder_of_an_engine_is_no_link(cache: EngineCache, tmp_path: Path) -> None:
    elsewhere = cache.folder(KEY).rename(tmp_path / "elsewhere")
    cache.folder(KEY).symlink_to(elsewhere)
    with pytest.raises(StaleEngineError, match="is a link"):
        cache.open(KEY, trust=True)
    (elsewhere / ENGINE).write_bytes(b"mine")
    cache.put(record(), ENGINE_BYTES)
    assert cache.open(KEY)[1] == ENGINE_BYTES
    assert (elsewhere / ENGINE).read_bytes() == b"mine"


@pytest.mark.parametrize("above", [0, 1], ids=["engine", "cache"])
def test_trimming_follows_no_link(tmp_path: Path, above: int) -> None:
    cache = cache_in(tmp_path / "caches")
    cache.put(record(differing("effort")), ENGINE_BYTES)
    kept, outside = cache.folder(KEY), cache.folder(differing("effort"))
    os.utime(outside / ENGINE, (0, 0))
    linked = (outside, cache.root)[above]
    linked.symlink_to(linked.rename(tmp_path / "outside"))
    trim(tmp_path / "caches", 0)
    assert kept.exists()
    assert (outside / ENGINE).exists()


def test_an_engine_from_elsewhere_needs_trust(cache: EngineCache, tmp_path: Path) -> None:
    here = EngineCache(tmp_path / "here")
    shutil.copytree(cache.folder(KEY), here.folder(KEY))
    with pytest.raises(StaleEngineError, match=r"not built here \(loading one runs code; .*--trust-engines`"):
        here.open(KEY)
    assert here.open(KEY, trust=True)[1] == ENGINE_BYTES


def test_the_same_key_has_the_same_folder_whatever_the_order_of_its_mappings(cache: EngineCache) -> None:
    rows = {"a": (1,), "b": (2,)}
    one, other = (msgspec.structs.replace(KEY, rows=dict(pairs)) for pairs in (rows.items(), reversed(rows.items())))
    assert cache.folder(one) == cache.folder(other)


def test_an_engine_is_found_by_its_graph_and_its_weights(cache: EngineCache) -> None:
    assert find(cache).key == KEY
    for graph, weights in ((KEY.graph_sha256, "3" * 64), ("3" * 64, KEY.weights_sha256)):
        with pytest.raises(StaleEngineError, match="unetc compile BUNDLE --target tensorrt`"):
            cache.find(graph, weights, Precision.FP32, ORIGIN, {})
    with pytest.raises(StaleEngineError, match="unetc compile BUNDLE --target tensorrt --precision fp16`"):
        find(cache, precision=Precision.FP16)


@pytest.mark.parametrize("field", ["unetc", "recipe", "library", "platform", "gpu"])
def test_an_engine_for_another_place_is_not_found(cache: EngineCache, field: str) -> None:
    with pytest.raises(StaleEngineError, match=rf"1 for {field} .*\(here.*unetc compile BUNDLE"):
        find(cache, msgspec.structs.replace(ORIGIN, **{field: OTHER_ORIGIN[field]}))


def test_all_that_an_origin_differs_in_is_said_in_the_words_that_the_cache_uses(cache: EngineCache) -> None:
    here = msgspec.structs.replace(ORIGIN, library="11.4.2", gpu=None)
    said = "for library 11.4.1 (here 11.4.2), gpu NVIDIA L40S of 8.9 with driver 580.65.06 (here unknown)"
    assert ORIGIN.misfit(here) == said
    with pytest.raises(StaleEngineError) as caught:
        find(cache, here)
    assert f"Others are: 1 {said}. Build it" in str(caught.value)
    assert here.misfit(ORIGIN) == "for library 11.4.2 (here 11.4.1)", "one for many GPUs runs on each of them"


def test_an_engine_of_a_record_that_names_no_recipe_is_not_found(cache: EngineCache) -> None:
    path = cache.folder(KEY) / RECORD
    older = json.loads(path.read_text())
    del older["key"]["origin"]["recipe"]
    path.write_text(json.dumps(older))
    with pytest.raises(StaleEngineError, match="no tensorrt engine in fp32 of this graph"):
        find(cache)


def test_an_engine_for_many_gpus_runs_on_each_but_one_for_this_gpu_is_preferred(cache: EngineCache) -> None:
    portable = msgspec.structs.replace(KEY, origin=msgspec.structs.replace(ORIGIN, gpu=None))
    cache.put(record(portable), ENGINE_BYTES)
    assert find(cache).key == KEY
    assert find(cache, differing("gpu").origin).key == portable


def test_of_several_sizes_the_largest_calls_and_then_the_widest_range_win(cache: EngineCache) -> None:
    def put(batch: str, side: str) -> EngineKey:
        edge = Range.parse(side, own=1)
        sizes = Sizes(batch=Range.parse(batch, own=1), height=edge, width=edge)
        key = msgspec.structs.replace(KEY, sizes=sizes)
        cache.put(record(key), ENGINE_BYTES)
        return key

    put("1,4", "1")
    largest = put("2,4", "2")
    assert find(cache).key == largest
    put("4", "2")
    assert find(cache).key == largest
    widest = put("1,4", "2")
    assert find(cache).key == widest


def test_of_several_sizes_those_that_take_the_usual_call_win(cache: EngineCache) -> None:
    def put(least: int, most: int) -> EngineKey:
        batch = Range(least=least, usual=least, most=most)
        key = msgspec.structs.replace(KEY, sizes=Sizes(batch=batch, height=ONE, width=ONE))
        shapes = {"sample": ((least, 1, 1, 1), (least, 1, 1, 1), (most, 1, 1, 1))}
        cache.put(msgspec.structs.replace(record(key), shapes=shapes), ENGINE_BYTES)
        return key

    small, large = put(1, 4), put(16, 32)
    assert find(cache, sample=(2, 1, 1, 1)).key == small
    for call in ((16, 1, 1, 1), (5, 1, 1, 1), (2, 1, 1)):
        assert find(cache, sample=call).key == large
    both = put(1, 16)
    assert find(cache, sample=(2, 1, 1, 1)).key == both


def test_of_engines_for_several_conditions_the_one_for_the_usual_call_wins(cache: EngineCache) -> None:
    keys = {77: KEY, 78: differing("rows")}
    for tokens, key in keys.items():
        states = {"encoder_hidden_states": ((1, tokens, 768), (2, tokens, 768), (2, tokens, 768))}
        cache.put(msgspec.structs.replace(record(key), shapes=record().shapes | states), ENGINE_BYTES)
    for tokens, key in keys.items():
        assert find(cache, encoder_hidden_states=(2, tokens, 768)).key == key


def test_an_engine_from_elsewhere_is_passed_over(cache: EngineCache, tmp_path: Path) -> None:
    here = EngineCache(tmp_path / "here")
    shutil.copytree(cache.folder(KEY), here.folder(KEY))
    with pytest.raises(StaleEngineError, match="not built here"):
        find(here)
    smaller = msgspec.structs.replace(KEY, sizes=Sizes(batch=ONE, height=ONE, width=ONE))
    here.put(record(smaller), ENGINE_BYTES)
    assert find(here).key == smaller
    here.put(*here.open(KEY, trust=True))  # as --trust-engines does
    assert find(here).key == KEY


@pytest.mark.parametrize("seal", ["", "é" * 64])
def test_a_seal_that_no_cache_makes_is_of_elsewhere(cache: EngineCache, seal: str) -> None:
    msgspec.structs.replace(record(), seal=seal).save(cache.folder(KEY) / RECORD)
    with pytest.raises(StaleEngineError, match="not built here"):
        cache.open(KEY)
    with pytest.raises(StaleEngineError, match="Others are: 1 not built here"):
        find(cache)


def test_a_changed_engine_is_not_found(cache: EngineCache) -> None:
    (cache.folder(KEY) / ENGINE).write_bytes(ENGINE_BYTES[:-1] + b"!")
    with pytest.raises(StaleEngineError, match="Others are: 1 damaged"):
        find(cache)
    (cache.folder(KEY) / RECORD).write_text("{}")
    with pytest.raises(StaleEngineError, match="no tensorrt engine in fp32"):
        find(cache)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_files_that_killed_processes_were_writing_are_trimmed(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    unfinished = cache.folder(differing("effort"))
    unfinished.mkdir()
    left = [unfinished / ".engine.trt.unetc-1", cache.folder(KEY) / ".kernels-0.bin.unetc-1"]
    for path in left:
        path.write_bytes(ENGINE_BYTES)
    written, handle = claim_file(unfinished, prefix_for(unfinished / ENGINE))
    try:
        trim(tmp_path, 10**6)
        assert [path.exists() for path in (*left, written)] == [False, False, True], "a living process writes the last"
    finally:
        os.close(handle)
    trim(tmp_path, 10**6)
    assert not written.exists()
    assert cache.open(KEY)[1] == ENGINE_BYTES


def test_only_engines_of_elsewhere_are_sealed_when_they_are_trusted(cache: EngineCache, tmp_path: Path) -> None:
    here = cache_in(tmp_path / "here")
    other = differing("effort")
    cache.put(record(other), ENGINE_BYTES)
    shutil.copytree(cache.folder(other), here.folder(other))
    before = [(here.folder(key) / ENGINE).stat().st_ino for key in (KEY, other)]
    wanted = {(name, Precision.FP32): key for name, key in {"own": KEY, "other": other}.items()}
    assert len(find_engines(wanted, here, trust=True, on_progress=ignore)) == 2
    after = [(here.folder(key) / ENGINE).stat().st_ino for key in (KEY, other)]
    assert [one == now for one, now in zip(before, after, strict=True)] == [True, False]
    assert here.open(other)[1] == ENGINE_BYTES


def test_of_engines_that_take_too_much_those_used_longest_ago_go(tmp_path: Path) -> None:
    one, other = EngineCache(tmp_path / "one"), EngineCache(tmp_path / "other")
    keys = [(one, KEY), (other, KEY), (one, differing("effort")), (other, differing("effort"))]
    for age, (cache, key) in enumerate(keys):
        cache.put(record(key), ENGINE_BYTES)
        os.utime(cache.folder(key) / ENGINE, (1000 - age, 1000 - age))
    one.touch(keys[2][1])

    def there() -> list[bool]:
        return [cache.folder(key).exists() for cache, key in keys]

    trim(tmp_path, sum(size_of(cache.folder(key)) for cache, key in keys))
    assert there() == [True] * 4
    (one.folder(KEY) / "kernels-0.bin").write_bytes(bytes(100))  # counts too
    trim(tmp_path, 2 * size_of(one.folder(keys[2][1])) + 100)
    assert there() == [True, False, True, False]
    trim(tmp_path, 0)
    assert there() == [False, False, True, False], "the one in use stays"
    assert one.open(keys[2][1])[1] == ENGINE_BYTES
