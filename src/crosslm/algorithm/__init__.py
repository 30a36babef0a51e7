"""The paper's equations as pure functions: tensors in, tensors out."""
