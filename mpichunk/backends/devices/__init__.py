"""Devices and threads: what a process sees of them, and which rank of a node gets which."""
