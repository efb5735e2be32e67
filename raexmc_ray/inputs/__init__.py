"""Rows to label or to embed, from Parquet, JSON-lines and text files: found, cut into units, read and judged; and jobs
over them."""

from raexmc_ray.inputs.find import InputFile, Written, find_inputs
from raexmc_ray.inputs.rows import Columns

__all__ = ["Columns", "InputFile", "Written", "find_inputs"]
