"""A run put together: what is prepared, what each rank computes with, how it ends."""
