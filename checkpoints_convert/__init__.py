"""`m3-convert`: between the released layout and this project's, in both directions; compare; look.

What a checkpoint is lives in `m3_jax.checkpoint`; here is what is done to one.
"""
