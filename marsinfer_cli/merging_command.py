"""`marsinfer merge`: outputs of shards as one."""

from __future__ import annotations

from marsinfer_cli.events import say
from marsinfer_cli.signature import takes
from pipeline.settings.console_settings import MergeSwitches
from pipeline.texts.words import counted


@takes(MergeSwitches)
def merge(switches: MergeSwitches) -> int:
    """Merge the outputs of all shards of a run, or of runs about different rows, into OUT."""
    from pipeline.interrupts import graceful_stop
    from pipeline.merging import merge_outputs

    with graceful_stop("nothing was written") as check:
        check()
        rows = merge_outputs(switches.merged, switches.merged_from, overwrite=switches.overwrite, check=check)
        say(f"{switches.merged}: {counted(rows, 'row')} of {counted(len(switches.merged_from), 'output')}")
    return 0
