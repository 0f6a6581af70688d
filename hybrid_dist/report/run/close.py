"""What training does with the page at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

NAME = "report.html"


def write_if_behind(folder: Path, say: Callable[[str], None]) -> None:
    """Write RUN/report.html if it is not there or older than a best. What goes wrong is said: the model is safe."""
    if not is_behind(folder):
        return
    try:
        from hybrid_dist.report.page import write
        from hybrid_dist.report.run.page import report_page
        from hybrid_dist.report.run.report import make_report

        write(folder / NAME, report_page(make_report(folder)))
        say(f"{folder / NAME}")
    except Exception as error:  # of a run that is done, whatever a page of it runs into
        say(f"warning: no {NAME} ({type(error).__name__}: {error}); hybrid-dist report {folder} tries again")


def is_behind(folder: Path) -> bool:
    """Whether the page is older than what it should show, or not there."""
    page = folder / NAME
    bests = list(folder.glob("phase_*/best.json"))
    news = [*bests, *(folder / name for name in ("metrics.jsonl", "starts.jsonl", "model/model.json"))]
    newest = max((file.stat().st_mtime for file in news if file.is_file()), default=0.0)
    return bool(bests) and (not page.is_file() or page.stat().st_mtime < newest)
