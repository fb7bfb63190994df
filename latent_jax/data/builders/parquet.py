"""What goes wrong with parquet files. Apart from files.py: importing pyarrow takes longer than a small folder."""

from pyarrow import ArrowException

# What pyarrow raises over a damaged file: its own errors, of which not all are Python's too, and Python's.
PARQUET_ERRORS = (ArrowException, ValueError, OSError, RuntimeError, LookupError, TypeError, MemoryError)
