"""Pictures, tables and one HTML page of runs, from the files that a run writes."""

from poco_vla.report.comparison_page import write_comparison
from poco_vla.report.comparisons_page import write_comparisons
from poco_vla.report.console import finish, result_table
from poco_vla.report.curves import WINDOW, Curve, curve_of, read_curve
from poco_vla.report.page import write_page
from poco_vla.report.plots import draw_curves
from poco_vla.report.published import published
from poco_vla.report.runs import Group, RunRecord, eval_command, find_runs, group_runs, read_result, read_run

__all__ = [
    "WINDOW",
    "Curve",
    "Group",
    "RunRecord",
    "curve_of",
    "draw_curves",
    "eval_command",
    "find_runs",
    "finish",
    "group_runs",
    "published",
    "read_curve",
    "read_result",
    "read_run",
    "result_table",
    "write_comparison",
    "write_comparisons",
    "write_page",
]
