"""Finds images that look alike among any number of them: groups of equal looks, pairs within a distance, and who stays."""
