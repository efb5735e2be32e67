"""Rows to label or to embed, from Parquet, JSON-lines and text files: found, cut into units, read and
judged; and jobs over them."""
