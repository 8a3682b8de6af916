"""Where a line of code lives and what it may import: the rules of the house, read off the source."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attnk"
KERNELS = ROOT / "kernels"
SHARED = {"__init__", "attention", "tiles", "tuning"}  # kernel files that are no operation

# a stem is a file, or a folder with forward.py and backward.py
STEMS = sorted(
    [path.stem for path in KERNELS.glob("*.py") if path.stem not in SHARED]
    + [path.parent.name for path in KERNELS.glob("*/forward.py")]
)
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
STANDARD = set(sys.stdlib_module_names)


def kernel_definitions(stem: str) -> list[ast.stmt]:
    """What the kernel file of a stem defines, or its folder's forward and then backward."""
    folder = KERNELS / stem
    paths = [folder / "forward.py", folder / "backward.py"] if folder.is_dir() else [KERNELS / f"{stem}.py"]
    return [node for path in paths for node in ast.parse(path.read_text()).body]


def name_of(path: pathlib.Path) -> str:
    """The module a source file is imported as."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("attnk", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Every module a file imports, in full, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # what is imported may itself be a module: "from attnk.kernels import spatial_gate"
            found += [(f"{module}.{alias.name}", id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found.append((ast.unparse(node.args[0]).strip("'\"f"), id(node) not in late))
    return found


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def offences(paths: list[pathlib.Path], *allowed: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in paths
        for module, _ in imports(path)
        if not within(module, *allowed) and not within(module, *STANDARD)
    ]


def files(folder: str) -> list[pathlib.Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def test_there_are_operations():
    assert "spatial_gate" in STEMS


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("place", ["attnk/ops/{}.py", "attnk/reference/{}.py", "tests/test_{}.py"])
def test_a_stem_names_one_operation_everywhere(stem, place):
    assert (ROOT / place.format(stem)).is_file()


@pytest.mark.parametrize("stem", STEMS)
def test_every_operation_has_its_benchmarks(stem):
    """Of the stem, or of the public functions that are called instead of it."""
    called = {"group_attention": ("axial_attention", "window_attention")}.get(stem, (stem,))
    for name in called:
        assert (ROOT / f"benchmarks/bench_{name}.py").is_file(), name


def test_no_operation_without_a_stem():
    for folder in ("ops", "reference", "fallback"):
        for path in files(folder):
            assert path.stem in STEMS or path.stem.startswith("_"), path


@pytest.mark.parametrize("stem", STEMS)
def test_public_names_of_a_stem(stem):
    import attnk

    assert stem in attnk.__all__
    launchers = {node.name for node in kernel_definitions(stem) if isinstance(node, ast.FunctionDef)}
    assert {f"{stem}_forward", f"{stem}_backward"} <= launchers
    for path, names in {
        PACKAGE / "reference" / f"{stem}.py": [f"{stem}_reference"],
        PACKAGE / "ops" / f"{stem}.py": [stem, "unsupported", "explain", "example"],
    }.items():
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert set(names) <= set(functions), path


@pytest.mark.parametrize("stem", STEMS)
def test_names_and_order_of_kernels(stem):
    functions = [node for node in kernel_definitions(stem) if isinstance(node, ast.FunctionDef)]
    kernels = [function.name for function in functions if function.name.endswith("_kernel")]
    assert kernels
    for name in kernels:
        assert re.fullmatch(rf"_{stem}_(fwd|bwd)(_\w+)?_kernel", name), name
    directions = [name.removeprefix(f"_{stem}_")[:3] for name in kernels]
    assert directions == sorted(directions, reverse=True), "forward kernels come before backward kernels"
    names = [function.name for function in functions]
    for direction in ("forward", "backward"):
        short = {"forward": "fwd", "backward": "bwd"}[direction]
        last = max(names.index(name) for name in kernels if name.startswith(f"_{stem}_{short}"))
        assert last < names.index(f"{stem}_{direction}")
    assert names.index(f"{stem}_forward") < names.index(f"{stem}_backward")


def test_kernels_import_little():
    own_shared = [f"attnk.kernels.{name}" for name in ("attention", "tiles", "tuning")]
    shared = ("torch", "triton", "attnk.groups", "attnk.memory", *own_shared)
    for path in sorted(KERNELS.rglob("*.py")):
        own = [name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]]
        own += ["attnk.kernels.spatial_gate"] if path.parent.name == "cbam" else []  # half of it is one
        assert not offences([path], *shared, *(own if path.parent != KERNELS else []))
    tuning = [module for module, _ in imports(KERNELS / "tuning.py")]
    assert not any(within(module, "triton") for module in tuning), "explain reads the tables without triton's compiler"


@pytest.mark.parametrize("folder", ["reference", "fallback"])
def test_plain_torch(folder):
    assert not offences(files(folder), "torch", "attnk.groups", "attnk.memory", f"attnk.{folder}")
    assert not offences([PACKAGE / "groups.py", PACKAGE / "memory.py"], "torch")


def test_operations_stand_on_their_floor():
    for path in files("ops"):
        own = [f"attnk.{folder}.{path.stem}" for folder in ("reference", "fallback", "kernels")]
        own += [f"attnk.{folder}" for folder in ("reference", "fallback")] if path.stem in STEMS else []
        private = ("_batch_norm", "_calls", "_checks", "_deferred", "_flops", "_vmap", "_watch")
        shared = [f"attnk.ops.{name}" for name in private]
        shared += ["attnk.ops.softmax_attention"] if path.stem == "group_attention" else []  # for long groups
        # its pool, and the options and checks of the two gates it is made of
        shared += ["attnk.ops.channel_gate", "attnk.ops.spatial_gate"] if path.stem == "cbam" else []
        shared += ["attnk.dispatch", "attnk.groups", "attnk.memory", "attnk.kernels.tuning", "torch"]
        assert not offences([path], *own, *shared)
        for module, early in imports(path):
            assert not (early and within(module, "attnk.kernels")), f"{path} imports {module} outside a function"


def test_only_operations_import_kernels():
    for path in SOURCES:
        if path.is_relative_to(KERNELS) or path.parent == PACKAGE / "ops":
            continue
        for module, _ in imports(path):
            assert not within(module, "attnk.kernels"), f"{path} imports {module}"


def test_upper_floors_use_operations():
    lower = ("attnk.reference", "attnk.fallback", "attnk.kernels")
    for folder in ("modules", "models", "rewrite", "inspect"):
        for path in files(folder):
            for module, _ in imports(path):
                assert not within(module, *lower), f"{path} imports {module}"


def test_no_arrow_runs_up():
    floors = [("attnk.ops", "attnk.dispatch"), ("attnk.modules",), ("attnk.models", "attnk.rewrite", "attnk.inspect")]
    for path in SOURCES:
        name = name_of(path)
        here = next((number for number, floor in enumerate(floors) if within(name, *floor)), None)
        if here is None:
            continue
        above = [package for floor in floors[here + 1 :] for package in floor]
        for module, _ in imports(path):
            assert not within(module, *above), f"{path} imports {module}"


def test_triton_is_imported_late():
    for path in SOURCES:
        if path.is_relative_to(KERNELS):
            continue
        for module, early in imports(path):
            assert not (early and within(module, "triton")), f"{path} imports {module} outside a function"


@pytest.mark.parametrize(
    ("path", "limit"),
    [("attnk/__init__.py", 40), ("attnk/dispatch.py", 180)]
    + [(str(path.relative_to(ROOT)), 800) for path in sorted(KERNELS.rglob("*.py"))]
    + [(f"attnk/reference/{stem}.py", 80) for stem in STEMS],
)
def test_files_stay_short(path, limit):
    assert len((ROOT / path).read_text().splitlines()) < limit


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_banned(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = {ast.unparse(name) for name in ast.walk(node.type)} if node.type else {"everything"}
            assert not caught & {"everything", "Exception", "BaseException"}, f"{path}:{node.lineno} catches too much"
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in ("autotune", "make_block_ptr"), f"{path}:{node.lineno} uses {name}"


def test_every_package_is_shipped():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert {name_of(path).rpartition(".")[0] for path in SOURCES if path.name != "__init__.py"} <= folders
    assert set(settings["packages"]) == folders
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file(), package
    assert (PACKAGE / "py.typed").is_file()


def test_the_bare_name_kernels_explains_itself():
    code = "import kernels"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the folder 'kernels' of attnk was imported as 'kernels'")
    assert "import 'attnk.kernels'" in last


def test_versions_agree():
    import attnk

    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared.group(1) == attnk.__version__


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .tiles import a", [("attnk.kernels.tiles.a", True)]),
        ("from . import tiles", [("attnk.kernels.tiles", True)]),
        ("from .. import dispatch", [("attnk.dispatch", True)]),
        ("import triton.language as tl", [("triton.language", True)]),
        ("def f():\n    from attnk.kernels import b", [("attnk.kernels.b", False)]),
        ("importlib.import_module('attnk.kernels.b')", [("attnk.kernels.b", True)]),
    ],
)
def test_imports_are_seen(source, expected, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *args, **kwargs: source)
    assert imports(KERNELS / "some.py") == expected
