"""Private names of dependencies: in one place, and none whose loss breaks a training."""

import ast
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from conftest import keywords, make_batch, make_loss
from requirements import needs_compiler, needs_onednn
from tensordict.nn import TensorDictModule
from torch import nn

import iql_plugins
from iql_plugins import _compat
from iql_plugins.training import products
from iql_plugins.training.gradients import LossGradients
from iql_plugins.training.learner import Learner
from iql_plugins.training.multi_seed import fit_together

PACKAGE = Path(iql_plugins.__file__).parent


def private_names(path: Path) -> Iterator[str]:
    """What a module takes by a private name from the packages that it builds on."""
    modules = {"torch", "tensordict", "torchrl", "d3rlpy", "stable_baselines3", "gymnasium", "numpy"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in modules:
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (f"{path.name}: {part}" for part in parts if part.startswith("_") and part != "__version__")
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value).partition(".")[0]
            if owner in modules | {"Tensor", "TensorDictModule"}:
                yield f"{path.name}: {ast.unparse(node)}"


def test_private_names_of_dependencies_are_in_one_module() -> None:
    paths = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "adapters").rglob("*.py")]
    found = [name for path in paths if path.name != "_compat.py" for name in private_names(path)]
    assert found == []
    assert any("_foreach_lerp_" in name for name in private_names(PACKAGE / "_compat.py"))


PRIVATE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tensordict's _call_module": lambda patch: patch.setattr(_compat, "passes_tensors_on", lambda network: False),
    "torch._foreach_lerp_": lambda patch: patch.delattr(torch, "_foreach_lerp_"),
    "torch._assert_async": lambda patch: patch.delattr(torch, "_assert_async"),
    "torch._C._functorch": lambda patch: patch.setattr(_compat, "_functorch", lambda name: None),
}


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("name", PRIVATE)
def test_a_training_is_the_same_without_it(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Learner(make_loss(kind), seed=0) for _ in range(2))
    second.loss.load_state_dict(copy.deepcopy(first.loss.state_dict()))
    batch = keywords(make_batch(kind))
    for _ in range(3):
        first.step(batch)
    PRIVATE[name](monkeypatch)
    for _ in range(3):
        second.step(batch)
    expected = first.loss.state_dict()
    for key, tensor in second.loss.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["torch._assert_async", "torch._C._functorch", "torch._foreach_lerp_"])
def test_agents_with_discrete_actions_train_together_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graph is traced over stacked parameters, with the checks of the actions in it."""
    PRIVATE[name](monkeypatch)
    dataset = make_dataset(SPACES["discrete"])
    agents = [make_agent("discrete") for _ in range(2)]
    alone = make_agent("discrete")
    fit_together(agents, dataset, 3)
    alone.fit(dataset, 3)
    for key, tensor in alone.loss.state_dict().items():
        torch.testing.assert_close(agents[0].loss.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_tensors_are_copied_one_by_one_without_the_kernel_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_foreach_copy_")
    targets, sources = [torch.zeros(2), torch.zeros(())], [torch.ones(2), torch.tensor(3.0)]
    _compat.copy_all(targets, sources)
    assert torch.equal(targets[0], sources[0])
    assert torch.equal(targets[1], sources[1])


def test_a_module_that_cannot_be_looked_into_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    network = TensorDictModule(nn.Linear(2, 1), in_keys=["a"], out_keys=["b"])
    assert _compat.passes_tensors_on(network)
    monkeypatch.delattr(type(network), "_call_module")
    assert not _compat.passes_tensors_on(network)


@needs_compiler
@pytest.mark.parametrize("missing", [[], ["standalone_compile"], ["standalone_compile", "compile"]])
def test_a_graph_is_compiled_without_the_compilers_that_check_nothing(
    missing: list[str], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    weight = torch.randn(1, 2, device=device)
    graph = torch.fx.symbolic_trace(lambda x: [nn.functional.linear(x, weight)])
    for name in missing:
        monkeypatch.delattr(torch._inductor, name)
    given = torch.ones(3, 2, device=device)
    torch.testing.assert_close(_compat.compile_graph(graph, [given], {})(given), graph(given))


def test_steps_are_called_from_python_without_inductors_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module("torch._inductor.ir"), "ExternKernelOut")
    assert not _compat.lower_to_cpp(products.PRODUCT, "a_function", "")


@needs_compiler
@pytest.mark.slow
def test_what_was_compiled_once_comes_from_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters, batch = torch._dynamo.utils.counters, keywords(make_batch("continuous"))
    loss = make_loss("continuous").cpu()
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    outputs = []
    for known in (False, True):
        counters.clear()
        outputs.append(LossGradients(loss, compile=True)(batch))
        # Inductor's graphs are found by themselves or, where AOTAutograd keeps its own, with those.
        found = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert (found > 0, counters["inductor"]["fxgraph_cache_miss"]) == (known, 0 if known else 1)
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


@needs_onednn
@pytest.mark.parametrize(
    ("name", "vectors", "faster"),
    [("AMD EPYC", "AVX512", True), ("AMD EPYC", "AVX2", False), ("Intel", "AVX512", False)],
)
def test_onednn_is_faster_where_mkl_leaves_avx_512_unused(
    name: str, vectors: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    assert _compat.onednn_is_faster() is faster
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not _compat.onednn_is_faster()


@pytest.mark.parametrize("asked", [None, False])
def test_probes_of_the_compiler_are_left_out_unless_a_user_has_decided(
    asked: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with torch._inductor.config.patch({"cpp.vec_isa_ok": asked}):
        assert _compat._without_probes() == ({"cpp.vec_isa_ok": True} if asked is None else {})


def test_compilers_are_looked_for_without_inductors_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "g++" in _compat.host_compilers()
    monkeypatch.setattr(torch._inductor, "config", object())
    assert _compat.host_compilers() == ("g++", "clang++")


def test_writes_are_counted() -> None:
    tensor = torch.zeros(())
    before = _compat.writes(tensor)
    assert before is not None
    assert before == _compat.writes(tensor)
    assert before != _compat.writes(tensor.fill_(1.0))


def test_an_assertion_without_torchs_own_still_fails(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.delattr(torch, "_assert_async")
    _compat.assert_on_device(torch.tensor(True, device=device), "fine")
    with pytest.raises(RuntimeError, match="an action of 7"):
        _compat.assert_on_device(torch.tensor(False, device=device), "an action of 7")
