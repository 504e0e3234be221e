"""Every setting, declared once.

A group is a class of settings that belong together, made a frozen dataclass by `Settings`, which it inherits.
A command's configuration inherits the groups it takes, so that a function may ask for a group alone. Flags,
`--help`, environment, TOML files and the reference of all flags are read off the fields.
"""
