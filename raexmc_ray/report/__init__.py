"""A page about a memory: what it gets right, why, at which settings, and what goes wrong."""

from raexmc_ray.report.page import write_report
from raexmc_ray.report.study import Study

__all__ = ["Study", "write_report"]
