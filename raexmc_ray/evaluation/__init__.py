"""How good a memory is, whether a difference is more than chance, and which settings are best."""

from raexmc_ray.evaluation.measure import evaluate
from raexmc_ray.evaluation.result import EVALUATION, Evaluation, Measured, format_table, load

__all__ = ["EVALUATION", "Evaluation", "Measured", "evaluate", "format_table", "load"]
