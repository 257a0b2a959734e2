"""The options of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dpcomm.bench.units import parse_size

__all__ = ["LAUNCH", "make_parser", "make_plot_parser"]

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_list", "reduce_scatter")
OPS = ("sum", "prod", "min", "max", "avg", "premul")
DTYPES = ("float", "half", "bfloat16", "double", "int8", "uint8", "int32", "int64")
WIRES = ("native", "fp16", "bf16", "int8")
LAUNCH = "torchrun --standalone --nproc-per-node 2 -m dpcomm.bench"

DESCRIPTION = f"""\
Measures collectives of one or more backends, interleaved in one run.

  {LAUNCH}
  {LAUNCH} -b 8 -e 32M -f 4 --output x.json
  python -m dpcomm.bench plot x.json -o x.png

The letters and the columns are nccl-tests'. docs/benchmark.md says how to read them."""

EPILOG = """\
sizes     are bytes of the larger buffer; K, M and G are powers of 1024.
time      of one operation: the slowest rank's loop over its operations, median over the rounds.
in-place  is what dist.all_reduce and dist.broadcast have; where an interface has no out-of-place
          form, those columns are n/a (the backend `communicator` has both).
ratio     time of the last backend of --backends over the time of this one: 2.00x is half the time.
#wrong    elements over all ranks that are not what they have to be: exactly for small integers, or
          outside the documented error bound where a lossy --wire may be in use.
exit      0; 1 if any element was wrong; 2 if the benchmark cannot run as asked."""


def _one_of(names: tuple[str, ...], **alias: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if text == "all":
            return list(names)
        chosen = [alias.get(part, part) for part in text.split(",") if part]
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}, all")
        if not chosen:
            raise argparse.ArgumentTypeError("nothing given")
        return list(dict.fromkeys(chosen))

    return parse


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in _names(text)]


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return int(text)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".json", ".csv"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .json or .csv")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    return path


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Names of options in one column, as wide as the longest."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def make_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(
        prog="dpcomm.bench",
        usage=f"{LAUNCH} [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    add = parser.add_argument_group("sizes").add_argument
    add("-b", "--minbytes", type=_size, default=8, metavar="SIZE", help="first size (8)")
    add("-e", "--maxbytes", type=_size, default=2**27, metavar="SIZE", help="last size (128M)")
    add(
        "-f",
        "--stepfactor",
        type=float,
        default=4,
        metavar="X",
        help="each is X times the last (4)",
    )
    add(
        "-i",
        "--stepbytes",
        type=_size,
        default=0,
        metavar="SIZE",
        help="or SIZE more than the last",
    )
    add("--sizes", type=_sizes, metavar="A,B,..", help="or just these, as in 8,32K,25M")

    add = parser.add_argument_group("operation").add_argument
    add(
        "--collective",
        choices=COLLECTIVES,
        default="all_reduce",
        metavar="NAME",
        help=_help("all_reduce (default)", *COLLECTIVES[1:]),
    )
    add(
        "-o",
        "--op",
        type=_one_of(OPS, mulsum="premul"),
        default=["sum"],
        metavar="OP",
        help=_help("sum (default)", *OPS[1:], "all"),
    )
    add(
        "-d",
        "--datatype",
        type=_one_of(DTYPES),
        default=["float"],
        metavar="TYPE",
        help=_help("float (default)", *DTYPES[1:], "all"),
    )
    add("-r", "--root", type=_count, default=0, metavar="RANK", help="root of broadcast (0)")

    add = parser.add_argument_group("backends").add_argument
    add(
        "--backends",
        type=_names,
        default=["dpcomm", "gloo"],
        metavar="A,B,..",
        help="taking turns, the last is the reference (dpcomm,gloo); also communicator, "
        "and any name with -fp16hook: behind a cast to fp16 and back",
    )
    add(
        "--wire",
        type=_one_of(WIRES),
        default=["native"],
        metavar="WIRE",
        help="wire format that dpcomm may use: native (default), fp16, bf16, int8; "
        "several take turns like backends",
    )
    add(
        "--algo",
        type=_names,
        default=["auto"],
        metavar="NAME",
        help="algorithm of dpcomm: auto (default) or a name of dpcomm.schedule; or several",
    )
    add(
        "--wire-links",
        choices=("network", "all"),
        default="network",
        metavar="LINKS",
        help="where the wire format is used: network (default), or all: also within a host",
    )

    add = parser.add_argument_group("measurement").add_argument
    add(
        "-n",
        "--iters",
        type=_count,
        default=0,
        metavar="N",
        help="operations in a timed loop (0: as many as fit into --loop-ms)",
    )
    add("--loop-ms", type=float, default=50, metavar="MS", help="time of a loop, unless -n (50)")
    add(
        "--rounds",
        type=_positive,
        default=5,
        metavar="N",
        help="loops of each backend; the order rotates (5)",
    )
    add(
        "-w",
        "--warmup_iters",
        type=_count,
        default=5,
        metavar="N",
        help="operations before the first loop of each size (5)",
    )
    add(
        "-c",
        "--check",
        type=_count,
        default=1,
        metavar="N",
        help="checked operations of each size, on fresh data (1); 0: none",
    )
    add("--timeout", type=float, default=120, metavar="S", help="of each operation (120)")

    add = parser.add_argument_group("output").add_argument
    add("--cpu", action="store_true", help="show CPU time of an operation, per rank, all threads")
    add("--min", action="store_true", help="show the fastest round beside the median")
    add(
        "--output",
        type=_output,
        metavar="FILE",
        help="x.json or x.csv: a row for each size, backend and placement",
    )
    return parser


def _help(*names: str) -> str:
    return ", ".join(names)


def make_plot_parser() -> argparse.ArgumentParser:
    """The options of `plot`."""
    parser = argparse.ArgumentParser(
        prog="python -m dpcomm.bench plot",
        description="Draws time, bus bandwidth and the ratio against the size.",
        formatter_class=_Formatter,
    )
    parser.add_argument("input", type=Path, help="a JSON written by --output")
    parser.add_argument(
        "-o", "--output", type=Path, help="the picture (input with .png); also .svg"
    )
    return parser
