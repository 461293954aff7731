"""What quantizing costs and gains, in numbers."""
