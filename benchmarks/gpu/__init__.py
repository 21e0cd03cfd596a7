"""Every figure of docs/performance.md by one command; see ``python -m benchmarks.gpu --help``."""
