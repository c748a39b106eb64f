"""The gated graph: one captured denoiser with a gate on every component, and its specialisation.

`capture` traces the model once, `GatedGraph` is the result as one ONNX graph with gate inputs, `specialise` sets the
gates to constants and removes what no longer matters. The analyzer runs the first, the compiler ships the second; both
have their gates in the same places, so what is measured is what ships.
"""
