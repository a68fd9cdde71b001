"""The larger commands of `compress-core`."""
