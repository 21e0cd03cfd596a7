"""Trains `tiny-wan`, a small real WanPipeline that draws coloured shapes in motion."""
