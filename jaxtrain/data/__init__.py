"""From files of examples to packed batches. numpy and grain only: nothing here imports jax."""
