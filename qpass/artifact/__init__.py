"""Quantized models as folders: safetensors and one manifest, checked before they are used."""
