"""An empty matplotlib figure without a display, and its PNG; every picture of this project is made with these two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.files import atomic_open


def new_figure(width: float, height: float, missing: str = "no plot") -> Any:
    """A figure of this size in inches.

    Args:
        width: in inches.
        height: in inches.
        missing: beginning of the message without matplotlib.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"{missing}: matplotlib is not installed", why=str(error), hint="pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, image: str | Path, dpi: int = 130, **options: Any) -> Path:
    """Write the PNG, complete or not at all, with further options of `savefig`; returns its path."""
    image = Path(image)
    with atomic_open(image) as handle:
        figure.savefig(handle, format="png", dpi=dpi, **options)
    return image
