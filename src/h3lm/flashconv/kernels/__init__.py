"""The GPU kernels. Nothing here is imported before its first use: Triton may be missing."""
