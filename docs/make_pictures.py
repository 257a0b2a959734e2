"""Draws the pictures of docs/algorithms from the schedules themselves.

Usage: python docs/make_pictures.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

from dpcomm import schedule

#: Algorithms that pipeline one chunk need slices to show it; these have 3 (double_tree 2).
SLICES = {"broadcast": 3, "reduce": 3}
#: Algorithms of which 4 ranks show too little.
ALSO_EIGHT = {("all_reduce", "double_tree"), ("all_gather", "tree"), ("reduce_scatter", "tree")}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for algorithm in schedule.algorithms():
        names = (algorithm.collective, algorithm.name)
        slices = 2 if algorithm.name == "double_tree" else SLICES.get(algorithm.collective, 1)
        for world in (4, 8) if names in ALSO_EIGHT else (4,):
            path = folder / f"{'_'.join(names)}_{world}.png"
            schedule.draw(
                algorithm.name,
                world,
                path,
                collective=algorithm.collective,
                root=1,
                slices=slices,
            )
            print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "algorithms/pictures")
