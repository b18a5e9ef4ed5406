"""pyllm: transformer language models on compiled kernels."""
