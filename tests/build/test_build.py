"""Builds and installs dpcomm into fresh environments, in the ways that docs/installing.md names.

One copy of the tree serves all of them, so that objects are compiled once (the builds with torch
come first: a build without drops them). The environments are real ones; their torch and tools are
links to those of the environment that runs the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_WHEEL_BYTES = 3_000_000
HERE = Path(sysconfig.get_path("platlib"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (HERE / "torch").is_dir(), reason="needs torch in this environment"),
]


class Environment:
    """A virtual environment of the running Python, with links to packages of the running one."""

    def __init__(self, folder: Path, packages: Sequence[str] | None) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        self.site_packages = next((folder / "lib").glob("python3*/site-packages"))
        for entry in HERE.iterdir():
            name = entry.name
            own = (
                name.startswith(("dpcomm", "__editable__", "__pycache__")) or entry.suffix == ".pth"
            )
            wanted = packages is None or re.split(r"[-.]", name)[0] in packages
            if wanted and not own:
                (self.site_packages / name).symlink_to(entry)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("DPCOMM_", "PYTHON"))}
        keep["DPCOMM_CUDA"] = "off"  # nvcc takes minutes; test_cuda_part asks for it
        return subprocess.run(
            command,
            cwd=self.site_packages,
            env=keep | variables,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )

    def pip(self, *arguments: str, **variables: str) -> str:
        done = self.try_pip(*arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def try_pip(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        return self.run(*pip, *arguments, **variables)

    def python_says(self, program: str) -> str:
        """What a program prints; it must end well, which an abort of the interpreter is not."""
        done = self.run(
            str(self.python), "-P" if sys.version_info >= (3, 11) else "-s", "-c", program
        )
        assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything built."""
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "_build_record.py"
    )
    folder = tmp_path_factory.mktemp("sources") / "dpcomm"
    shutil.copytree(ROOT, folder, ignore=lambda at, names: ignore(at, names) - keep(at))
    return folder


def keep(folder: str) -> set[str]:
    """tests/build is a folder of ours that only looks like something built."""
    return {"build"} if Path(folder).name == "tests" else set()


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("with_torch"), packages=None)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("without_torch"), ["numpy"])


def build_wheel(environment: Environment, tree: Path, target: Path, **variables: str) -> Path:
    """Builds under pip's isolation."""
    environment.pip("wheel", "--no-deps", "-w", str(target), str(tree), **variables)
    [wheel] = target.glob("dpcomm-*.whl")
    return wheel


