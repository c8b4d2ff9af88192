"""Run and time ONNX graphs in ONNX Runtime."""
