"""Fast pure-PyTorch paths: what runs on a CPU, and where a kernel cannot."""
