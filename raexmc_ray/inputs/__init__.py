"""Rows to label or to embed, from Parquet, JSON-lines and text files: found, cut into units, read and judged."""

from raexmc_ray.inputs.find import InputFile, Written, find_inputs
from raexmc_ray.inputs.rows import Columns
from raexmc_ray.inputs.units import read_texts

__all__ = ["Columns", "InputFile", "Written", "find_inputs", "read_texts"]
