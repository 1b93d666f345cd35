"""Everything the lab remembers: SQLite rows and files by content hash. No torch, no web framework.

    import storage
    from storage import labels
    store = storage.open("~/lab")           # creates or migrates the database
    study = labels.create_study(store, "Tastes", base="scenes", question="Which picture do you prefer?")

Every function takes the `Storage` first, opens its own short transaction and returns plain detached objects or dicts,
so that no caller ever holds the database while it works.
"""

from .db import Storage, StorageError, Unwritable
from .db import open_storage as open

__all__ = ["Storage", "StorageError", "Unwritable", "open"]
