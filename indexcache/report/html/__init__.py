"""Make a page of run folders, in HTML that needs nothing else."""

from indexcache.report.html.page import Report, ReportSettings, make_report

__all__ = ["Report", "ReportSettings", "make_report"]
