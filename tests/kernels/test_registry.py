"""The registry: order, limits, imports, what is said; and what every op of the package must keep to."""

from __future__ import annotations

import ast
import logging
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2o_dist import kernels
from d2o_dist.kernels import backend, launch, registry
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.registry import OPS, Call, Implementation, Op, Torch, Triton
from tests.house import imported

FOLDER = Path(kernels.__file__).parent


def first(*args):
    return "first"


def second(*args):
    return "second"


def last(*args):
    return "last"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Ops that are made here are gone afterwards; a new GPU; Triton is installed."""
    monkeypatch.setattr(registry, "OPS", {})
    monkeypatch.setattr(launch, "_capability_of_gpu", lambda device: 90)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    registry._say.cache_clear()


X = torch.zeros(2, 8)
ON_CUDA = Call(torch.device("cuda"), torch.bfloat16, 64)


def test_the_first_that_serves_is_taken():
    op = Op("op", Torch(first, dtypes=(torch.float64,)), Torch(second), Torch(last))
    assert op.pick(X)() == "second" and op.pick(X.double())() == "first" and op.pick(X)() == "second"


@pytest.mark.parametrize(
    ("limit", "served", "refused", "why"),
    [
        (dict(devices=("cpu",)), {}, dict(device=torch.device("meta")), "device meta"),
        (dict(dtypes=(torch.float32,)), {}, dict(dtype=torch.float16), "torch.float16"),
        (dict(head_dims=range(8, 257, 8)), dict(head_dim=256), dict(head_dim=60), "head dim 60"),
        (dict(gradient=False), {}, dict(gradient=True), "gradient"),
        (dict(empty=False), {}, dict(empty=True), "no elements"),
        (dict(needs={"bias"}), dict(traits=frozenset({"bias", "x"})), dict(traits=frozenset({"x"})), "no bias"),
        (dict(without={"bias"}), dict(traits=frozenset({"x"})), dict(traits=frozenset({"bias"})), "bias"),
    ],
)
def test_each_limit_is_kept(limit, served, refused, why):
    call = Call(torch.device("cpu"), torch.float32, 8)
    one = Implementation(first, **limit)
    assert one.declines(call._replace(**served)) == "" and one.declines(call._replace(**refused)) == why
    unlimited = Implementation(first)
    assert unlimited.declines(call._replace(**served)) == unlimited.declines(call._replace(**refused)) == ""


def test_limits_of_the_machine():
    call = torch.device("cuda")
    assert Implementation(first, capabilities=range(80, 90)).lacks(call) == (
        "the GPU has compute capability 9.0, and kernels need 8.0"
    )
    assert Implementation(first, capabilities=range(80, 1000), missing=lambda: "no x").lacks(call) == "no x"
    assert Implementation(first, capabilities=range(80, 1000)).lacks(call) == ""


@pytest.mark.parametrize(("name", "order"), [("auto", "PTBK"), ("torch", "PB"), ("triton", "TPB")])
def test_the_backend_says_which_kinds_and_which_first(monkeypatch, name, order):
    kinds = {"P": "torch", "T": "triton", "B": "torch", "K": "package"}
    one = [Implementation(first, name=name, kind=kind) for name, kind in kinds.items()]
    monkeypatch.setattr(backend, "_chosen", name)
    assert "".join(str(one) for one, _, _ in Op("op", *one).considered(ON_CUDA)) == order


def test_a_changed_backend_changes_the_choice_at_once(monkeypatch):
    op = Op("op", Torch(first, kind="package"), Torch(last))
    assert op.pick(X)() == "first"
    monkeypatch.setattr(backend, "_chosen", "torch")
    assert op.pick(X)() == "last"


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_interpreted_kernels_serve_any_device_where_they_are_asked_for(monkeypatch, interpreted):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    op = Op("op", Triton(first), Torch(last))
    assert op.pick(X)() == "last"
    monkeypatch.setattr(backend, "_chosen", "triton")
    assert op.pick(X)() == ("first" if interpreted == "1" else "last")


def test_gradients_count_only_where_they_are_recorded():
    op, x = Op("op", Torch(first, gradient=False), Torch(last)), X.clone().requires_grad_()
    assert op.pick(X, x)() == "last"
    with torch.no_grad():
        assert op.pick(X, x)() == "first"


def test_a_choice_is_said_once_for_each_op_and_implementation(caplog):
    caplog.set_level(logging.INFO, registry.__name__)
    for name in ("one", "two"):
        op = Op(name, Torch(first, dtypes=(torch.float32,)), Torch(last))
        for x in (X, X[:1], X.double(), X.half()):
            op.pick(x)
            op.pick(x)
    served = "cpu tensors are served by"
    assert [record.getMessage() for record in caplog.records] == [
        f"one: {served} first", f"one: {served} last", f"two: {served} first", f"two: {served} last",
    ]  # fmt: skip


def test_the_last_dim_makes_no_other_call_where_it_limits_nothing():
    op, limited = Op("op", Torch(last)), Op("limited", Torch(first, head_dims=range(5)), Torch(last))
    for size in range(3, 9):
        for one in (op, limited):
            one.pick(torch.zeros(1, size))
    assert len(op._picked) == 1 and len(limited._picked) == 6


def test_what_is_preferred_is_taken_from_then_on(monkeypatch):
    monkeypatch.setitem(registry.OPS, "column_sums", mine := OPS["column_sums"])
    before, (q, k, lse) = mine.implementations, (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3))
    assert column_sums(q, k, lse, 1.0).shape == (1, 2, 3)
    try:
        mine.prefer(Torch(lambda q, *args, **options: "mine", devices=("cpu",), without={"x"}))
        assert column_sums(q, k, lse, 1.0) == "mine"
    finally:
        mine.__init__(mine.name, *before)
    assert column_sums(q, k, lse, 1.0).shape == (1, 2, 3)


def test_a_file_is_imported_when_it_is_first_taken(monkeypatch, tmp_path):
    (tmp_path / "lazy_kernels.py").write_text("def kernel():\n    return 'imported'\n")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    name = f"{kernels.__name__}.lazy_kernels"
    op = Op("op", Torch("lazy_kernels:kernel", head_dims=range(9)), Torch(last))
    assert str(op.implementations[0]) == "kernel"
    assert op.pick(torch.zeros(2, 9))() == "last" and name not in sys.modules
    try:
        assert op.pick(X)() == "imported" and name in sys.modules
    finally:
        sys.modules.pop(name, None)


def test_no_file_of_triton_kernels_is_imported_by_the_ops_nor_for_cpu_tensors():
    code = """
