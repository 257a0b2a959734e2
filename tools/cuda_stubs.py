"""Makes stand-ins for the CUDA libraries that a torch built for CUDA wants to be there.

    python tools/cuda_stubs.py FOLDER_OF_TORCH OUTPUT

With LD_LIBRARY_PATH=OUTPUT such a torch can be imported and used on the CPU without several GB of
CUDA: each library that is missing has the symbols that torch asks for, and each function in it
says 999, CUDA's "unknown error". Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# CUDA's own names; what else is missing is for the user to see.
FOREIGN = re.compile(r"lib(cu|nv|nccl)\w*\.so")
FUNCTION = re.compile(r"(cu|nccl|nvrtc|nvshmem|nvml|nvtx|nvJitLink|__cuda|__nv)\w*")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wanted(library: Path) -> dict[str, dict[str, set[str]]]:
    """By library and version of symbols (empty: none): the symbols that `library` wants."""
    names: dict[str, dict[str, set[str]]] = {
        name: defaultdict(set)
        for name in re.findall(
            r"\(NEEDED\).*\[(.+?)\]", output_of("readelf", "-d", "-W", str(library))
        )
        if FOREIGN.match(name)
    }
    owner = {}
    file = ""
    for line in output_of("readelf", "-V", "-W", str(library)).splitlines():
        if match := re.search(r"File: (\S+)\s+Cnt", line):
            file = match.group(1)
        elif (match := re.search(r"Name: (\S+)\s+Flags", line)) and file in names:
            owner[match.group(1)] = file
    symbols = output_of("nm", "-D", "--undefined-only", "--with-symbol-versions", str(library))
    for symbol, version in re.findall(r" [Uw] ([^\s@]+)(?:@+(\S+))?$", symbols, re.MULTILINE):
        if version in owner:
            names[owner[version]][version].add(symbol)
        elif not version and FUNCTION.fullmatch(symbol):
            for each in names.values():  # whose it is cannot be seen
                each[""].add(symbol)
    return names


def main() -> int:
    torch, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    stubs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for library in sorted((torch / "lib").glob("*.so*")):
        for name, versions in wanted(library).items():
            stubs[name]  # also one that nothing is taken from
            for version, symbols in versions.items():
                stubs[name][version] |= symbols
    for name, versions in stubs.items():
        source, script = output / "stub.c", output / "stub.map"
        symbols = set().union(*versions.values()) if versions else set()
        source.write_text("".join(f"long {s}(void) {{ return 999; }}\n" for s in sorted(symbols)))
        script.write_text(
            "".join(
                f"{version} {{ global: {'; '.join(sorted(versions[version]))}; }};\n"
                for version in sorted(versions)
                if version
            )
        )
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", "-o", str(output / name)]
        command += [f"-Wl,-soname,{name}", str(source)]
        if script.read_text():
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)
        source.unlink()
        script.unlink()
    print(f"{len(stubs)} stand-ins in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
