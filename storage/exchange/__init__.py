"""Data in and out: a study as JSONL + pictures (folder or zip), or as Pick-a-Pic-style parquet.

    for state in exchange.import_data(store, "study.zip"): print(state["done"], state["rejected"])
    for state in exchange.export_jsonl(store, study_id, "study.zip"): print(state["done"])
    for state in exchange.export_parquet(store, study_id, "study.parquet"): print(state["done"])

Imports stream with bounded memory and store a batch of rows in one transaction. They may be stopped anywhere and begun
again: pictures are recognised by their bytes, pairs by prompt and files, labels by their client key, so that what is
there already counts as a duplicate and nothing is doubled. A row that cannot be taken is counted with its reason.
Nothing from an archive is ever written under a name that the archive chose: files go in by content hash.
"""

from .items import ExchangeError
from .jsonl_out import export_jsonl
from .parquet_out import export_parquet
from .take import import_data, rejected_rows

__all__ = ["ExchangeError", "export_jsonl", "export_parquet", "import_data", "rejected_rows"]
