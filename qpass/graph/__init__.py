"""Reading and editing captured graphs. Knows torch.fx and nothing of quantization."""
