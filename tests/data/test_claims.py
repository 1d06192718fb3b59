"""Files that claim more than they hold, or than memory holds: refused in one line, in seconds, in little memory."""

import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from requirements import needs_proc

from iql_plugins import checkpoint, limits
from iql_plugins.data import load_dataset

h5py = pytest.importorskip("h5py")
gymnasium = pytest.importorskip("gymnasium")

from agents import make_agent  # noqa: E402

pytestmark = needs_proc

#: Address space beyond that of the process with all packages imported; half of what the smallest claim takes.
MOST_BYTES = 2**30
MOST_MEGABYTES, MOST_SECONDS = 300, 20
ROWS = 7
WORLD = 10**13

#: Loads what it is told, each in a fork of its own, below a limit of address space; answers with a line of JSON.
PROGRAM = f"""
import importlib, json, os, resource, signal, sys, time, traceback
from pathlib import Path
import h5py, torch
from iql_plugins import load, load_dataset
from iql_plugins.cli import main
from iql_plugins.cli.policies import load_agent
from iql_plugins.cli.settings import Settings, load_source
from iql_plugins.plugins import PluginError
for name in ("d3rlpy", "torchrl", "sb3"):
    try:
        load(name)
    except PluginError:
        pass
for name in ("minari", "pyarrow.parquet"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
calls = {{
    "dataset": load_dataset,
    "source": load_source,
    "agent": lambda path: load_agent(path, None, trust_pickle=False),
    "settings": lambda path: Settings.read(Path(path)),
    "train": lambda path, run: main(["train", "--config", path, "--run-dir", run]),
}}

def megabytes(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024

for line in sys.stdin:
    call, arguments, options = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before, start = megabytes("VmRSS"), time.monotonic()
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + {MOST_BYTES}, size + {MOST_BYTES}))
        signal.alarm({MOST_SECONDS})
        try:
            result = {{"value": str(calls[call](*arguments, **options))[:200]}}
        except BaseException as error:
            result = {{"error": type(error).__name__, "text": str(error)}}
        result |= {{"megabytes": megabytes("VmHWM") - before, "seconds": time.monotonic() - start}}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    status = os.waitpid(child, 0)[1]
    print(text or json.dumps({{"died": status}}), flush=True)
"""

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def process() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Arrow's own allocators reserve a gigabyte at once.
        env=os.environ | {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def loaded(process: "subprocess.Popen[str]") -> Callable[..., dict[str, Any]]:
    """Calls a loader below the limit of address space; what it came to."""

    def call(name: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([name, [str(argument) for argument in arguments], options]) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("{"):
                result: dict[str, Any] = json.loads(line)
                return result
        raise AssertionError(process.poll())

    return call


@pytest.fixture
def refused(loaded: Callable[..., dict[str, Any]]) -> Refused:
    """The error of a loader, which is one documented line, and came early and cheap."""

    def call(name: str, path: Path, *arguments: Any, **options: Any) -> str:
        result = loaded(name, path, *arguments, **options)
        assert result.get("error") in ("DatasetError", "CheckpointError", "UserError"), result
        assert path.name in result["text"] or str(path.parent) in result["text"]
        assert "\n" not in result["text"]
        assert result["megabytes"] < MOST_MEGABYTES, result
        assert result["seconds"] < MOST_SECONDS
        text: str = result["text"]
        return text

    return call


def columns(rows: int = ROWS) -> dict[str, Any]:
    ends = np.zeros(rows, np.float32)
    ends[-1] = 1
    return {
        "observations": np.zeros((rows, 2), np.float32),
        "actions": np.full((rows, 1), 0.5, np.float32),
        "rewards": np.zeros(rows, np.float32),
        "terminals": ends,
    }


def zeros(size: int, *, raw: bool) -> bytes:
    """A stream of DEFLATE that unpacks to so many zeros; ``raw`` as in a zip, else as zlib has it."""
    piece = 2**24
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = block * (size // piece) + last.compress(bytes(size % piece)) + last.flush()
    return stream if raw else b"\x78\x9c" + stream + bytes(4)


def header(shape: tuple[int, ...], version: int = 1) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def write_npz(path: Path, member: bytes, *, packed: bool = False, **claims: Any) -> Path:
    """An archive in which the observations are these bytes; ``claims`` are what its directory says of them."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in columns().items():
            if key != "observations":
                with archive.open(f"{key}.npy", "w") as file:
                    np.save(file, array)
        archive.writestr("observations.npy", member)
        if packed:
            archive.filelist[-1].compress_type = zipfile.ZIP_DEFLATED
        for name, value in claims.items():
            setattr(archive.filelist[-1], name, value)
    return path


def write_h5(path: Path, **changed: Callable[[Any], None]) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in columns().items():
            if key in changed:
                changed[key](file)
            else:
                file[key] = array
    return path


# Archives of NumPy


def deflated(head: bytes, size: int) -> bytes:
    """A stream that unpacks to these bytes, and then to so many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(size, raw=True)


def write_bomb(path: Path) -> Path:
    """All columns of 5 * 10^9 rows, 100 GB in 100 MB, and nothing in it is a lie but the checksums."""
    rows = 5 * 10**9
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in columns().items():
            head, size = header((rows, *array.shape[1:])), 4 * rows * array[0].size
            archive.writestr(f"{key}.npy", deflated(head, size))
            archive.filelist[-1].compress_type = zipfile.ZIP_DEFLATED
            archive.filelist[-1].file_size = len(head) + size
    return path


def lying(more: int) -> dict[str, Any]:
    """What the archive says is whole; its checksum is that of so many bytes more, and the stream of 10 GB."""
    content = HEAD + bytes(8 * ROWS)
    claims = {"file_size": len(content), "CRC": zlib.crc32(content + bytes(more))}
    return {"member": deflated(HEAD, 10**10), "packed": True, **claims}


HEAD = header((ROWS, 2))
WHOLE = len(HEAD) + 8 * ROWS
LONG = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)
WIDE = header((ROWS, WORLD))
ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a header of 10^13 rows": (
        lambda path: write_npz(path, header((WORLD, 2)) + bytes(8 * ROWS)), "that its header says"
    ),
    "header and directory of 10^13 rows": (
        lambda path: write_npz(path, header((WORLD, 2)), file_size=len(header((WORLD, 2))) + 8 * WORLD), "rows"
    ),
    "rows of 10^13 numbers": (
        lambda path: write_npz(path, WIDE, file_size=len(WIDE) + 4 * ROWS * WORLD), "of the memory"
    ),
    "100 GB from 100 MB": (write_bomb, "of the memory"),
    "10 GB of which the directory does not know": (lambda path: write_npz(path, **lying(0)), "cannot be read"),
    "10 GB, and a checksum of one byte more": (lambda path: write_npz(path, **lying(1)), "unpacks to another size"),
    "less than header and directory say": (lambda path: write_npz(path, HEAD, file_size=WHOLE), "cannot be read"),
    "a header of 4 GB": (
        lambda path: write_npz(path, deflated(LONG, 2**32), packed=True, file_size=12 + 2**32), "cannot be read"
    ),
    "a method that unpacks all at once": (
        lambda path: write_npz(path, HEAD + bytes(8 * ROWS), compress_type=zipfile.ZIP_BZIP2), "np.savez_compressed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("case", list(ARCHIVES))
def test_an_archive_that_claims_the_world_is_refused(case: str, mapped: bool, refused: Refused, tmp_path: Path) -> None:
    write, text = ARCHIVES[case]
    path = write(tmp_path / "d.npz")
    assert text in refused("dataset", path, **({"memmap_dir": str(tmp_path / "mapped")} if mapped else {}))
    assert os.listdir(tmp_path) == ["d.npz"]


@pytest.mark.parametrize("mapped", [False, True])
def test_an_archive_that_is_compressed_loads(mapped: bool, tmp_path: Path) -> None:
    """Highly so, as constant columns are: it fits into memory, and is what it says."""
    given = columns(300_000)
    np.savez_compressed(tmp_path / "d.npz", **given)
    assert (tmp_path / "d.npz").stat().st_size < 20_000
    data = load_dataset(tmp_path / "d.npz", memmap_dir=tmp_path / "mapped" if mapped else None)
    assert len(data) == 300_000
    assert (data["action"] == 0.5).all()


# Parquet


def varint(number: int) -> bytes:
    """An integer as Thrift's compact protocol has it, in which footers are written."""
    number, content = number << 1 ^ number >> 63, b""
    while number > 127:
        number, content = number >> 7, content + bytes([number & 127 | 128])
    return content + bytes([number])


#: A number that a footer has nowhere by chance.
MANY = 12345


def write_parquet(path: Path, claim: int, which: slice) -> Path:
    """A file of so many rows, of whose footer some of the numbers of rows and values are another one."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    arrays = columns(MANY)
    pairs = arrays.pop("observations").reshape(-1)
    arrays["actions"] = arrays["actions"].reshape(-1)
    parquet.write_table(pa.table({"observations": pa.FixedSizeListArray.from_arrays(pairs, 2)} | arrays), path)
    content = path.read_bytes()
    (size,) = struct.unpack("<I", content[-8:-4])
    first, *rest = content[-8 - size : -8].split(varint(MANY))
    assert len(rest) > 4
    claims = [varint(MANY)] * len(rest)
    claims[which] = [varint(claim)] * len(claims[which])
    footer = first + b"".join(number + part for number, part in zip(claims, rest, strict=True))
    path.write_bytes(content[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return path


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("claim", "text"), [(WORLD, "of the memory"), (10**7, "expected [10000000, 2]"), (-1, "says it has -1 rows")]
)
def test_parquet_that_claims_the_world_is_refused(
    claim: int, text: str, mapped: bool, refused: Refused, tmp_path: Path
) -> None:
    options = {"memmap_dir": str(tmp_path / "mapped")} if mapped else {}
    path = write_parquet(tmp_path / "d.parquet", claim, slice(None))
    assert text in refused("dataset", path, **options)
    assert os.listdir(tmp_path) == ["d.parquet"]


def test_parquet_of_which_a_page_alone_claims_the_world_is_refused(refused: Refused, tmp_path: Path) -> None:
    """Of what a page says that it has, the footer says nothing: a row of a list may be any of its values."""
    path = write_parquet(tmp_path / "d.parquet", MANY, slice(None))
    content = path.read_bytes()
    head, tail = content.split(varint(2 * MANY), 1)
    assert len(head) < 100, "in the header of the observations' page"
    for claim, text in ((10**9, "for a row group, more than"), (-1, "has a damaged header")):
        path.write_bytes(head + varint(claim) + tail)
        assert text in refused("dataset", path)


def test_no_number_of_a_footer_alone_takes_memory(loaded: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    errors = []
    for number, claim in itertools.product(range(10), (WORLD, 1, -1)):
        path = write_parquet(tmp_path / "d.parquet", claim, slice(number, number + 1))
        result = loaded("dataset", path)
        assert result["megabytes"] < MOST_MEGABYTES, result
        if "value" in result:
            assert f"[{MANY}, 1]" in result["value"]
        else:
            assert (result["error"], result["text"].count(str(path))) == ("DatasetError", 1), result
            errors.append(result["text"])
    assert any("in its row groups" in error for error in errors)


# HDF5


def chunked(
    key: str, shape: tuple[int, ...], chunks: tuple[int, ...], stream: bytes | None = None, **options: Any
) -> Any:
    """Writes a dataset, of which the first chunk is these bytes."""

    def write(file: Any) -> None:
        limit = (None, *shape[1:])
        made = file.create_dataset(key, shape, "f4", chunks=chunks, maxshape=limit, **{"compression": "gzip"} | options)
        if stream is not None:
            made.id.write_direct_chunk((0,) * len(shape), stream)

    return write


def all_of(rows: int) -> dict[str, Callable[[Any], None]]:
    return {key: chunked(key, (rows, *array.shape[1:]), (1024, *array.shape[1:])) for key, array in columns().items()}


CHUNKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "10^13 zeros": (lambda path: write_h5(path, **all_of(WORLD)), "of the memory"),
    "more zeros than memory, few enough for flags": (lambda path: write_h5(path, **all_of(6 * 10**7)), "of the memory"),
    "a chunk of 2 GB for seven rows": (
        lambda path: write_h5(path, rewards=chunked("rewards", (ROWS,), (2**29,), zeros(2**31, raw=False))),
        "more than all of it",
    ),
    "a chunk that unpacks to 10 GB": (
        lambda path: write_h5(path, rewards=chunked("rewards", (ROWS,), (1024,), zeros(10**10, raw=False))),
        "unpacks to more than its 4,096 bytes",
    ),
    "a large chunk that unpacks to 10 GB": (
        lambda path: write_h5(
            path, rewards=chunked("rewards", (ROWS,), (2**23,), zeros(10**10, raw=False), shuffle=True, fletcher32=True)
        ),
        "unpacks to more than",
    ),
    "a filter that says itself how much it unpacks to": (
        lambda path: write_h5(path, rewards=chunked("rewards", (ROWS,), (7,), scaleoffset=3, compression=None)),
        "h5repack",
    ),
    "texts of any length": (
        lambda path: write_h5(
            path, rewards=lambda file: file.create_dataset("rewards", data=["x" * 10**6] * ROWS)
        ),
        "must be numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CHUNKS))
def test_hdf5_that_claims_the_world_is_refused(case: str, refused: Refused, tmp_path: Path) -> None:
    write, text = CHUNKS[case]
    assert text in refused("dataset", write(tmp_path / "d.h5"))


def test_hdf5_that_memory_does_not_hold_is_refused_where_it_is_mapped_too(refused: Refused, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "d.h5", **all_of(WORLD))
    assert "left" in refused("dataset", path, memmap_dir=str(tmp_path / "mapped"))
    assert os.listdir(tmp_path) == ["d.h5"]


@pytest.mark.parametrize(
    "options", [{}, {"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"}]
)
def test_hdf5_with_the_usual_filters_loads(options: dict[str, Any], tmp_path: Path) -> None:
    """Of chunks that are large enough to be looked into, and do not compress at all."""
    rows, random = 600_000, np.random.default_rng(0)
    given = columns(rows) | {"observations": random.integers(0, 256, (rows, 2)).astype(np.uint8)}
    with h5py.File(tmp_path / "d.h5", "w") as file:
        for key, array in given.items():
            file.create_dataset(key, data=array, chunks=(rows // 2, *array.shape[1:]), **options)
    data = load_dataset(tmp_path / "d.h5")
    assert data["observation"].tolist() == given["observations"].tolist()


def test_groups_that_links_make_many_of_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "d.hdf5"
    with h5py.File(path, "w") as file:
        groups = [file.create_group("observations"), *(file.create_group(f"metadata/{n}") for n in range(40))]
        for group, inner in itertools.pairwise(groups):
            group["a"] = group["b"] = inner
        groups[-1]["x"] = np.zeros(5)
    assert "store it once" in refused("dataset", path)


def test_a_space_of_texts_is_refused(refused: Refused, tmp_path: Path) -> None:
    document, tensors = make_agent("continuous").state()
    document["spaces"]["observation"]["dtype"] = "U200000000"
    checkpoint.write(tmp_path / "policy.safetensors", document, tensors)
    assert "must be that of a number" in refused("agent", tmp_path / "policy.safetensors")


@pytest.mark.parametrize("key", ["observations", "num_episodes"])
def test_a_link_to_a_pipe_is_not_opened(key: str, refused: Refused, tmp_path: Path) -> None:
    """Whoever opens it waits until someone writes into it."""
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file[key] = h5py.ExternalLink(str(tmp_path / "pipe"), "/x")
    assert f"{key!r} is a link" in refused("dataset", tmp_path / "d.h5")


def test_a_file_of_d3rlpy_that_claims_the_world_is_refused(refused: Refused, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["num_episodes"], file["terminated_0"] = 1, True
        for key in ("observations", "actions", "rewards"):
            file.create_dataset(f"{key}_0", (WORLD, 1), "f4", chunks=(1024, 1), compression="gzip")
    assert "of the memory" in refused("dataset", tmp_path / "d.h5")
    with h5py.File(tmp_path / "d.h5", "a") as file:
        del file["num_episodes"]
        file.create_dataset("num_episodes", (WORLD,), "i8", chunks=(1024,), compression="gzip")
    assert "must be a single number" in refused("dataset", tmp_path / "d.h5")


# Folders


def nested(depth: int = 10**6) -> str:
    return "[" * depth + "]" * depth


@pytest.fixture
def minari_folder(tmp_path: Path) -> Path:
    pytest.importorskip("minari")
    from minari_helpers import walk

    return walk(tmp_path)


METADATA: dict[str, tuple[str, Any]] = {
    "episodes": ("total_episodes", WORLD),
    "episodes that memory has room for": ("total_episodes", 10**8),
    "steps": ("total_steps", WORLD),
    "nesting": ("combined_datasets", "NESTED"),
    "nesting of a space": ("observation_space", nested()),
    "nesting of the environment": ("env_spec", nested()),
    "texts of a space": (
        "action_space", json.dumps({"type": "Box", "dtype": "S2000000000", "shape": [1], "low": ["a"], "high": ["b"]})
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(METADATA))
def test_metadata_of_minari_that_claim_the_world_are_refused(case: str, refused: Refused, minari_folder: Path) -> None:
    path = minari_folder / "metadata.json"
    metadata = json.loads(path.read_text())
    key, value = METADATA[case]
    path.write_text(json.dumps(metadata | {key: value}).replace('"NESTED"', nested()))
    refused("source", minari_folder)


EPISODES: dict[str, Callable[[Any], None]] = {
    "rows": lambda episode: episode.create_dataset("rewards", (WORLD,), "f8", chunks=(1024,)),
    "a chunk": lambda episode: chunked("rewards", (3,), (1024,), zeros(10**10, raw=False))(episode),
    "infos": lambda episode: episode.create_dataset("infos/x", (WORLD,), "f8", chunks=(1024,)),
    "texts": lambda episode: episode.create_dataset("infos/x", (WORLD,), h5py.string_dtype(), chunks=(1024,)),
    "a link": lambda episode: episode.__setitem__("infos/x", h5py.ExternalLink("/dev/zero", "/x")),
}


@pytest.mark.parametrize("case", list(EPISODES))
def test_an_episode_of_minari_that_claims_the_world_is_refused(
    case: str, refused: Refused, minari_folder: Path
) -> None:
    with h5py.File(minari_folder / "main_data.hdf5", "a") as file:
        if case in ("rows", "a chunk"):
            del file["episode_1/rewards"]
        EPISODES[case](file["episode_1"])
    refused("dataset", minari_folder)


def test_a_tensordict_that_claims_the_world_is_refused(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    load_dataset("pendulum-v1-sac")[:ROWS].memmap(folder)
    path = folder / "meta.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"action": metadata["action"] | {"shape": [WORLD, 1]}}))
    refused("dataset", folder)
    path.write_text(json.dumps(metadata | {"more": "NESTED"}).replace('"NESTED"', nested()))
    refused("dataset", folder)
    path.write_text(json.dumps(metadata))
    # Files of holes: they have the size, and nothing in it.
    for meta in folder.rglob("meta.json"):
        meta.write_text(meta.read_text().replace(f"[{ROWS}", "[25000000"))
    for file in folder.rglob("*.memmap"):
        os.truncate(file, file.stat().st_size // ROWS * 25_000_000)
    assert "of the memory" in refused("dataset", folder)


# Policies and runs

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "layers of 10^6": {"hidden_sizes": [10**6, 10**6]},
    "layers that memory would hold": {"hidden_sizes": [10**4, 10**4]},
    "as many layers": {"hidden_sizes": [1] * 10**5},
    "as many layers as there may be": {"hidden_sizes": [1] * 4000, "n_critics": 1},
    "critics": {"n_critics": 10**9},
}


@pytest.mark.parametrize("case", list(CONFIGURATIONS))
def test_a_policy_of_networks_that_its_file_does_not_hold_is_refused(
    case: str, refused: Refused, tmp_path: Path
) -> None:
    document, tensors = make_agent("continuous").state()
    document["config"] |= CONFIGURATIONS[case]
    checkpoint.write(tmp_path / "policy.safetensors", document, tensors)
    refused("agent", tmp_path / "policy.safetensors")


def test_a_policy_of_spaces_that_its_file_does_not_hold_is_refused(refused: Refused, tmp_path: Path) -> None:
    spaces: list[dict[str, Any]] = [
        {"box": [10**6, 10**6], "dtype": "float32", "low": None, "high": None},
        {"box": [3, 10**6, 10**6], "dtype": "uint8", "low": None, "high": None},
        {"discrete": WORLD, "start": 0},
        {"dict": {str(n): {"box": [3, 36, 36], "dtype": "uint8", "low": None, "high": None} for n in range(10_000)}},
    ]
    for space in spaces:
        document, tensors = make_agent("continuous").state()
        document["spaces"]["observation"] = space
        checkpoint.write(tmp_path / "policy.safetensors", document, tensors)
        refused("agent", tmp_path / "policy.safetensors")


def test_a_header_of_a_policy_that_claims_the_world_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    for head in (
        json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}).encode(),
        b'{"__metadata__":' + nested().encode() + b"}",
    ):
        path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
        refused("agent", path)
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused("agent", path)


def test_a_document_of_a_policy_nested_a_million_deep_is_refused(refused: Refused, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for text in (nested(), f'{{"extra": {nested(200)}}}'):
        metadata = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "document": text}
        metadata["checksum"] = checkpoint._checksum(text, {})
        save_file({}, tmp_path / "policy.safetensors", metadata)
        assert "nested more than 100 deep" in refused("agent", tmp_path / "policy.safetensors")


def forged(path: Path, change: Callable[[Any, Any], None]) -> Path:
    """A file of d3rlpy's with another configuration or other tensors."""
    pytest.importorskip("d3rlpy")
    import iql_d3rlpy
    from iql_d3rlpy import files

    algorithm = iql_d3rlpy.IQLConfig().create()
    algorithm.create_impl((3,), 2)
    algorithm.save(path)
    with path.open("rb") as file:
        document = files._Reader(file).load()
    configuration = json.loads(document["config"])
    change(document, configuration)
    document["config"] = files.Registered(json.dumps(configuration).replace('"NESTED"', nested()))
    path.write_bytes(pickle.dumps(document))
    return path


def bomb(document: Any, configuration: Any) -> None:
    import io

    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(document["torch"])) as given, zipfile.ZipFile(content, "w") as made:
        for info in given.infolist():
            made.writestr(info.filename, zeros(10**10, raw=True) if info.filename.endswith("/0") else given.read(info))
            if info.filename.endswith("/0"):
                made.filelist[-1].compress_type, made.filelist[-1].file_size = zipfile.ZIP_DEFLATED, 10**10
    document["torch"] = content.getvalue()


NATIVE: dict[str, Callable[[Any, Any], None]] = {
    "layers": lambda document, configuration: configuration["config"]["params"].update(
        {
            f"{name}_encoder_factory": {"type": "vector", "params": {"hidden_units": [10**6, 10**6]}}
            for name in ("actor", "critic", "value")
        }
    ),
    "observations": lambda document, configuration: configuration.update(observation_shape=[WORLD]),
    "nesting": lambda document, configuration: configuration["config"]["params"].update(gamma="NESTED"),
    "a compressed archive": bomb,
}


@pytest.mark.parametrize("case", list(NATIVE))
def test_a_file_of_d3rlpys_algorithms_that_claims_the_world_is_refused(
    case: str, refused: Refused, tmp_path: Path
) -> None:
    refused("agent", forged(tmp_path / "policy.d3", NATIVE[case]))


ZIPPED: dict[str, dict[str, Any]] = {
    "layers": {"net_arch": [10**6, 10**6]},
    "as many layers": {"net_arch": [1] * 10**5},
    "critics": {"n_critics": 10**9},
}


@pytest.mark.parametrize("case", list(ZIPPED))
def test_a_zip_of_stable_baselines3_that_claims_the_world_is_refused(
    case: str, refused: Refused, tmp_path: Path
) -> None:
    files = stable_baselines3_files()
    path = tmp_path / "policy.zip"
    document, tensors = checkpoint.unpacked(saved_zip(path), "policy")
    document["policy"]["arguments"] |= ZIPPED[case]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(files.MEMBER, checkpoint.packed(document, tensors))
    refused("agent", path)


def test_a_compressed_zip_of_stable_baselines3_is_refused(refused: Refused, tmp_path: Path) -> None:
    files = stable_baselines3_files()
    path = tmp_path / "policy.zip"
    content = saved_zip(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(files.MEMBER, deflated(content, 10**10))
        archive.filelist[-1].compress_type, archive.filelist[-1].file_size = zipfile.ZIP_DEFLATED, 10**10
    assert "is compressed" in refused("agent", path)


def stable_baselines3_files() -> Any:
    pytest.importorskip("stable_baselines3")
    from iql_sb3 import files

    return files


def saved_zip(path: Path) -> bytes:
    """Saves a model; the member of its zip that is ours."""
    import iql_sb3

    iql_sb3.IQL.from_agent(make_agent("continuous")).save(path)
    with zipfile.ZipFile(path) as archive:
        return archive.read(stable_baselines3_files().MEMBER)


def test_a_pickle_that_numbers_its_objects_in_billions_is_refused(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("d3rlpy")
    (tmp_path / "policy.d3").write_bytes(b"\x80\x04Nr" + struct.pack("<I", 2**30) + b".")
    assert "keeps 1073741824 objects" in refused("agent", tmp_path / "policy.d3")


def test_a_compressed_file_of_torch_is_refused(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    import iql_torchrl

    path = tmp_path / "policy.pt"
    iql_torchrl.IQL.from_agent(make_agent("continuous")).save(path)
    document = {"torch": path.read_bytes()}
    bomb(document, None)
    path.write_bytes(document["torch"])
    assert "compressed" in refused("agent", path)


def test_a_run_that_claims_the_world_is_refused(
    refused: Refused, loaded: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from iql_plugins.cli.arguments import parse
    from iql_plugins.cli.train import new_settings

    arguments: Any = parse(["train", "--n-steps", "10", "--seeds", "1"])
    settings, _ = new_settings(arguments)
    settings.write(tmp_path, {}, {})
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    for changes in ({"hidden_sizes": [10**6, 10**6]}, {"batch_size": 10**12}, {"n_critics": 10**9}):
        changed = json.loads(json.dumps(document))
        changed["settings"]["hyperparameters"] |= changes
        path.write_text(json.dumps(changed))
        result = loaded("train", path, tmp_path / "run")
        assert result.get("value") == "2", result
        assert result["megabytes"] < MOST_MEGABYTES
        assert not (tmp_path / "run").exists()
    path.write_text(json.dumps(document | {"environment": "NESTED"}).replace('"NESTED"', nested()))
    assert "nested more than 100 deep" in refused("settings", path)


# What is believed


def test_json_is_parsed_as_deep_as_anybody_writes_it() -> None:
    assert limits.parse_json(nested(limits.DEEPEST)) == json.loads(nested(limits.DEEPEST))
    assert limits.parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for depth in (limits.DEEPEST + 1, 10**6):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            limits.parse_json(nested(depth))
    with pytest.raises(ValueError, match="Expecting"):
        limits.parse_json("{")


def test_json_that_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 100)
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="6 bytes of JSON may take more than the 100"):
        limits.read_json(tmp_path / "x.json")


def test_networks_are_limited_in_what_they_allocate() -> None:
    with pytest.raises(ValueError, match="too many"), limits.WeightLimit(99, "too many"):
        torch.nn.Linear(10, 10)
    with limits.WeightLimit(99, "too many"):
        torch.nn.Linear(9, 9)
    with pytest.raises(ValueError, match="too many"), limits.WeightLimit(99, "too many"):
        torch.zeros((1, 100))
    tensor = torch.ones(60)
    with pytest.raises(ValueError, match="too many"), limits.WeightLimit(99, "too many"):
        [tensor.clone() for _ in range(2)]


@pytest.mark.slow
def test_the_memory_that_is_left_is_within_a_limit_of_the_process() -> None:
    program = """
import resource
from iql_plugins.limits import available_memory
before = available_memory()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 10**8, size + 10**8))
print(before > 10**8 >= available_memory() > 10**7)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "True"
