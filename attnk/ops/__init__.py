"""Operations: validation, the choice of a backend, registration with PyTorch, autograd, and the public function."""
