"""onnx: from a Program to an ONNX graph with a KV cache, in float or quantised."""
