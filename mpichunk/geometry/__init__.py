"""Boxes, lattices, windows, masks: what is where. Arrays and integers only."""
