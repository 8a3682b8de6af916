"""Definitions: short, differentiable PyTorch for any device and float dtype. All else is checked against them."""
