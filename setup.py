"""Builds dpcomm's extension modules with CMake and Ninja; all else is in pyproject.toml.

Environment variables of the build (docs/installing.md):

- DPCOMM_TORCH: auto (default; the torch of the environment that is installed into, else none), on
  (no torch is an error), off, or a path to a site-packages folder or to torch's own folder.
- DPCOMM_CUDA: auto (default; with CUDA where there is nvcc 12.8 or newer), on (no nvcc is an error)
  or off. CUDA_HOME (or CUDA_PATH) names CUDA's folder; else nvcc on PATH, in /usr/local/cuda, or of
  the package nvidia-cuda-nvcc is taken. TORCH_CUDA_ARCH_LIST: as for torch's own extensions.
- DPCOMM_WERROR: 1 makes compiler warnings errors.
- MAX_JOBS: compilers at once. CMAKE_ARGS: further arguments of CMake. CXX: the compiler.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SUPPORTED_TORCH = ((2, 12), (2, 14))
OLDEST_CUDA = (12, 8)
OLDEST_ARCHITECTURE = 75
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
NAMED_ARCHITECTURES = {  # torch's names
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


def say(text: str) -> None:
    """Prints a notice that stands out. pip shows it with -v, and whenever the build fails."""
    bar = "=" * 88
    print(f"\n{bar}\n{text}\n{bar}\n", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    say(f"dpcomm cannot be built: {text}")
    raise SystemExit(1)


def torch_folders() -> list[Path]:
    """Where the environment that is installed into may have torch, likeliest first.

    Under pip's build isolation the interpreter is still that of the target environment, so
    sysconfig's and site's folders are that environment's, although sys.path leaves them out.
    """
    folders: list[str] = []
    spec = importlib.util.find_spec("torch")  # finds, does not import; sees PYTHONPATH
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent.parent))
    folders += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders += site.getsitepackages()
    config = Path(sys.prefix) / "pyvenv.cfg"
    in_venv = sys.prefix != sys.base_prefix
    shares_system = config.is_file() and re.search(
        r"(?im)^include-system-site-packages\s*=\s*true", config.read_text()
    )
    if not in_venv or shares_system:
        folders.append(site.getusersitepackages())
    if shares_system:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [
            sysconfig.get_path("platlib", vars=base),
            *site.getsitepackages([sys.base_prefix]),
        ]
    return [Path(folder) / "torch" for folder in dict.fromkeys(folders)]


def torch_version(folder: Path) -> str | None:
    """The version of the torch at `folder`, read as text; None where no complete torch is there."""
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"""^__version__\s*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    complete = (folder / "include" / "torch").is_dir() and (folder / "lib").is_dir()
    return match.group(1) if match and complete else None


@functools.cache
def find_torch() -> tuple[Path, str] | None:
    """torch's folder and version as DPCOMM_TORCH wants them; None to build without torch."""
    wish = os.environ.get("DPCOMM_TORCH", "").strip() or "auto"
    if wish.lower() in ("off", "0", "no"):
        return None
    automatic = wish.lower() in ("auto", "on", "1", "yes")
    if automatic:
        candidates = torch_folders()
    else:
        path = Path(wish).expanduser().resolve()
        candidates = [path / "torch", path]
    for folder in candidates:
        version = torch_version(folder)
        if version is not None:
            return folder, version
    looked = "\n".join(f"  {folder}" for folder in candidates)
    if wish.lower() != "auto":
        fail(
            f"DPCOMM_TORCH={wish}, but there is no torch in\n{looked}\n"
            "Install torch first (pip install torch), or set DPCOMM_TORCH to the site-packages\n"
            "folder that has it, or to `off` for dpcomm without the torch backend."
        )
    say(
        f"dpcomm is built WITHOUT its torch backend: there is no torch in\n{looked}\n"
        "dpcomm.Communicator will work. For torch.distributed install torch, then dpcomm again:\n"
        "  pip install torch && pip install --force-reinstall --no-deps --no-cache-dir dpcomm\n"
        "uv builds in an environment of its own: set DPCOMM_TORCH to the site-packages folder\n"
        "that has torch, or use --no-build-isolation."
    )
    return None


def check_torch(version: str) -> None:
    """Ends the build where the sources do not support this torch."""
    match = re.match(r"(\d+)\.(\d+)", version)
    minor = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if minor < SUPPORTED_TORCH[0]:
        fail(f"torch {version} is too old: dpcomm needs torch 2.12 to 2.14.")
    if minor > SUPPORTED_TORCH[1]:
        say(f"torch {version} is newer than what dpcomm was tested with (2.12 to 2.14).")


