"""Exports to ONNX files."""
