"""Trains recurrent networks on real data and exports them to ONNX. It ends where the .onnx file begins."""

import os

# onnxruntime reads it when it is imported, which both sides do after this package: its builds for Linux send usage data
# to their maker unless it is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
