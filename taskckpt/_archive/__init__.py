"""Folders as ``.tar.gz``: scanned and packed, read and extracted safely. Pure streams; knows no store."""
