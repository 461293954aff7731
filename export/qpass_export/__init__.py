"""ONNX from what qpass quantizes, for onnxruntime and TensorRT. It depends on qpass; qpass never imports it."""

from qpass_export.diff import diff_onnx as diff_onnx
from qpass_export.export import Exported as Exported
from qpass_export.export import export_onnx as export_onnx
from qpass_export.session import load as load
from qpass_export.targets import TARGETS as TARGETS
from qpass_export.verify import Check as Check
from qpass_export.verify import verify as verify
