"""runtime: run and time ONNX graphs."""
