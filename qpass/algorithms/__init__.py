"""How codes are chosen where rounding each weight to the nearest is not enough. One file an algorithm."""
