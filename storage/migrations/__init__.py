"""The database's past: one small file per revision in versions/, run by storage.db without any alembic.ini."""
