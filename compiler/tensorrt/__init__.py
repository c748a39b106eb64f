"""Build engines of `tensorrt` and `tensorrt_rtx` from ONNX graphs; no GPU is needed where the library allows it.

Each engine is built in a separate process: `supervise.py` starts `child.py`, which calls `builder.py`; the two exchange
JSON (`messages.py`). `build_one.py` puts an engine into the cache. `compile_bundle.py` builds the engines of a bundle
ahead of time, `on_demand.py` the engines that analysis and build measure. `shapes.py` computes the call ranges of an
engine's inputs. The differences between the two libraries are in `unetc.nvidia`.
"""
