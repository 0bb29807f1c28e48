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
        f"nearly equal). {again(rows)}",
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


def again(rows: list[dict]) -> str:
    """Which programs agreed for the second or third draw of their values, and why."""
    found = [row["variant"] for row in rows if row.get("draws", 1) > 1]
    if not found:
        return ""
    names = ", ".join(f"{found.count(name)} of {name}" for name in dict.fromkeys(found))
    return (
        f"{len(found)} programs ({names}) agreed for the second or third draw of parameters and batch: at a "
        "kink of a ReLU or max-pool, and between nearly equal scores, rounding decides, on one device too."
    )


if __name__ == "__main__":
    main(sys.argv[1])
