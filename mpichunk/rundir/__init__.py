"""The run directory: journal, checksums, lock, logs."""
