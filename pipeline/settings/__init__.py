"""Every setting, declared once.

A group is a frozen dataclass of settings that belong together. A command's configuration is a dataclass that
inherits the groups it takes, so that a function may ask for a group alone. Flags, `--help`, environment, TOML
files and the reference of all flags are read off the fields.
"""
