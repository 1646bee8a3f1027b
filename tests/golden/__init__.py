"""Holds the loss curves that the code must reproduce to the last bit; see `curves`."""
