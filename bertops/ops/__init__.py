"""One file an op: the public function, its autograd.Function and its CUDA implementation."""
