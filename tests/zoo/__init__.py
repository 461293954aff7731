"""The zoo: a tiny random model of every architecture in transformers, quantized whole and compared with a reference."""
