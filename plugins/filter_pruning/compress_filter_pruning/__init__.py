"""Filter pruning: whole channels go, first under masks, in the end physically."""
