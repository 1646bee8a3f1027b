"""Simulates a second device for the tests, `cuda` in a build of torch without CUDA: it has real numbers, and a device's rules."""
