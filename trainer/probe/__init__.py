"""Linear probes on every module of every block, teacher beside student."""
