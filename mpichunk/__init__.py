"""Run a 3D convolutional network over volumes that no machine can hold, on MPI ranks."""

__version__ = "0.2.0"
