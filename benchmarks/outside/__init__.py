"""Models that others trained and published, run through the public face for models of one's own."""
