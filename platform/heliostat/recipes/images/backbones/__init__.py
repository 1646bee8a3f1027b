"""Describes the families of backbones: one file per family, and `table` with all families.

A family's file says which class of diffusers the family is, which of the class's keys heliostat derives, and how its authors
initialize the weights. `pipeline` calls the classes, because an export contains a copy of that file. Imports: diffusers, and the
recipes' own helpers."""
