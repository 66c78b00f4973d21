"""What a value model is worth beside a frozen policy; ``python -m studies.values --help``."""
