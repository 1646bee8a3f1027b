"""Fetches what lists of URLs name: within bounds of bytes and time, as robots.txt allows, and at each host's pace."""
