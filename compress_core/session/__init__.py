"""The compression of one model: its lifecycle, controller, scheduler and state."""
