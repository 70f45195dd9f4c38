"""Detectors as ONNX files: export.py writes them; eval.py, predict.py and app.py use them as checkpoints.

graph     a PyTorch model as a graph, with the selection of detections and metadata
check     whether a graph computes what the PyTorch model does
int8      a detector that rounds to 8 bits as a graph, and its calibration
other_formats  torch.export's program, OpenVINO, and the commands for TensorRT and Core ML
detector  runs a file with onnxruntime, with the interface of a detector

The folder cannot be called onnx or onnx_model: onnxruntime imports modules of these names from the top level.
"""
