"""Weight reconstruction: sets what compression left of each weight so that layers compute what they did before."""
