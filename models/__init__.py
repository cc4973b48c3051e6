"""Trains recurrent networks on real data and exports them to ONNX. It ends where the .onnx file begins."""
