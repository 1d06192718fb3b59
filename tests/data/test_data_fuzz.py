"""Whatever is in a file: a dataset that passes its check, or one clear error."""

import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tensordict import TensorDict

from iql_plugins.data import DatasetError, check_dataset, load_dataset
from iql_plugins.data.inspection import inspect

h5py = pytest.importorskip("h5py")

#: Where the package that reads them is there.
PARQUET = [".parquet"] if find_spec("pyarrow") else []
KEYS = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")
FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def loads_or_says_why(path: Path) -> TensorDict | None:
    try:
        data = load_dataset(path)
    except DatasetError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 600
        return None
    check_dataset(data)
    return data


def write(path: Path, columns: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        with h5py.File(path, "w") as file:
            for key, column in columns.items():
                file[key] = column
    return path


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Columns that fit together."""
    rows = draw(st.integers(1, 8))
    floats = draw(st.sampled_from([np.float16, np.float32, np.float64, ">f4"]))
    numbers = st.floats(-100, 100, width=16)
    shape = (rows, *draw(st.lists(st.integers(1, 3), max_size=2)))
    kind = draw(st.sampled_from([floats, np.uint8, np.int32, bool]))
    observations = arrays.arrays(kind, shape, elements=numbers if kind == floats else None)
    flags = arrays.arrays(draw(st.sampled_from([bool, np.float32, np.uint8])), rows, elements=st.sampled_from([0, 1]))
    actions = st.one_of(
        arrays.arrays(floats, (rows, draw(st.integers(2, 3))), elements=numbers),
        arrays.arrays(np.int64, draw(st.sampled_from([(rows,), (rows, 1)])), elements=st.integers(0, 5)),
    )
    columns = {
        "observations": draw(observations),
        "next_observations": draw(observations),
        "actions": draw(actions),
        "rewards": draw(arrays.arrays(floats, rows, elements=numbers)),
        "terminals": draw(flags),
        "timeouts": draw(flags),
    }
    for key in ("next_observations", "timeouts"):
        if draw(st.booleans()):
            del columns[key]
    return columns


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    """Columns of which one is replaced by an arbitrary array, or removed."""
    columns = draw(valid())
    key = draw(st.sampled_from(KEYS))
    dtypes = st.one_of(
        arrays.boolean_dtypes(),
        arrays.integer_dtypes(),
        arrays.unsigned_integer_dtypes(),
        arrays.floating_dtypes(),
        arrays.complex_number_dtypes(),
        arrays.byte_string_dtypes(min_len=1),
    )
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    if draw(st.booleans()):
        columns[key] = draw(arrays.arrays(dtypes, shapes))
    else:
        columns.pop(key, None)
    return columns


@FUZZ
@given(columns=valid(), suffix=st.sampled_from([".npz", ".hdf5"]))
def test_columns_that_fit_together_load(columns: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"d{suffix}", columns)
    rows = len(columns["rewards"])
    terminals = columns["terminals"].astype(bool)
    timeouts = columns.get("timeouts", np.zeros(rows)).astype(bool) & ~terminals
    lost = timeouts.copy()
    lost[-1] |= not terminals[-1]
    if "next_observations" in columns:
        lost[:] = False
    data = loads_or_says_why(path)
    if lost.all():
        assert data is None
        return
    assert data is not None
    assert len(data) == rows - lost.sum()
    assert data["next", "terminated"].squeeze(-1).tolist() == terminals[~lost].tolist()
    assert data["next", "reward"].squeeze(-1).tolist() == columns["rewards"][~lost].astype(np.float32).tolist()
    inspect(path)


@FUZZ
@given(columns=anything(), suffix=st.sampled_from([".npz", ".hdf5"]))
def test_any_column_loads_or_is_one_clear_error(columns: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    loads_or_says_why(write(tmp_path / f"d{suffix}", columns))


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@FUZZ
@given(data=st.data())
def test_any_damaged_file_loads_or_is_one_clear_error(suffix: str, data: st.DataObject, tmp_path: Path) -> None:
    columns = {key: np.zeros((4, 2) if "obs" in key else 4, np.float32) for key in KEYS}
    path = write(tmp_path / f"d{suffix}", columns)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path.write_bytes(content[:end])
    loads_or_says_why(path)


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".npz", ".hdf5", ".h5", *PARQUET]))
def test_any_bytes_are_one_clear_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    assert loads_or_says_why(path) is None


@FUZZ
@given(content=st.binary(max_size=200), header=st.booleans(), key=st.sampled_from(KEYS))
def test_any_member_of_an_archive_is_one_clear_error(content: bytes, header: bool, key: str, tmp_path: Path) -> None:
    columns = {name: np.zeros((4, 2) if "obs" in name else 4, np.float32) for name in KEYS if name != key}
    path = write(tmp_path / "d.npz", columns)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{key}.npy", (b"\x93NUMPY\x01\x00" if header else b"") + content)
    assert loads_or_says_why(path) is None


@FUZZ
@given(data=st.data())
def test_any_damaged_folder_of_a_tensordict_loads_or_is_one_clear_error(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    if not folder.exists():
        load_dataset("pendulum-v1-sac")[:3].memmap(folder)
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = file.read_bytes()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        loads_or_says_why(folder)
    finally:
        file.write_bytes(whole)
