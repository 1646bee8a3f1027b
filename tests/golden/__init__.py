"""Loss curves that the code is held to, to the last bit; see `curves`."""
