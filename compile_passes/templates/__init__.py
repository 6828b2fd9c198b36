"""Hand-written Triton kernels for the hot path, one stage a file; imported only where they run.

They know tensors and bitmasks, not models or mask builders. Each file holds its kernels, the function that launches
them, a twin in plain torch, the configuration table, and the list of configurations that are compiled offline.
"""
