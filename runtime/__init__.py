"""Bundle → Session: open a bundle, sample from it. Needs numpy and one backend; never torch, diffusers or onnx."""
