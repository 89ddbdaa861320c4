"""The picture of a `metala_gpu.py` result: what each operator takes, forward and backward, over the shapes, with the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"ours": "#1b6ca8", "torch": "#999999", "fla + eager glue": "#c8553d", "fla + compiled glue": "#e0a458"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels (forward, backward) of bars per shape; nothing where the section was left out."""
    rows = result.get("operator", []) + result.get("lonely sequences", [])
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    names = [name for name in COLOURS if any(name in row for row in rows)]
    for panel, part in zip(panels, ("forward", "backward"), strict=True):
        for i, name in enumerate(names):
            places = [at + 0.8 * (i - (len(names) - 1) / 2) / len(names) for at in range(len(rows))]
            heights = [row[name][f"{part}_ms"] if name in row else float("nan") for row in rows]
            panel.bar(places, heights, 0.8 / len(names), label=name, color=COLOURS[name])
        for at, row in enumerate(rows):
            floor = max(row[f"floor {part}"].values())
            panel.plot([at - 0.4, at + 0.4], [floor, floor], color="black", lw=1.5, label="floor" if at == 0 else None)
        labels = [f"d {r['d']}, {r['heads']} heads\n{r['batch']} x {r['length']}" for r in rows]
        panel.set_xticks(range(len(rows)), labels, rotation=45, ha="right", fontsize=7)
        panel.set_ylabel("ms")
        panel.set_yscale("log")
        panel.set_title(f"MetaLA operator, {part}")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['device']}, torch {result['torch']}, triton {result['triton']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
