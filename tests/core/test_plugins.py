"""The plugin host: finding, loading, asking; and what a bad plugin cannot do to the others."""

import json
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SPACES, make_dataset
from strangers import Distribution, Entry, good, host_of, plugin
from tensordict import TensorDict

import iql_plugins
from iql_plugins import plugins
from iql_plugins.data import Dataset, DatasetError, Options, UnknownSourceError
from iql_plugins.hookspecs import Adapter
from iql_plugins.plugins import AdapterNotFoundError, Host, PluginError, PluginInfo


def raising(error: BaseException) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load


BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "import": (raising(ImportError("no module x")), "cannot be imported: ImportError: no module x"),
    "syntax": (raising(SyntaxError("bad")), "cannot be imported: SyntaxError"),
    "exit": (raising(SystemExit(3)), "cannot be imported: SystemExit: 3"),
    "misspelt": (
        lambda: plugin("bad", iql_map_bacth=lambda batch: None),
        "implements iql_map_bacth; the hooks are iql_adapter, iql_commands, iql_map_batch, iql_objectives, "
        "iql_read_dataset",
    ),
    "unmarked": (
        lambda: types.SimpleNamespace(iql_adapter=lambda: Adapter("bad", None)),
        "does not mark iql_adapter with iql_plugins.hookspecs.hookimpl",
    ),
    "signature": (lambda: plugin("bad", iql_map_batch=lambda data: None), "does not fit the hooks"),
}


@pytest.fixture(params=BROKEN)
def bad(request: pytest.FixtureRequest) -> Iterator[tuple[Entry, str]]:
    load, message = BROKEN[request.param]
    return Entry("bad", load, "a-bad-distribution"), message


def test_a_broken_plugin_is_named_with_its_distribution_and_the_others_work(bad: tuple[Entry, str]) -> None:
    entry, message = bad
    host = host_of(entry, good(iql_map_batch=lambda batch: TensorDict({"x": torch.tensor(batch)})))
    assert host.map_batch(3)["x"] == 3
    assert host.load("good").name == "good"
    with pytest.raises(PluginError, match=f"plugin 'bad' of a-bad-distribution 1.0 .*{message}"):
        host.load("bad")
    info = host.available()["bad"]
    assert info.error is not None
    assert message in info.error
    assert host.available()["good"].error is None


