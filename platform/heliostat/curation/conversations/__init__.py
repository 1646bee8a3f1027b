"""Makes datasets of conversations: reads their shapes, renders them with a chat template, and packs their tokens.

Start at `pipeline`.
"""
