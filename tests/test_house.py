"""The house rules: a file imports only from floors below its own, never in a circle, and more. Checkers see them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.house import (
    BESIDE,
    FLOOR_OF,
    FOREIGN_PATHS,
    MAX_FILE_LINES,
    MAX_MAIN_LINES,
    NAME,
    REPO,
    collective_violations,
    foreign_paths,
    import_cycle,
    import_violations,
    long_files,
    long_mains,
    model_library_violations,
    sources,
    units,
)  # fmt: skip


def test_every_file_imports_only_from_floors_below():
    assert import_violations(REPO) == []


def test_only_models_and_training_know_libraries_of_models():
    assert model_library_violations(REPO) == []


def test_every_package_folder_has_a_floor():
    assert units(REPO) - set(FLOOR_OF) == set()


def test_no_files_import_each_other_in_a_circle():
    assert import_cycle(REPO) == ""


def test_every_folder_of_python_files_is_a_package():
    folders = {path.parent for path, _ in sources(REPO)}
    assert [str(folder) for folder in sorted(folders) if not (REPO / folder / "__init__.py").exists()] == []


def test_collectives_are_called_in_comm_only():
    assert collective_violations(REPO) == []


def test_mains_are_short():
    assert long_mains(REPO) == []


def test_files_are_short():
    assert long_files(REPO) == []


def test_no_file_names_a_place_outside_the_repository():
    try:
        wrong = foreign_paths(REPO)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    assert wrong == []


# The checkers, on synthetic packages.


def house(root: Path, files: dict[str, str], folder: str = NAME) -> Path:
    for name, text in files.items():
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("file", "source", "line"),
    [
        ("core/a.py", "from d2o_dist.engine import run", 1),
        ("core/a.py", "import os\nimport d2o_dist.engine.loop as loop", 2),
        ("core/a.py", "def f():\n    from d2o_dist.cache.report import Report\n    return Report", 2),
        ("core/a.py", "from ..engine.loop import run", 1),
        ("core/a.py", "from .. import engine", 1),
        ("core/deep/a.py", "from ...engine import run", 1),
        ("core/__init__.py", "from ..engine import run", 1),
        ("core/a.py", "from d2o_dist import kernels", 1),
        ("core/a.py", "from d2o_dist import D2OCache", 1),
        ("engine/a.py", "import d2o_dist", 1),
        ("core/a.py", "import importlib\nrun = importlib.import_module('d2o_dist.engine')", 2),
        ("core/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from d2o_dist.cache import Rows", 3),
        ("eval/a.py", "from d2o_dist.train import fit", 1),
        ("train/a.py", "from d2o_dist.cli.infer import main", 1),
        ("attic/a.py", "from d2o_dist.core import merge", 1),
        ("core/a.py", "from d2o_dist.attic import merge", 1),
        ("config.py", "from d2o_dist.core import compress", 1),
    ],
)
def test_import_checker_finds(tmp_path, file, source, line):
    house(tmp_path, {file: source, "attic/__init__.py": ""})
    (found,) = import_violations(tmp_path)
    assert found.startswith(f"{NAME}/{file}:{line}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engine/a.py", "from d2o_dist.core import merge\nfrom ..cache.report import Report\nfrom .b import c"),
        ("core/deep/a.py", "from ..select import top\nfrom ...policy import D2O"),
        ("cli/a.py", "from d2o_dist import D2OCache\nimport d2o_dist.eval.fetch\nfrom d2o_dist.cli.b import c"),
        ("eval/a.py", "import d2o_dist\nfrom d2o_dist import engine"),
        ("__init__.py", "from d2o_dist.models.hf import D2OCache\nfrom .engine import run"),
        ("core/a.py", "import torch\nfrom engine import run\nfrom d2o_dist_extra.engine import run"),
    ],
)
def test_import_checker_allows(tmp_path, file, source):
    assert import_violations(house(tmp_path, {file: source})) == []


@pytest.mark.parametrize(
    ("file", "source", "line"),
    [
        ("engine/a.py", "import transformers", 1),
        ("cache/a.py", "import os\nfrom transformers.cache_utils import Cache", 2),
        ("cli/a.py", "def f():\n    from megatron.core import parallel_state", 2),
        ("train/a.py", "from megatron.core import parallel_state", 1),
        ("eval/a.py", "from d2o_dist.models.hf import D2OCache", 1),
        ("engine/a.py", "from d2o_dist.models import hf", 1),
        ("engine/a.py", "from ..models.hf.guards import text_config", 1),
        ("cli/a.py", "import d2o_dist.models.megatron.model", 1),
    ],
)
def test_library_checker_finds(tmp_path, file, source, line):
    (found,) = model_library_violations(house(tmp_path, {file: source}))
    assert found.startswith(f"{NAME}/{file}:{line}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/hf/a.py", "import transformers\nfrom d2o_dist.models.hf.b import c"),
        ("models/loading.py", "from d2o_dist.models.hf import loading"),
        ("train/a.py", "from transformers import Cache\nfrom d2o_dist.models.hf.packed import by_document"),
        ("engine/a.py", "from d2o_dist.models import loading\nfrom d2o_dist.models.base import ModelAdapter"),
        ("engine/a.py", "import transformers_of_ours"),
        ("__init__.py", "from d2o_dist.models.hf import D2OCache"),
    ],
)
def test_library_checker_allows(tmp_path, file, source):
    assert model_library_violations(house(tmp_path, {file: source})) == []


@pytest.mark.parametrize(
    ("folder", "file", "source", "line"),
    [
        (NAME, "core/a.py", "from benchmarks.timing import machine", 1),
        (NAME, "cli/a.py", "def f():\n    import launch.demo.model", 2),
        (NAME, "cli/a.py", "from ...benchmarks import timing", 1),
        (NAME, "__init__.py", "import benchmarks", 1),
        (NAME, "eval/a.py", "from tests.models import tiny_model", 1),
        ("benchmarks", "a.py", "from tests.models import tiny_model", 1),
        ("benchmarks", "checks/a.py", "from launch.demo import model", 1),
        ("launch", "demo/a.py", "import os\nfrom benchmarks.timing import machine", 2),
    ],
)
def test_import_checker_finds_what_stands_beside(tmp_path, folder, file, source, line):
    (found,) = import_violations(house(tmp_path, {file: source}, folder))
    assert found.startswith(f"{folder}/{file}:{line}: ")


def test_programs_beside_the_package_import_any_of_it_and_each_other(tmp_path):
    source = "from d2o_dist import D2OCache\nfrom d2o_dist.cli.voice import say\nfrom {0}.b import c\nfrom . import d"
    for folder in BESIDE:
        house(tmp_path, {"a.py": source.format(folder), "demo/b.py": "from ..a import c"}, folder)
    assert len(list(sources(tmp_path))) == 2 * len(BESIDE) and import_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"core/a.py": "from d2o_dist.core.b import f", "core/b.py": "from d2o_dist.core.a import g"}, "a b a"),
        ({"core/a.py": "from . import b", "core/b.py": "def f():\n    import d2o_dist.core.a"}, "a b a"),
        ({"core/a.py": "if TYPE_CHECKING:\n    from .b import B", "core/b.py": "from .a import A"}, "a b a"),
        ({"core/a.py": "from . import b", "core/b.py": "from .c import f", "core/c.py": "from .a import g"}, "a b c a"),
        ({"core/a.py": "from . import b", "core/b.py": "from .c import f", "core/c.py": "from .b import g"}, "b c b"),
        ({"core/__init__.py": "from d2o_dist.core.a import f", "core/a.py": "from d2o_dist.core import g"},
         "__init__ a __init__"),
        ({"core/a.py": "from .b import f", "core/b.py": "from .c import f", "core/c.py": "import torch"}, ""),
        ({"core/__init__.py": "from .a import f", "core/a.py": "from d2o_dist.core import b", "core/b.py": ""}, ""),
        ({"core/a.py": "from d2o_dist.core.a import f"}, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", [NAME, *BESIDE])
def test_circles_of_imports_are_found(tmp_path, files, circle, folder):
    house(tmp_path, {file: source.replace(NAME, folder) for file, source in files.items()}, folder)
    assert import_cycle(tmp_path) == " -> ".join(f"{folder}/core/{name}.py" for name in circle.split())


def test_an_unknown_folder_has_no_floor(tmp_path):
    assert units(house(tmp_path, {"attic/a.py": "", "core/a.py": ""})) - set(FLOOR_OF) == {"attic"}


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", 2),
        ("import torch\ntorch.distributed.all_gather_into_tensor(a, b)", 2),
        ("from torch import distributed\ndistributed.barrier()", 2),
        ("from torch import distributed as d\nsend = d.send", 2),
        ("from torch.distributed import batch_isend_irecv", 1),
        ("from torch.distributed import *", 1),
        ("import torch.distributed._functional_collectives as funcol\nfuncol.all_to_all_single(a)", 2),
        ("import torch.distributed.nn.functional as F\nF.reduce_scatter(a)", 2),
        ("import deepspeed.comm as dist\ndist.broadcast_object_list(a)", 2),
        ("import torch\ntorch.ops._c10d_functional.all_reduce(a)", 2),
    ],
)
def test_collective_checker_finds(tmp_path, source, line):
    (found,) = collective_violations(house(tmp_path, {"engine/a.py": source}))
    assert found.startswith(f"{NAME}/engine/a.py:{line}: ")
    assert collective_violations(house(tmp_path / "allowed", {"comm/a.py": source})) == []
    (found,) = collective_violations(house(tmp_path / "beside", {"comm/a.py": source}, "benchmarks"))
    assert found.startswith(f"benchmarks/comm/a.py:{line}: ")


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.init_process_group('gloo')\ndist.get_rank()",
        "from d2o_dist.comm import collectives\ncollectives.all_reduce(x)",
        "from functools import reduce\nconnection.send(1)\nx.scatter(0, i, y)\ntorch.gather(x, 0, i)",
        "import torch\ntorch.broadcast_to(x, (2, 2))",
    ],
)
def test_collective_checker_allows(tmp_path, source):
    assert collective_violations(house(tmp_path, {"engine/a.py": source})) == []


def test_long_main_is_found_and_the_limit_is_exact(tmp_path):
    body = "\n".join(f"    x = {i}" for i in range(MAX_MAIN_LINES - 1))
    assert long_mains(house(tmp_path, {"cli/a.py": f"def main():\n{body}\n"})) == []
    (found,) = long_mains(house(tmp_path, {"cli/a.py": f"def main():\n{body}\n    x = 0\n"}))
    assert found.startswith(f"{NAME}/cli/a.py:1: main() has {MAX_MAIN_LINES + 1} lines")
    beside = house(tmp_path / "beside", {"a.py": f"def main():\n{body}\n    x = 0\n"}, "benchmarks")
    assert len(long_mains(beside)) == 1


def test_foreign_path_is_found(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    house(tmp_path, {"core/a.py": f"x = 1\npath = '{FOREIGN_PATHS[0]}data'\n", "core/b.py": "path = 'data'\n"})
    assert foreign_paths(tmp_path) == [f"{NAME}/core/a.py:2: {FOREIGN_PATHS[0]}"]


def test_long_file_is_found_and_the_limit_is_exact(tmp_path):
    house(tmp_path, {"core/a.py": "x = 1\n" * MAX_FILE_LINES, "core/b.py": "x = 1\n" * (MAX_FILE_LINES + 1)})
    assert long_files(tmp_path) == [f"{NAME}/core/b.py: {MAX_FILE_LINES + 1}"]
