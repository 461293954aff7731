"""What a model would take, before anything is loaded."""
