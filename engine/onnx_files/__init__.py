"""Detectors as ONNX files: export.py writes them; eval.py, predict.py and app.py use them as checkpoints.

graph     a PyTorch model as a graph, with the selection of detections and metadata
int8      post-training quantization of a graph
other_formats  torch.export's program, OpenVINO, and the commands for TensorRT and Core ML
detector  runs a file with onnxruntime, with the interface of a detector

The folder cannot be called onnx or onnx_model: onnxruntime imports modules of these names from the top level.
"""
