"""Writes tests/MESHES.md from the rows that the sweep of tests/test_meshes.py left.

python tests/mesh_table.py ROWS.jsonl
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections import defaultdict

import jax

KINDS = ("loss", "gradient", "evaluation", "predictions", "decoding")


def main(path: str) -> None:
    rows = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
    by_family: defaultdict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_family[row["variant"]].append(row)
    lines = [
        "# Every family on every mesh, beside one device",
        "",
        f"`bash scripts/test.sh -m mesh`, jax {jax.__version__}, float32, {len(rows):,} programs on 8 and 16 "
        "forced CPU devices. A number is the largest relative difference (of the norm of an array) over all "
        "meshes, microbatches, shapes and remat policies; 1e-4 fails. How the shapes are chosen: "
        "`tests/test_meshes.py`. A ranking's hit rate and NDCG may differ by one example (two scores are "
        "nearly equal).",
        "",
        f"| model | programs | {' | '.join(KINDS)} |",
        f"|---|---|{'---|' * len(KINDS)}",
    ]
    for family, of_family in by_family.items():
        worst = [max((r["worst"][k] for r in of_family if k in r["worst"]), default=None) for k in KINDS]
        cells = " | ".join("" if w is None else f"{w:.0e}" for w in worst)
        lines.append(f"| {family} | {len(of_family)} | {cells} |")
    by_mesh: defaultdict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_mesh[" x ".join(f"{axis} {size}" for axis, size in row["axes"].items())].append(row)
    lines += ["", "| mesh | programs | loss | gradient |", "|---|---|---|---|"]
    for where, on_mesh in by_mesh.items():
        loss, gradient = (max(r["worst"][k] for r in on_mesh) for k in ("loss", "gradient"))
        lines.append(f"| {where} | {len(on_mesh)} | {loss:.0e} | {gradient:.0e} |")
    (pathlib.Path(__file__).parent / "MESHES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
