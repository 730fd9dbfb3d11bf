"""The arithmetic of intrain in numpy: the definition that the hardware and the GPU path follow bit for bit."""
