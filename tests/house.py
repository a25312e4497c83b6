"""The checkers of the house rules, which read the source.

They take a root folder, so that tests can show each of them broken code.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NAME = "d2o_dist"
BESIDE = ("benchmarks", "launch")  # folders of programs: they import the package, and it does not import them
PACKAGE_ROOT = "<package root>"  # names of d2o_dist/__init__.py: the public face, for those who use the library
FLOORS: tuple[tuple[str, ...], ...] = (  # lowest first; neighbours on one floor do not import each other
    ("fields", "files"),
    ("slots",),
    ("policy",),
    ("config",),
    ("core",),
    ("kernels",),
    ("comm",),
    ("attention",),
    ("statistics",),
    ("layout",),
    ("evict",),
    ("cache",),
    ("models",),
    ("plan",),
    ("engine",),
    (PACKAGE_ROOT,),
    ("eval",),
    ("train",),
    ("cli",),
)
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
COLLECTIVE = re.compile(
    r"(all_reduce|all_gather|all_to_all|reduce_scatter|broadcast|send_object|recv_object|gather_object|scatter_object)"
    r"\w*|(monitored_)?barrier|batch_isend_irecv|i?send|i?recv|gather|scatter|reduce|\*"
)
COLLECTIVE_HOMES = ("torch.distributed", "torch.ops._c10d_functional", "torch.ops.c10d", "deepspeed.comm")
# Libraries of models, and who may know them: what is above `models` calls it, what is below knows no model.
MODEL_LIBRARIES = {"transformers": ("models", "plan", "train"), "megatron": ("models",)}
MAX_MAIN_LINES = 79
FOREIGN_PATHS = ("/" + "work/", ".." + "/shared", "(shared" + "/")  # in two parts, or this file would name itself


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of the package and beside it, by its path relative to `root`, with its syntax tree."""
    for path in sorted(path for folder in (NAME, *BESIDE) for path in (root / folder).rglob("*.py")):
        yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def unit_of(path: Path) -> str:
    """`d2o_dist/core/merge.py` -> "core"; `d2o_dist/config.py` -> "config"; `d2o_dist/__init__.py` -> the root."""
    first = path.parts[1].removesuffix(".py")
    return PACKAGE_ROOT if first == "__init__" else first


def units(root: Path) -> set[str]:
    """Package folders (those that hold Python files) and top-level modules."""
    return {unit_of(path.relative_to(root)) for path in (root / NAME).rglob("*.py")}


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything a file imports, wherever in the file; relative names made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            here = path.parent.parts
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def import_violations(root: Path) -> list[str]:
    """`file:line: why`, for each import of a floor that is not below the importer's own, or of a folder beside it."""
    known, wrong = units(root) | set(FLOOR_OF), []
    for path, tree in sources(root):
        home, importer = path.parts[0], unit_of(path)
        for line, name in imported(path, tree):
            top, _, rest = name.partition(".")
            if top != home and top in (*BESIDE, "tests"):
                wrong.append(f"{path}:{line}: {home} imports {name}, which is not part of it")
            if home != NAME or importer == PACKAGE_ROOT or top != NAME:
                continue
            target = rest.split(".")[0] if rest.split(".")[0] in known else PACKAGE_ROOT
            if importer not in FLOOR_OF or target not in FLOOR_OF:
                wrong.append(f"{path}:{line}: no floor is known for {importer if importer not in FLOOR_OF else target}")
            elif target != importer and FLOOR_OF[target] >= FLOOR_OF[importer]:
                why = "above" if FLOOR_OF[target] > FLOOR_OF[importer] else "beside"
                wrong.append(f"{path}:{line}: {importer} imports {name}, and {target} is {why} it")
    return wrong


