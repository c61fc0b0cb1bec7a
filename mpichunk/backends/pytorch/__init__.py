"""Networks run by torch. `backend` is what others import, and imports the rest when it loads one.

    backend --> network --> exported --> exported_archive     from a path to a torch module
       |           `------> weights, chunkflow
       `------> engine ---> kernels, folding, capture         how torch runs the module
                   `------> arrays --> transfer               blending on the module's device

`flat` writes out TorchScript for engines that cannot read it.
"""
