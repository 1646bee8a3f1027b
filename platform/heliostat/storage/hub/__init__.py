"""Finds models and datasets of the Hugging Face Hub, downloads their files, and checks their hashes.

Start at `files`. `names` parses names of the Hub. `client` sends requests to the Hub, and turns failures into one-line errors.
"""
