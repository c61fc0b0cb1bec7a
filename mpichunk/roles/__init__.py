"""What the main thread of a rank does while blocks are computed."""
