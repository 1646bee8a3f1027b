"""Finds models and datasets of the Hugging Face Hub, downloads their files, and checks them by hash.

Start at `files`. `names` reads the names that people write. `client` asks the Hub, and turns its answers into errors of one line.
"""
