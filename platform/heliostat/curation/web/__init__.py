"""Fetches the URLs of lists, within limits of bytes and time, as robots.txt allows, and at each host's rate."""
