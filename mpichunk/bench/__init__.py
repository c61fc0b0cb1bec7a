"""What a benchmark measures, and how it tells it."""
