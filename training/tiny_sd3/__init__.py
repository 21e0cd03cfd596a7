"""Trains `tiny-sd3`, a small real StableDiffusion3Pipeline that draws the coloured digits of tiny-longcat-image."""