def cuda_wish() -> str:
    """auto, on or off."""
    wish = os.environ.get("DPCOMM_CUDA", "").strip().lower() or "auto"
    wish = {"1": "on", "yes": "on", "0": "off", "no": "off"}.get(wish, wish)
    if wish not in ("auto", "on", "off"):
        fail(f"DPCOMM_CUDA={wish}: use auto, on or off.")
    return wish


def nvcc_candidates() -> list[Path]:
    """Where nvcc may be, likeliest first. A folder that the user names is the only one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return [Path(os.environ[variable]) / "bin" / "nvcc"]
    on_path = shutil.which("nvcc")
    candidates = [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in torch_folders():  # the site-packages of the environment that is installed into
        candidates += sorted(folder.parent.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return candidates


def nvcc_says(nvcc: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [str(nvcc), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


@functools.cache
def find_nvcc() -> tuple[Path, str] | None:
    """nvcc and the version of its CUDA as DPCOMM_CUDA wants them; None to build without CUDA."""
    wish = cuda_wish()
    if wish == "off":
        return None
    looked = []
    for nvcc in nvcc_candidates():
        match = re.search(r"release (\d+)\.(\d+)", nvcc_says(nvcc, "--version"))
        if match is None:
            looked.append(f"  {nvcc}: {'does not run' if nvcc.exists() else 'is not there'}")
        elif (int(match.group(1)), int(match.group(2))) < OLDEST_CUDA:
            looked.append(f"  {nvcc}: CUDA {match.group(1)}.{match.group(2)}")
        else:
            return nvcc, f"{match.group(1)}.{match.group(2)}"
    places = "\n".join(looked)
    oldest = ".".join(map(str, OLDEST_CUDA))
    if wish == "on":
        fail(
            f"DPCOMM_CUDA=on, but there is no nvcc of CUDA {oldest} or newer:\n{places}\n"
            "Set CUDA_HOME to the folder that has bin/nvcc, or DPCOMM_CUDA to auto or off."
        )
    say(
        f"dpcomm is built WITHOUT its CUDA part: there is no nvcc of CUDA {oldest} or newer:\n"
        f"{places}\n"
        "Arrays on the CPU will work. For CUDA devices install the toolkit (or set CUDA_HOME),\n"
        "then dpcomm again: pip install --force-reinstall --no-deps --no-cache-dir dpcomm"
    )
    return None


def cuda_architectures(nvcc: Path) -> list[str]:
    """What to compile for, such as ["80", "90", "120+PTX"], as TORCH_CUDA_ARCH_LIST wants it."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = set(re.findall(r"compute_(\w+)", nvcc_says(nvcc, "--list-gpu-arch")))
    entries: list[str] = []
    for entry in re.split(r"[;,\s]+", wish or ARCHITECTURES):
        entries += NAMED_ARCHITECTURES.get(entry, entry).split(";")
    found: list[str] = []
    for entry in filter(None, entries):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST={wish}: '{entry}' is not like 9.0, 9.0+PTX or Hopper.")
            raise AssertionError
        number = match.group(1) + match.group(2)
        if int(number) < OLDEST_ARCHITECTURE:
            say(f"dpcomm leaves out CUDA architecture {entry}: its kernels need 7.5 or newer.")
        elif known and number not in known:
            if wish:
                fail(f"TORCH_CUDA_ARCH_LIST={wish}: {nvcc} does not know {entry}.")
        else:
            found.append(number + (match.group(3) or "") + (match.group(4) or ""))
    if not found:
        fail(f"TORCH_CUDA_ARCH_LIST={wish} leaves no architecture that dpcomm has kernels for.")
    return list(dict.fromkeys(found))


def tool(name: str, folder_attribute: str) -> str:
    """The path of cmake or ninja: that of the Python package, else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
        if (Path(folder) / name).exists():
            return str(Path(folder) / name)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if found is None:
        fail(f"{name} is missing: pip install {name} (pip does so unless --no-build-isolation).")
    return str(found)


def pybind11_folder() -> str:
    try:
        return str(importlib.import_module("pybind11").get_cmake_dir())
    except ImportError:
        fail("pybind11 is missing: pip install pybind11 (--no-build-isolation needs it by hand).")
        raise


def jobs() -> int:
    text = os.environ.get("MAX_JOBS", "").strip()
    if text:
        if not text.isdigit() or int(text) == 0:
            fail(f"MAX_JOBS={text}: give a number of compilers, at least 1.")
        return int(text)
    return max(1, len(os.sched_getaffinity(0)))


class BuildPython(build_py):
    """Copies the Python files into a clean folder: what is no longer built is not packed either."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "dpcomm", ignore_errors=True)
        super().run()


