"""Models of practitioners, used as the users of their libraries would, under every algorithm."""
