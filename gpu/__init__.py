"""The methods' training steps on torch tensors: int8 products on CPUs and GPUs, the bits of `golden`."""
