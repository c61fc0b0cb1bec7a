"""The ranks of a run: MPI, launchers, processes, and how the survivors meet again."""
