"""The report of a compressed model: an HTML page that stands alone."""

from compress_core.session.report.document import write_report
from compress_core.session.report.gathering import Reported, ReportOptions

__all__ = ["ReportOptions", "Reported", "write_report"]
