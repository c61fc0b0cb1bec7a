"""Networks that ship with mpichunk, each a plain PyTorch module beside its weights.

Modules here know no configuration, no volumes and no other part of mpichunk: the `pytorch` backend
loads them as it loads anybody's `file.py:Name`. Importing this package imports no torch.
"""
