"""Wire contracts of ExpertMesh: messages, tensors and frames, errors, and the Python client."""
