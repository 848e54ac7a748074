"""What a checkpoint is: names, the safetensors files of a release, quantised tensors, and this project's Orbax layout.

`open_checkpoint` (in `m3_jax.checkpoint.open`) reads a folder of either layout through one interface. Nothing here is
imported before it is needed.
"""
