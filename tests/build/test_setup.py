"""The decisions of setup.py, without a build: which torch, how many jobs, which CUDA."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment that has no torch and no variables set."""
    pytest.importorskip("setuptools")
    for name in os.environ:
        if name.startswith(("DPCOMM_", "CUDA_", "TORCH_CUDA_")) or name in (
            "MAX_JOBS",
            "CMAKE_ARGS",
        ):
            monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("dpcomm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "torch_folders", lambda: [])
    return module


def plant_torch(site_packages: Path, version: str = "2.13.0+cpu") -> Path:
    folder = site_packages / "torch"
    (folder / "include" / "torch").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "version.py").write_text(f"debug = False\n__version__ = '{version}'\ncuda = None\n")
    (folder / "__init__.py").write_text("raise SystemExit('the build imported torch')\n")
    return folder


def test_auto_finds_the_torch_of_the_target(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plant_torch(tmp_path)
    monkeypatch.setattr(setup_py, "torch_folders", lambda: [tmp_path / "none" / "torch", folder])
    assert setup_py.find_torch() == (folder, "2.13.0+cpu")


def test_the_folders_are_those_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where sys.path leaves the environment's own folder out, as pip's isolation does."""
    spec = importlib.util.spec_from_file_location("dpcomm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if "site-packages" not in p])
    assert Path(sysconfig.get_path("platlib")) / "torch" in module.torch_folders()


def test_auto_without_torch_is_loud(
    setup_py: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    assert setup_py.find_torch() is None
    said = capfd.readouterr().err
    assert "WITHOUT its torch backend" in said
    assert "pip install torch" in said


@pytest.mark.parametrize("below", ["", "torch"])
def test_a_path_names_site_packages_or_torch(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    folder = plant_torch(tmp_path, "2.14.1")
    monkeypatch.setenv("DPCOMM_TORCH", str(tmp_path / below))
    assert setup_py.find_torch() == (folder, "2.14.1")


def test_off_ignores_torch(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plant_torch(tmp_path)
    monkeypatch.setattr(setup_py, "torch_folders", lambda: [folder])
    monkeypatch.setenv("DPCOMM_TORCH", "off")
    assert setup_py.find_torch() is None


@pytest.mark.parametrize("wish", ["on", "PATH"])
def test_demanded_but_absent_is_an_error(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    wish: str,
) -> None:
    monkeypatch.setenv("DPCOMM_TORCH", wish.replace("PATH", str(tmp_path)))
    with pytest.raises(SystemExit):
        setup_py.find_torch()
    said = capfd.readouterr().err
    assert "cannot be built" in said
    assert "pip install torch" in said


def test_a_torch_without_headers_is_none(setup_py: ModuleType, tmp_path: Path) -> None:
    folder = plant_torch(tmp_path)
    (folder / "include" / "torch").rmdir()
    assert setup_py.torch_version(folder) is None


@pytest.mark.parametrize("version", ["2.12.0", "2.13.0+cpu", "2.14.1+cu130", "2.14.0a0+git1"])
def test_supported_torch(
    setup_py: ModuleType, version: str, capfd: pytest.CaptureFixture[str]
) -> None:
    setup_py.check_torch(version)
    assert capfd.readouterr().err == ""


def test_old_torch_is_an_error(setup_py: ModuleType) -> None:
    with pytest.raises(SystemExit):
        setup_py.check_torch("2.4.1")


def test_new_torch_is_noted(setup_py: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    setup_py.check_torch("2.15.0")
    assert "newer" in capfd.readouterr().err


def plant_nvcc(folder: Path, version: str = "13.0") -> Path:
    """A folder of CUDA whose nvcc says that it is of `version`, and what it can compile for."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n';;\nesac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_cuda_home_names_nvcc(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = plant_nvcc(tmp_path / "home", "12.9")
    monkeypatch.setenv("PATH", str(plant_nvcc(tmp_path / "other").parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == (nvcc, "12.9")


def test_nvcc_on_path(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = plant_nvcc(tmp_path)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    assert setup_py.find_nvcc() == (nvcc, "13.0")


def test_nvcc_of_pypi(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "torch_folders", lambda: [tmp_path / "torch"])
    nvcc = plant_nvcc(tmp_path / "nvidia" / "cu13")
    assert nvcc in setup_py.nvcc_candidates()


@pytest.mark.parametrize("version", [None, "11.8", "12.7"])
def test_no_usable_nvcc(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    version: str | None,
) -> None:
    """`auto` says loudly that there is no CUDA part, `on` is an error; both say where they looked."""
    if version is not None:
        plant_nvcc(tmp_path, version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_nvcc() is None
    said = capfd.readouterr().err
    assert "WITHOUT its CUDA part" in said
    assert f"{tmp_path}/bin/nvcc: {f'CUDA {version}' if version else 'is not there'}" in said
    setup_py.find_nvcc.cache_clear()
    monkeypatch.setenv("DPCOMM_CUDA", "on")
    with pytest.raises(SystemExit):
        setup_py.find_nvcc()
    assert "cannot be built: DPCOMM_CUDA=on" in capfd.readouterr().err


@pytest.mark.parametrize("wish", ["off", "0"])
def test_cuda_off(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    plant_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DPCOMM_CUDA", wish)
    assert setup_py.find_nvcc() is None


def test_a_wrong_wish_for_cuda(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMM_CUDA", "maybe")
    with pytest.raises(SystemExit):
        setup_py.find_nvcc()


@pytest.mark.parametrize(
    ("wish", "wanted"),
    [
        ("", ["75", "80", "86", "90"]),  # of all that dpcomm would have, those that nvcc knows
        ("9.0", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("7.0 8.0  9.0a", ["80", "90a"]),
        ("Ampere;8.0", ["80", "86+PTX"]),
        ("Turing Hopper", ["75+PTX", "90+PTX"]),
    ],
)
def test_architectures(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wish: str,
    wanted: list[str],
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup_py.cuda_architectures(plant_nvcc(tmp_path)) == wanted


@pytest.mark.parametrize("wish", ["sm_90", "9", "Volta", "7.0", "9.9"])
def test_wrong_architectures(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    with pytest.raises(SystemExit):
        setup_py.cuda_architectures(plant_nvcc(tmp_path))


def test_jobs(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_py.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_py.jobs() == 3
    for wrong in ["0", "-1", "many"]:
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit):
            setup_py.jobs()
