"""Updates parameters by rules that torch lacks: Lion, Schedule-Free, and Muon on whole matrices in ZeRO's slices."""
