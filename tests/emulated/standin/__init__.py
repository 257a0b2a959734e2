"""A device for torch that needs no hardware: "standin", with the fake CUDA runtime's streams.

``build()`` compiles it against the torch that is installed, once for each state of its sources;
``load()`` makes the device known to torch in this process. See device.h for what it shows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent
ROOT = SOURCES.parents[2]
VARIABLE = "STANDIN_DEVICE"  # for children: the module's file
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NAME = "standin_device"


def build(runtime: Path) -> Path:
    """Compiles the module; cached under build/emulated.

    Args:
        runtime: the shared library with the CUDA runtime's C API.

    Returns:
        The extension module; also in the environment, for load() in children.

    Raises:
        RuntimeError: the compiler failed; holds what it said.
    """
    import torch

    state = hashlib.sha256(f"{FLAGS} {torch.__version__} {sys.version} {runtime}".encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")]):
        state.update(source.read_bytes())
    folder = ROOT / "build" / "emulated" / f"{NAME}-{state.hexdigest()[:16]}"
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = _compile(folder, Path(torch.__file__).parent)
        _link(objects, module, runtime, Path(torch.__file__).parent / "lib")
    os.environ[VARIABLE] = str(module)
    return module


def _compile(folder: Path, torch: Path) -> list[Path]:
    headers = [torch / "include", torch / "include/torch/csrc/api/include"]
    headers.append(Path(sysconfig.get_paths()["include"]))
    include = [word for path in headers for word in ("-isystem", str(path))]
    compiler = os.environ.get("CXX", "g++")
    objects, processes = [], []
    for source in sorted(SOURCES.glob("*.cc")):
        target = folder / f"{source.stem}.{os.getpid()}.o"
        command = [compiler, *FLAGS, f"-DTORCH_EXTENSION_NAME={NAME}", *include]
        command += ["-c", str(source), "-o", str(target)]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        objects.append(target)
        if len(processes) % 2 == 0:  # two at a time
            _finish(processes[-2:])
    _finish(processes)
    return objects


def _finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.returncode is None:
            _, errors = process.communicate(timeout=300)
            if process.returncode != 0:
                raise RuntimeError(f"{process.args}\n{errors}")


def _link(objects: list[Path], module: Path, runtime: Path, libraries: Path) -> None:
    made = module.with_suffix(f".{os.getpid()}")  # several sessions may build at once
    command = [os.environ.get("CXX", "g++"), "-shared", "-o", str(made), *map(str, objects)]
    command += [str(runtime), f"-Wl,-rpath,{runtime.parent}", f"-L{libraries}"]
    command += ["-lc10", "-ltorch_cpu", "-ltorch_python"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command}\n{done.stderr}")
    made.replace(module)
    for path in objects:
        path.unlink()


def load() -> types.ModuleType:
    """Makes the device known to torch as "standin", and as torch.standin.

    Returns:
        The extension module: sleep_ms(), recorded_streams(), freed_blocks(), ...
    """
    import torch

    if NAME in sys.modules:
        return sys.modules[NAME]
    spec = importlib.util.spec_from_file_location(NAME, os.environ[VARIABLE])
    assert spec is not None
    assert spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    sys.modules[NAME] = device
    torch.utils.rename_privateuse1_backend("standin")
    module = types.ModuleType("torch.standin")
    for name in ["device_count", "current_device", "set_device", "synchronize"]:
        setattr(module, name, getattr(device, name))
    vars(module).update(
        Stream=lambda device=None, priority=0: torch.Stream(_index(device), priority=priority),
        Event=lambda enable_timing=False: torch.Event("standin", enable_timing=enable_timing),
        current_stream=lambda device=None: torch.accelerator.current_stream(_index(device)),
        stream=lambda stream: stream,  # a context of its own
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
    )
    torch._register_device_module("standin", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return device


def _index(device: Any) -> Any:
    import torch

    if device is None:
        return torch.device("standin", torch.accelerator.current_device_index())
    return torch.device("standin", device) if isinstance(device, int) else device