def test_strict_mode_raises_where_a_broken_plugin_is_met(
    bad: tuple[Entry, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PluginError, match="plugin 'bad'"):
        host_of(bad[0], good(), strict=True).map_batch(3)
    monkeypatch.setenv("IQL_PLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match="plugin 'bad'"):
        host_of(bad[0], good()).map_batch(3)
    monkeypatch.setenv("IQL_PLUGINS_STRICT", "0")
    with pytest.raises(TypeError, match=r"no adapter knows this batch, int; .* not asked were: plugin 'bad'"):
        host_of(bad[0], good()).map_batch(3)


def test_only_allowed_plugins_are_looked_at(bad: tuple[Entry, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(host_of(bad[0], good(), allow=["good"], strict=True).available()) == {"good"}
    monkeypatch.setenv("IQL_PLUGINS_ALLOW", "good, other")
    host = host_of(bad[0], good(), strict=True)
    assert set(host.available()) == {"good"}
    with pytest.raises(AdapterNotFoundError, match="no adapter 'bad' is installed"):
        host.load("bad")
    monkeypatch.setenv("IQL_PLUGINS_ALLOW", "")
    assert not host_of(good()).available()


def test_a_name_that_two_distributions_take_is_refused_and_the_others_work() -> None:
    twice = [Entry("same", lambda: plugin("same"), owner) for owner in ("one", "two")]
    host = host_of(*twice, good())
    with pytest.raises(PluginError, match=r"'same' is declared by one \(same.plugin\) and two .*uninstall all but one"):
        host.load("same")
    assert host.load("good").name == "good"
    with pytest.raises(PluginError, match="declared by"):
        host_of(*twice, strict=True).available()


def test_the_same_distribution_found_twice_is_no_duplicate() -> None:
    assert host_of(good(), good()).load("good").name == "good"


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(
        AdapterNotFoundError, match=r"no adapter 'god' is installed: did you mean 'good'.*there are good"
    ):
        host_of(good()).load("god")


def test_a_missing_framework_gets_the_line_that_installs_it() -> None:
    lacking = Entry("sb9", lambda: plugin("sb9", iql_adapter=lambda: Adapter("sb9", "nosuchmodule")))
    failing = plugin("sb9", iql_adapter=raising(ImportError("No module named 'x'")))
    for entry in (lacking, Entry("sb9", lambda: failing)):
        entry.dist = Distribution("iql-plugins")
        with pytest.raises(PluginError, match=r"pip install 'iql-plugins\[sb9\]'"):
            host_of(entry).load("sb9")


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda: {"name": "bad"}, "must return an Adapter from iql_adapter.*got dict"),
        (lambda: Adapter("other", None), "describes itself as 'other'"),
        (raising(ValueError("oh")), r"failed in iql_adapter\(\): ValueError: oh"),
    ],
)
def test_an_adapter_that_describes_itself_wrongly_is_refused(describe: Callable[[], Any], message: str) -> None:
    entry = Entry("bad", lambda: plugin("bad", iql_adapter=describe))
    with pytest.raises(PluginError, match=message):
        host_of(entry).load("bad")
    with pytest.raises(PluginError, match="it is no adapter"):
        host_of(Entry("bad", types.SimpleNamespace)).load("bad")


def test_the_first_plugin_that_knows_a_source_loads_it() -> None:
    mine = Dataset(make_dataset(SPACES["continuous"], 4).cpu(), "mine")

    def read(source: object, options: Options) -> Dataset | None:
        return mine if source == "mine" else None

    host = host_of(good("a"), good("b", iql_read_dataset=read), good("c", iql_read_dataset=lambda source: None))
    assert host.read_dataset("mine", Options()) is mine
    with pytest.raises(DatasetError, match=r"no dataset, file or folder 'yours'.*npz.*installed plugins are a, b, c"):
        host.read_dataset("yours", Options())


@pytest.mark.parametrize("error", [DatasetError("row 3 is not finite"), ImportError("needs zarr")])
def test_an_error_of_the_plugin_that_knows_the_source_reaches_the_user(error: Exception) -> None:
    others = good("b", iql_read_dataset=lambda source: raising(AssertionError("asked"))())
    host = host_of(good("a", iql_read_dataset=lambda source: raising(error)()), others)
    with pytest.raises(type(error), match=str(error)):
        host.read_dataset("mine", Options())


def test_a_reader_that_fails_leaves_the_source_to_the_others() -> None:
    mine = Dataset(make_dataset(SPACES["continuous"], 4).cpu(), "mine")

    def read(source: object, options: Options) -> Dataset | None:
        return mine if source == "mine" else None

    failing = good("a", iql_read_dataset=lambda source: raising(KeyError("x"))())
    exiting = good("b", iql_read_dataset=lambda source: raising(SystemExit(3))())
    host = host_of(failing, exiting, good("c", iql_read_dataset=read))
    assert host.read_dataset("mine", Options()) is mine
    with pytest.raises(UnknownSourceError, match=r"'yours'.*plugin 'a' of .* failed.*KeyError.*'b'.*SystemExit: 3"):
        host.read_dataset("yours", Options())
    with pytest.raises(PluginError, match=r"plugin 'a' of .* failed in iql_read_dataset\(\): KeyError"):
        host_of(failing, strict=True).read_dataset("mine", Options())


def test_what_a_reader_returns_is_checked() -> None:
    tensors = make_dataset(SPACES["continuous"], 4).cpu()
    bare = host_of(good(iql_read_dataset=lambda source: tensors), strict=True)
    with pytest.raises(PluginError, match=r"must return a Dataset or None from iql_read_dataset\(\), got TensorDict"):
        bare.read_dataset("mine", Options())
    held = host_of(good(iql_read_dataset=lambda source: Dataset({"a": 1}, "mine")), strict=True)  # type: ignore[arg-type]
    with pytest.raises(
        PluginError, match=r"must return a Dataset or None from iql_read_dataset\(\), got Dataset of dict"
    ):
        held.read_dataset("mine", Options())
    host = host_of(good(iql_read_dataset=lambda source: Dataset(tensors, "mine")))
    with pytest.raises(DatasetError, match=r"mine must have discrete actions, plugin 'good' read torch.float32"):
        host.read_dataset("mine", Options(discrete=True))
    tensors["next", "reward"][2] = torch.nan
    assert host.read_dataset("mine", Options(discrete=False, finite=False)).tensors is tensors


def test_several_threads_may_read_first() -> None:
    tensors = make_dataset(SPACES["continuous"], 4).cpu()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(10):
                mine = Dataset(tensors, "mine")
                host = host_of(good(iql_read_dataset=lambda source, mine=mine: mine if source == "mine" else None))
                for source in (tensors, "mine"):
                    results = [threads.submit(host.read_dataset, source, Options()) for _ in range(4)]
                    assert all(len(result.result().tensors) == 4 for result in results)
                host = host_of(good())
                assert len({threads.submit(host.load, "good").result().name for _ in range(4)}) == 1
                loads = [threads.submit(host_of(good()).load, "good") for _ in range(4)]
                assert all(load.result().name == "good" for load in loads)
                assert host.available()["good"].error is None
    finally:
        sys.setswitchinterval(interval)


def test_a_source_that_looks_like_a_readers_says_why_it_is_not(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["observation_s"] = [1.0]
    with pytest.raises(UnknownSourceError, match=r"'observation_s' is not a column that is read; did you mean"):
        host_of(good()).read_dataset(tmp_path / "d.h5", Options())
    mine = Dataset(make_dataset(SPACES["continuous"], 4).cpu(), "mine")
    host = host_of(good(iql_read_dataset=lambda source: mine if isinstance(source, Path) else None))
    assert host.read_dataset(tmp_path / "d.h5", Options()) is mine


def test_the_error_says_which_plugin_it_takes(tmp_path: Path) -> None:
    (tmp_path / "d.feather").touch()
    for source, needed in (
        (tmp_path / "d.feather", "it takes a plugin for .feather"),
        (Namespace(), "it takes a plugin for argparse"),
        (torch.nn.Identity(), "it takes a plugin for torch"),
    ):
        with pytest.raises(UnknownSourceError, match=f"{needed}.*installed plugins are tensor"):
            Host(allow=["tensor"]).read_dataset(source, Options())


def test_a_plugin_is_imported_once() -> None:
    loads = []
    entry = Entry("good", lambda: loads.append(1) or plugin("good"))
    host = host_of(entry)
    assert host.load("good") is host.load("good")
    with pytest.raises(TypeError):
        host.map_batch(3)
    assert loads == [1]


def test_a_program_may_surround_what_takes_long() -> None:
    seen: list[tuple[str, str]] = []

    @contextmanager
    def loading(info: PluginInfo) -> Iterator[None]:
        seen.append(("before", info.value))
        try:
            yield
        finally:
            seen.append(("after", info.value))

    def imported() -> object:
        seen.append(("import", ""))
        return plugin("good", iql_adapter=described)

    def described() -> Adapter:
        seen.append(("iql_adapter", ""))
        return Adapter("good", None)

    host = host_of(Entry("good", imported), Entry("bad", raising(SystemExit(3))))
    host.loading = loading
    host.load("good")
    around = [("before", "good.plugin"), ("import", ""), ("after", "good.plugin")]
    assert seen == [*around, around[0], ("iql_adapter", ""), around[2]]
    seen.clear()
    host.load("good")
    with pytest.raises(PluginError):
        host.load("bad")
    assert seen == [("before", "bad.plugin"), ("after", "bad.plugin")]


def test_listing_imports_no_plugin() -> None:
    info = host_of(Entry("bad", raising(AssertionError()))).available()["bad"]
    assert (info.name, info.value, info.distribution, info.version, info.error) == (
        "bad",
        "bad.plugin",
        "iql-bad",
        "1.0",
        None,
    )


def test_metadata_are_read_no_more_often_if_there_are_more_plugins() -> None:
    def scans(count: int) -> int:
        found = []

        def find() -> list[Entry]:
            found.append([good(f"plugin{number}") for number in range(count)])
            return found[-1]

        assert len(Host(find=find).check()) == count
        return len(found)

    assert scans(5) == scans(1)


def test_batches_are_mapped_without_reading_metadata_again_and_by_what_is_installed_later() -> None:
    found, scans = [good(iql_map_batch=lambda batch: TensorDict() if batch == 1 else None)], []
    host = Host(find=lambda: scans.append(1) or found)
    host.map_batch(1)
    before = len(scans)
    host.map_batch(1)
    assert len(scans) == before
    with pytest.raises(TypeError, match="no adapter knows this batch"):
        host.map_batch(2)
    found.append(good("later", iql_map_batch=lambda batch: TensorDict() if batch == 2 else None))
    host.map_batch(2)


def test_the_installed_adapters_are_found_without_importing_one() -> None:
    code = (
        "import sys, iql_plugins.plugins as r; names = list(r.Host().available());"
        "assert 'tensor' in names, names;"
        "assert not any(m.startswith('iql_') and not m.startswith('iql_plugins') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_points_of_an_installed_package_load() -> None:
    host = Host(strict=True)
    assert isinstance(next(iter(host._find())), EntryPoint)
    assert host.load("tensor").name == "tensor"
    batch = {"observation": torch.zeros(5, 3), "next_reward": torch.ones(5, 1)}
    mapped = host.map_batch(batch)
    assert mapped.batch_size == (5,)
    assert mapped["next", "reward"].data_ptr() == batch["next_reward"].data_ptr()
    assert host.map_batch(mapped) is mapped
    with pytest.raises(TypeError, match="unexpected tensor 'reward'; did you mean 'next_reward'"):
        host.map_batch({"reward": torch.zeros(5, 1)})
    with pytest.raises(ValueError, match="must share their first dimension"):
        host.map_batch({"action": torch.zeros(5, 1), "observation": torch.zeros(4, 1)})
    with pytest.raises(TypeError, match="no adapter knows this batch, list"):
        host.map_batch([1, 2])


# Through the package

ADAPTERS = sorted(iql_plugins.available())
FRAMEWORKS = {"sb3": "stable_baselines3", "d3rlpy": "d3rlpy", "torchrl": "torchrl"}


def fresh(code: str) -> Any:
    """What a fresh interpreter prints as JSON in its last line."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def test_importing_makes_no_host_and_listing_imports_no_adapter() -> None:
    seconds, before, modules = fresh(
        "import json, sys, time, iql_plugins;"
        "before = 'pluggy' in sys.modules or 'iql_plugins.plugins' in sys.modules;"
        "start = time.perf_counter(); names = list(iql_plugins.available()); end = time.perf_counter();"
        "assert 'tensor' in names; print(json.dumps([end - start, before, sorted(sys.modules)]))"
    )
    assert not before
    tops = {module.split(".")[0] for module in modules}
    assert not tops & {*FRAMEWORKS.values(), "gymnasium", "matplotlib", "h5py", "torch", "tensordict", "numpy"}
    assert not {top for top in tops if top.startswith("iql_")} - {"iql_plugins"}
    # 0.06 s on an idle core.
    assert seconds < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_imports_no_other_and_no_other_framework(name: str) -> None:
    pytest.importorskip(FRAMEWORKS.get(name, "iql_tensor"))
    modules = fresh(
        f"import json, sys, iql_plugins; iql_plugins.load({name!r}); print(json.dumps(sorted(sys.modules)))"
    )
    tops = {module.split(".")[0] for module in modules}
    own = iql_plugins.available()[name].value.split(".")[0]
    assert own in tops
    assert not {top for top in tops if top.startswith("iql_")} - {"iql_plugins", own}
    assert not tops & (set(FRAMEWORKS.values()) - {FRAMEWORKS.get(name)})


def test_adapters_are_loaded_and_batches_mapped() -> None:
    assert iql_plugins.load("tensor").name == "tensor"
    batch = make_dataset(SPACES["continuous"], 4)
    assert iql_plugins.map_batch(batch) is batch
    with pytest.raises(TypeError, match="no adapter knows this batch, object"):
        iql_plugins.map_batch(object())


def test_a_dataset_is_looked_for_among_the_formats_first(monkeypatch: pytest.MonkeyPatch) -> None:
    never = good(iql_read_dataset=lambda source: raising(AssertionError(source))())
    monkeypatch.setattr(plugins, "host", lambda: host_of(never))
    assert len(iql_plugins.load_dataset("pendulum-v1-sac")) == 20_000


def test_a_dataset_of_an_adapter_is_loaded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = make_dataset(SPACES["continuous"], 4).cpu()
    unsound = sound.clone()
    unsound["next", "reward"][2] = torch.nan

    def read(source: object, options: Options) -> Dataset | None:
        tensors = {"sound": sound, "unsound": unsound}.get(str(source))
        return None if tensors is None else Dataset(tensors, str(source))

    monkeypatch.setattr(plugins, "host", lambda: host_of(good(iql_read_dataset=read)))
    assert iql_plugins.load_dataset("sound") is sound
    with pytest.raises(DatasetError, match=r"unsound: \('next', 'reward'\) is not finite in row 2"):
        iql_plugins.load_dataset("unsound")


def test_a_source_that_nobody_knows_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"did you mean 'pendulum-v1-sac'\?.*readers are built in for .*installed plugins are"
    ) as caught:
        iql_plugins.load_dataset("pendulum-v1-sacc")
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match="object is no dataset"):
        iql_plugins.load_dataset(object())


def test_a_type_error_of_an_adapter_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = good(iql_read_dataset=lambda source: raising(TypeError("a mistake of the adapter"))())
    monkeypatch.setattr(plugins, "host", lambda: host_of(entry))
    with pytest.raises(DatasetError, match="TypeError: a mistake of the adapter") as caught:
        iql_plugins.load_dataset(object())
    assert isinstance(caught.value.__cause__.__cause__, TypeError)