def model_library_violations(root: Path) -> list[str]:
    """`file:line: why`, for each import of a library of models, or of what knows one, by others than those who may."""
    wrong = []
    for path, tree in sources(root):
        unit = unit_of(path)
        if path.parts[0] != NAME or unit == PACKAGE_ROOT:
            continue
        for line, name in imported(path, tree):
            library = next((each for each in MODEL_LIBRARIES if f"{name}.".startswith(f"{each}.")), None)
            knows = name.split(".")[:2] == [NAME, "models"] and name.split(".")[2:3] in (["hf"], ["megatron"])
            if unit not in (MODEL_LIBRARIES[library] if library else ("models", "plan", "train") if knows else (unit,)):
                wrong.append(f"{path}:{line}: {unit} imports {name}: only `models` knows libraries of models")
    return wrong


def import_cycle(root: Path) -> str:
    """Files that import each other in a circle, `a -> b -> a`; "" if none do. Imports inside functions count."""
    graph = {path: set(imported(path, tree)) for path, tree in sources(root)}
    named = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in graph}
    for path, found in graph.items():
        targets = set()
        for _, name in found:
            while name and name not in named:  # what is imported from a file, or the file itself
                name = name.rpartition(".")[0]
            targets |= {named[name]} - {path} if name else set()
        graph[path] = targets
    while leaves := {path for path, targets in graph.items() if not targets}:
        graph = {path: targets - leaves for path, targets in graph.items() if path not in leaves}
    if not graph:
        return ""
    walk = [min(graph)]  # each that is left imports another that is left
    while walk[-1] not in walk[:-1]:
        walk.append(min(graph[walk[-1]]))
    return " -> ".join(map(str, walk[walk.index(walk[-1]) :]))


def collective_violations(root: Path) -> list[str]:
    """`file:line: name`, for each collective of torch.distributed (or a wrapper) named outside d2o_dist/comm."""
    wrong = []
    for path, tree in sources(root):
        if path.parts[:2] == (NAME, "comm"):
            continue
        bound = _bound_names(tree)
        found = {(line, name) for line, name in imported(path, tree) if _is_collective(name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name = _dotted(node)
                head, _, rest = name.partition(".")
                name = f"{bound[head]}.{rest}" if head in bound else name
                if _is_collective(name):
                    found.add((node.lineno, name))
        wrong += [f"{path}:{line}: {name} outside {NAME}/comm" for line, name in sorted(found)]
    return wrong


def _is_collective(name: str) -> bool:
    home, _, last = name.rpartition(".")
    inside = any(home == prefix or home.startswith(prefix + ".") for prefix in COLLECTIVE_HOMES)
    return inside and COLLECTIVE.fullmatch(last) is not None


def _bound_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, from absolute imports: `import torch.distributed as dist` binds dist."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return bound


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; what is not a plain name gives "?"."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def long_mains(root: Path) -> list[str]:
    """`file:line: length`, for each main() of a program of more than MAX_MAIN_LINES lines."""
    return [
        f"{path}:{node.lineno}: main() has {length} lines, at most {MAX_MAIN_LINES}"
        for path, tree in sources(root)
        if path.parts[0] in BESIDE or unit_of(path) == "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "main"
        if (length := node.end_lineno - node.lineno + 1) > MAX_MAIN_LINES
    ]


def foreign_paths(root: Path) -> list[str]:
    """`file:line: text`, for each path of one machine in a file that git tracks or would add."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wrong = []
    for name in sorted(set(filter(None, listed.split("\0")))):
        if (root / name).is_file():
            for number, line in enumerate((root / name).read_bytes().splitlines(), 1):
                wrong += [f"{name}:{number}: {text}" for text in FOREIGN_PATHS if text.encode() in line]
    return wrong


# The rules, on the real package.


MAX_FILE_LINES = 400


def long_files(root: Path) -> list[str]:
    """`file: lines`, for each file of the package and beside it that is too long to know one thing."""
    counts = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path, _ in sources(root)}
    return [f"{path}: {count}" for path, count in counts.items() if count > MAX_FILE_LINES]
