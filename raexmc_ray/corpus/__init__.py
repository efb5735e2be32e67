"""The corpus: texts and relevance in, Arrow tables and a CSR matrix out.

`read_corpus` finds the layout of a folder by the files in it:

- LF-XMC JSON lines, as the public benchmarks come (`trn.json[.gz]`, `tst.json[.gz]`, `lbl.json[.gz]`);
- the raw text layout (`raw/trn_X.txt`, `raw/tst_X.txt`, `raw/Y.txt`, `Y.trn.npz`, `Y.tst.npz`);
- Parquet (`instances.parquet`, `labels.parquet`, optional `test.parquet`).

Bad input is refused with a `CorpusError` that names the file, the line and the field.
"""

from raexmc_ray.corpus.read import read_corpus
from raexmc_ray.corpus.types import Corpus, CorpusError, Split

__all__ = ["Corpus", "CorpusError", "Split", "read_corpus"]
