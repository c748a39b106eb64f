"""The gated graph: one captured denoiser with a gate on every component, and its specialisation.

`capture` traces the model once. `GatedGraph` holds the result as one ONNX graph with gate inputs. `specialise` sets the
gates to constants and removes every node that no longer matters. The analyzer runs the gated graph, and the compiler
ships the specialised one. The gates are at the same edges in both, so the analyzer measures the computation that ships.
"""
