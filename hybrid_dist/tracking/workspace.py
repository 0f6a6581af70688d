"""The saved workspace of a project: sections and panels over the names that a run logs."""

from __future__ import annotations

from typing import Any

from hybrid_dist.config import METRICS, Config
from hybrid_dist.errors import UserError
from hybrid_dist.tracking.wandb_sink import logged_in, project_of

INSTALL = "pip install 'hybrid-dist[dashboard]' would do"
_MATRIX = {key: key for key in ("Actual", "Predicted", "nPredictions")}


def save_workspace(config: Config) -> str:
    """Save it under the name of the run. Returns its address.

    Raises:
        UserError: what it takes is not installed, nobody is logged in, or the server refuses it.
    """
    try:
        import wandb
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; {INSTALL}") from None
    if not logged_in():
        raise UserError("nobody is logged in to wandb; wandb login would do")
    try:
        entity = config.tracking.entity or wandb.Api().default_entity
        workspace = build_workspace(config, str(entity))
        workspace.save()
    except Exception as error:
        raise UserError(f"wandb does not take the workspace: {type(error).__name__}: {error}") from None
    return str(workspace.url)


def build_workspace(config: Config, entity: str) -> Any:
    """The workspace, which nobody has been told of yet."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def lines(*keys: str) -> Any:
        return reports.LinePlot(title=", ".join(keys), x="step", y=list(keys))

    names = list(config.tasks)
    sections = {
        "Validation": [lines("val/score"), lines("val/loss", "train/loss"), lines("phase_index")],
        **{f"Task {name}": _task_panels(name, config.tasks[name].kind, lines, reports) for name in names},
        "Pictures": [reports.WeavePanelSummaryTable(table_name="val/pictures")],
        "Training": [
            lines("train/loss", *(f"train/loss_{name}" for name in names)), lines("train/lr"), lines("train/grad_norm"),
        ],
        "Speed": [
            lines("perf/images_per_s"), lines("perf/images_per_s_per_gpu"), lines("perf/mfu"), lines("perf/data_wait"),
            lines("perf/communication"), lines("perf/peak_memory_gb"),
        ],
    }  # fmt: skip
    made = [workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()]
    return workspaces.Workspace(entity=entity, project=project_of(config), name=config.run.name, sections=made)


def _task_panels(name: str, kind: str, lines: Any, reports: Any) -> list[Any]:
    """A task's curves, and its charts of the last validation."""
    panels = [lines(f"val/{name}_{metric}") for metric in METRICS[kind]]
    if kind == "classification":
        charts = {
            "confusion": ("wandb/confusion_matrix/v1", _MATRIX),
            "classes": ("wandb/bar/v0", {"label": "class", "value": "recall"}),
        }
    else:
        charts = {"scatter": ("wandb/scatter/v0", {"x": "label", "y": "prediction"})}
    for chart, (definition, fields) in charts.items():
        query = {"summaryTable": {"tableKey": f"val/{chart}_{name}_table"}}
        panels.append(reports.CustomChart(query=query, chart_name=definition, chart_fields=fields))
    return panels
