"""ONNX graph → engine of `tensorrt` or `tensorrt_rtx`, each built in a process of its own, without a GPU if it can be.

`library.py` has all that the two libraries differ in, `shapes.py` the sizes an engine is built for. `supervise.py` runs
in unetc and starts `child.py`, which calls `builder.py`; between the two processes goes JSON (`messages.py`).
"""
