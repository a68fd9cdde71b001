"""What a plugin implements, and what it is given: hooks, base classes, choices, the context."""
