"""A second device for the tests, `cuda` in a build of torch without CUDA: real numbers, a device's rules."""
