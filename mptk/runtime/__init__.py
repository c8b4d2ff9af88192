"""runtime: running and timing ONNX graphs."""
