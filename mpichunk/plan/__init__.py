"""What will be computed, and what it takes, before anything runs."""
