"""qpass's operators as what a target runs: one file for each kind of place, `lower` for the whole graph."""
