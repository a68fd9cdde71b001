"""Commands of `compress-core` that need more than a few lines."""
