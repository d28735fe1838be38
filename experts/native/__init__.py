"""Native CPU kernels: sources, build and the Python calls."""
