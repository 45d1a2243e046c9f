"""What a step takes: from a bundle of measured kernels, or from a hardware profile."""