import importlib, pkgutil, sys
import torch
from d2o_dist import kernels
for module in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"{kernels.__name__}.{module.name}")
from d2o_dist.kernels.registry import OPS
for op in OPS.values():
    op.pick(torch.zeros(1, 2, 3, 8))
print(len(OPS), [name for name in sys.modules if name.startswith("d2o_dist.") and name.endswith(".triton")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [str(len(OPS)), "[]\n"]


# All ops of the package.


def test_every_folder_has_an_op():
    folders = {module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg}
    assert folders <= set(OPS) and len(OPS) == len(folders) + 4  # some have two ops


@pytest.mark.parametrize("name", OPS)
def test_the_last_implementation_serves_everything(name):
    *_, one = OPS[name].implementations
    assert one == replace(Torch(one.function))


@pytest.mark.parametrize("name", OPS)
def test_functions_that_are_named_exist(name):
    """Read from the source: Triton need not be installed."""
    for one in OPS[name].implementations:
        if isinstance(one.function, str):
            file, _, function = one.function.partition(":")
            tree = ast.parse((FOLDER / file.replace(".", "/")).with_suffix(".py").read_text())
            assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_kernels_know_no_policy():
    """What repeats a rule of a policy would have to say which policies it serves."""
    wrong = [
        f"{path}:{line}"
        for path in FOLDER.rglob("*.py")
        for line, name in imported(path.relative_to(FOLDER.parents[1]), ast.parse(path.read_text()))
        if name.startswith("d2o_dist.policy")
    ]
    assert wrong == [] and len(list(FOLDER.rglob("*.py"))) > 30
