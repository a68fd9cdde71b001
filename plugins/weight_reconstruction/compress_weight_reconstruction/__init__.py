"""Weight reconstruction: sets the weights that compression has left so that every layer computes what it did before."""
