"""Imported first by the command: our modules are ours, or it ends."""

from marsinfer_cli.place import refuse_other_pipeline

refuse_other_pipeline()
