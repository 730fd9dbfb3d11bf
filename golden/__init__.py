"""The arithmetic of intrain in numpy: what the hardware and the GPU path follow bit for bit."""