def members(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def has_module(wheel: Path, name: str) -> bool:
    return any(re.fullmatch(rf"dpcomm/{name}\.[^/]*\.so", member) for member in members(wheel))


@pytest.fixture(scope="module")
def torch_wheel(
    tree: Path, with_torch: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build_wheel(with_torch, tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(torch_wheel: Path, with_torch: Environment) -> Environment:
    with_torch.pip("install", "--no-deps", "--no-index", str(torch_wheel))
    return with_torch


def test_isolated_build_finds_the_torch_of_the_environment(torch_wheel: Path) -> None:
    assert re.search(r"-0torch2\.\d+-", torch_wheel.name), torch_wheel.name
    assert has_module(torch_wheel, "_torch")


def test_wheel_is_small_and_complete(torch_wheel: Path) -> None:
    assert torch_wheel.stat().st_size < MAX_WHEEL_BYTES
    names = members(torch_wheel)
    assert has_module(torch_wheel, "_core")
    for name in ["dpcomm/py.typed", "dpcomm/_core.pyi", "dpcomm/_build_record.py"]:
        assert name in names
    foreign = [n for n in names if not n.startswith(("dpcomm/", "dpcomm-"))]
    assert foreign == []
    assert not [n for n in names if n.endswith((".cc", ".h", ".in"))]
    [entry_points] = [n for n in names if n.endswith("entry_points.txt")]
    text = zipfile.ZipFile(torch_wheel).read(entry_points).decode()
    assert "[torch.backends]\ndpcomm = dpcomm._autoload:register" in text
    assert [n for n in names if n.endswith("licenses/LICENSE")]


def test_modules_show_only_their_init_function(installed: Environment) -> None:
    for library in (installed.site_packages / "dpcomm").glob("*.so"):
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()[2::3]
        assert symbols == [f"PyInit_{library.name.split('.')[0]}"]
        assert b"/torch/lib" not in library.read_bytes(), "a path of the build machine"


def test_kernels_share_no_inline_code(tree: Path, torch_wheel: Path) -> None:
    """An inline function compiled for AVX-512 must not be the copy that all others are linked to."""
    objects = list(tree.glob("build/cmake-*/**/kernels_avx*.o"))
    assert len(objects) == 2 or os.uname().machine != "x86_64"
    for path in objects:
        done = subprocess.run(["nm", "-C", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"(?m)^\S+ [WVu] .*$", done.stdout) == []


def test_import_of_torch_alone_makes_the_name_known(installed: Environment) -> None:
    said = installed.python_says(
        """
import os
import torch
import torch.distributed as dist
assert dist.Backend("dpcomm") == "dpcomm"
assert "dpcomm" in dist.Backend.backend_list
maps = open("/proc/self/maps").read()
print("libraries:", sorted({l.split("/")[-1] for l in maps.splitlines() if "/dpcomm/" in l}))
"""
    )
    assert said == "libraries: []\n"


def test_backend_runs(installed: Environment, tmp_path: Path) -> None:
    said = installed.python_says(
        f"""
import torch
import torch.distributed as dist
store = dist.FileStore({str(tmp_path / "store")!r}, 1)
dist.init_process_group("dpcomm", store=store, rank=0, world_size=1)
x = torch.arange(10.0)
dist.all_reduce(x)
assert torch.equal(x, torch.arange(10.0))
dist.destroy_process_group()
print("ran")
"""
    )
    assert said == "ran\n"


@pytest.mark.parametrize("built", ["2.9.1", "2.99.0", None])
def test_wrong_torch_is_an_error_not_an_abort(
    installed: Environment, built: str | None, tmp_path: Path
) -> None:
    said = installed.python_says(
        f"""
import torch
import torch.distributed as dist
import dpcomm._build_record
dpcomm._build_record.TORCH = {built!r}
store = dist.FileStore({str(tmp_path / "store")!r}, 1)
try:
    dist.init_process_group("dpcomm", store=store, rank=0, world_size=1)
except ImportError as error:
    print(error)
"""
    )
    assert "rebuild with" in said
    assert ("built without torch" if built is None else f"built for torch {built[:-2]},") in said


def test_path_to_torch(
    tree: Path, without_torch: Environment, with_torch: Environment, tmp_path: Path
) -> None:
    wheel = build_wheel(without_torch, tree, tmp_path, DPCOMM_TORCH=str(with_torch.site_packages))
    assert re.search(r"-0torch2\.\d+-", wheel.name), wheel.name
    assert has_module(wheel, "_torch")


def test_editable_install(tree: Path, with_torch: Environment) -> None:
    """Editable and without isolation; Python files are live, C++ files after running it again."""
    install = ["install", "--no-deps", "--no-build-isolation", "--editable", str(tree)]
    with_torch.pip(*install)
    where = "import dpcomm, dpcomm._core as core; print(dpcomm.__file__, core.__doc__)"
    said = with_torch.python_says(where)
    assert said.split()[0] == str(tree / "dpcomm/__init__.py")
    with_torch.python_says("import dpcomm.backend; dpcomm.backend.binding()")

    module = tree / "csrc/bind/core_module.cc"
    text = module.read_text()
    assert 'module.doc() = "' in text
    module.write_text(text.replace('module.doc() = "', 'module.doc() = "CHANGED '))
    (tree / "dpcomm/_only_here.py").write_text("VALUE = 7\n")
    assert with_torch.python_says("import dpcomm._only_here as m; print(m.VALUE)") == "7\n"
    with_torch.pip(*install)
    assert " CHANGED " in with_torch.python_says(where)


@pytest.fixture(scope="module")
def free_wheel(
    tree: Path,
    torch_wheel: Path,  # the same tree was built with torch before: nothing of that may be packed
    without_torch: Environment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    for folder in tree.glob("build/lib*/dpcomm"):
        (folder / "_gone.py").write_text("a module of an older version\n")
    wheel = build_wheel(without_torch, tree, tmp_path_factory.mktemp("free"))
    assert "dpcomm/_gone.py" not in members(wheel)
    return wheel


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_part(tree: Path, without_torch: Environment, tmp_path: Path) -> None:
    """The last build of this tree: for one architecture, without the torch binding."""
    wheel = build_wheel(
        without_torch, tree, tmp_path / "wheel", DPCOMM_CUDA="on", TORCH_CUDA_ARCH_LIST="9.0"
    )
    assert "dpcomm/libdpcomm_cuda.so" in members(wheel)
    target = tmp_path / "installed"
    without_torch.pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    library = target / "dpcomm" / "libdpcomm_cuda.so"
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, timeout=60)
    assert "cuda" not in needed.stdout.replace(str(library), ""), "CUDA's runtime is linked in"
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, timeout=60
    ).stdout.split()[2::3]
    assert symbols == ["dpcomm_cuda_plugin"]
    said = without_torch.python_says(
        f"""
import sys
sys.path.insert(0, {str(target)!r})
from dpcomm import _build, _core
assert not [l for l in open("/proc/self/maps") if "libdpcomm_cuda" in l], "loaded too early"
record = _build.build_record()
print(record.cuda is not None, record.architectures)
count, why = _core.device_count()
print(count > 0 or "driver is missing" in why or "none is visible" in why or why)
"""
    )
    assert said == "True ('90',)\nTrue\n"


def test_without_torch_the_rest_installs_and_works(
    free_wheel: Path, without_torch: Environment, tmp_path: Path
) -> None:
    assert "-0notorch-" in free_wheel.name
    assert not has_module(free_wheel, "_torch")
    without_torch.pip("install", "--no-deps", "--no-index", str(free_wheel))
    said = without_torch.python_says(
        """
import dpcomm, dpcomm._core
print(dpcomm._core.device_count())
print(dpcomm._core.wire_best_isa() in dpcomm._core.wire_isas())
import dpcomm.backend
try:
    dpcomm.backend.binding()
except ImportError as error:
    print(error)
"""
    )
    assert said.startswith("(0, 'no CUDA device: this build has no CUDA part')\nTrue\n")
    assert "pip install torch\n" in said
    assert "pip install --force-reinstall" in said


def test_communicator_without_torch(
    free_wheel: Path, without_torch: Environment, tmp_path: Path
) -> None:
    without_torch.pip("install", "--no-deps", "--no-index", str(free_wheel))
    said = without_torch.python_says(
        f"""
import numpy, dpcomm
comm = dpcomm.Communicator(rank=0, world_size=1, init="file://{tmp_path}/meet")
x = numpy.arange(5, dtype=numpy.float32)
y = comm.all_reduce(x)
comm.close()
print(y.tolist())
"""
    )
    assert said == "[0.0, 1.0, 2.0, 3.0, 4.0]\n"


def test_torch_demanded_but_absent(tree: Path, without_torch: Environment, tmp_path: Path) -> None:
    done = without_torch.try_pip(
        "wheel", "--no-deps", "-w", str(tmp_path), str(tree), DPCOMM_TORCH="on"
    )
    assert done.returncode != 0
    assert "there is no torch in" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
