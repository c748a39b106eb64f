"""ONNX graph → engine of `tensorrt` or `tensorrt_rtx`, each built in a process of its own, without a GPU if it can be.

`unetc.nvidia` says in what the two libraries differ, `shapes.py` the shapes an engine is built for. `supervise.py` runs
in unetc and starts `child.py`, which calls `builder.py`; between the two processes goes JSON (`messages.py`).
"""