class BuildExtensions(build_ext):
    """Runs CMake once for all extension modules."""

    def run(self) -> None:
        nvcc = find_nvcc()
        torch = find_torch()
        if torch is not None:
            check_torch(torch[1])
            print(f"dpcomm: building for torch {torch[1]} at {torch[0]}", flush=True)
        if nvcc is not None:
            print(f"dpcomm: building for CUDA {nvcc[1]} with {nvcc[0]}", flush=True)
        # Not setuptools' temporary folder: this one is kept, so that a second build is quick.
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        arguments = self.configure_arguments(torch, nvcc)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        self.configure(cmake, build, arguments)
        self.call([cmake, "--build", str(build), "-j", str(jobs())])
        prefix = self.prefix()
        # Away with the old ones: a process that has one loaded keeps it, instead of crashing.
        for old in (prefix / "dpcomm").glob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            old.unlink()
        (prefix / "dpcomm" / "libdpcomm_cuda.so").unlink(missing_ok=True)
        self.call([cmake, "--install", str(build), "--prefix", str(prefix)])

    def configure(self, cmake: str, build: Path, arguments: list[str]) -> None:
        """Runs CMake in `build`, whose cache would mix other arguments with these: off with it.

        The objects stay (Ninja knows which still fit), but for another compiler.
        """
        stamp = build / "dpcomm-arguments.txt"
        compiler = f"CXX={os.environ.get('CXX', '')} CXXFLAGS={os.environ.get('CXXFLAGS', '')}"
        wanted = "\n".join([compiler, cmake, *arguments])
        before = stamp.read_text() if stamp.is_file() else ""
        if before != wanted:
            (build / "CMakeCache.txt").unlink(missing_ok=True)
        if before.split("\n")[0] != compiler:
            shutil.rmtree(build, ignore_errors=True)
        self.call([cmake, "-S", str(ROOT), "-B", str(build), *arguments])
        stamp.write_text(wanted)

    def prefix(self) -> Path:
        """The folder that gets dpcomm/_core...so: the sources for an editable install."""
        return ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()

    def configure_arguments(
        self, torch: tuple[Path, str] | None, nvcc: tuple[Path, str] | None
    ) -> list[str]:
        arguments = [
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            f"-DDPCOMM_TORCH_ROOT={torch[0] if torch else ''}",
            f"-DDPCOMM_NVCC={nvcc[0] if nvcc else ''}",
            f"-DDPCOMM_WERROR={os.environ.get('DPCOMM_WERROR') or 'OFF'}",
        ]
        if nvcc is not None:
            architectures = ";".join(cuda_architectures(nvcc[0]))
            arguments.append(f"-DDPCOMM_CUDA_ARCHITECTURES={architectures}")
        return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))

    def call(self, command: list[str]) -> None:
        print("dpcomm:", shlex.join(command), flush=True)
        # nvcc compiles for several architectures at once; in the environment, not in the command
        # lines, which would make everything be built again.
        flags = f"--threads={jobs()} {os.environ.get('NVCC_APPEND_FLAGS', '')}".strip()
        try:
            subprocess.run(command, check=True, env={**os.environ, "NVCC_APPEND_FLAGS": flags})
        except subprocess.CalledProcessError as error:
            fail(
                f"`{command[0]} {command[1]} ...` ended with {error.returncode}; its messages are"
                " above. It needs a C++20 compiler (g++ 12 or newer) and Python's headers\n"
                "(Debian, Ubuntu: apt-get install g++ python3-dev). Where nvcc is what fails,\n"
                "CUDAHOSTCXX names a compiler that it knows, and DPCOMM_CUDA=off does without it."
            )

    def get_outputs(self) -> list[str]:
        folder = self.prefix() / "dpcomm"
        return sorted(str(path) for path in [*folder.glob("*.so"), folder / "_build_record.py"])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWheel(bdist_wheel):
    """Shows in the wheel's name which torch it was built for: dpcomm-0.1.0-0torch2.13-cp311-..."""

    def finalize_options(self) -> None:
        torch = find_torch()
        self.build_number = f"0torch{'.'.join(torch[1].split('.')[:2])}" if torch else "0notorch"
        super().finalize_options()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("dpcomm._core", sources=[])],
        cmdclass={
            "bdist_wheel": BuildWheel,
            "build_ext": BuildExtensions,
            "build_py": BuildPython,
        },
    )
