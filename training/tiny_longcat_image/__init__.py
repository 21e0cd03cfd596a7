"""Trains `tiny-longcat-image`, the small real LongCatImagePipeline that ships with this project."""
