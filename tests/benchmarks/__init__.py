"""Commands that measure what README claims: `python -m tests.benchmarks.NAME --help`."""
