"""A checkpoint becomes a bundle: graphs that ONNX Runtime computes, and all that serving needs. Torch."""
