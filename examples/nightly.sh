#!/usr/bin/env bash
# One night's run of `marsinfer batch`: continues what is unfinished, answers new rows, restarts a run that crashed.
#
#   30 1 * * *  /opt/marsinfer/nightly.sh /etc/marsinfer/contracts.toml
#
# The TOML file is one for --config, with input and output; its paths are relative to its own folder. cron mails whatever
# a script prints, so this prints only what a person should know; everything else is in the night's log. The exit code is
# marsinfer's own, or 0 if last night's run is still at work. Run by the project's tests. From the environment:
#
#   NIGHTLY_MARSINFER  the command (marsinfer); where cron does not find it, its whole path
#   NIGHTLY_LOGS       folder of the logs, which are kept for 30 nights (logs, beside the TOML file)
#   NIGHTLY_TRIES      how many times in all a run that crashes is started (3)
#   NIGHTLY_PAUSE_S    seconds before it is restarted (60)
set -uo pipefail

if [ $# -ne 1 ] || [ ! -f "$1" ]; then
    echo "usage: nightly.sh SETTINGS.toml" >&2
    exit 2
fi
marsinfer=${NIGHTLY_MARSINFER:-marsinfer}
tries=${NIGHTLY_TRIES:-3}
pause_s=${NIGHTLY_PAUSE_S:-60}
folder=$(cd "$(dirname "$1")" && pwd) || exit 2
settings=$(basename "$1")
logs=${NIGHTLY_LOGS:-$folder/logs}
mkdir -p "$logs" && logs=$(cd "$logs" && pwd) || exit 8
log=$logs/${settings%.toml}-$(date +%Y-%m-%d).log
cd "$folder" || exit 2

child=
stopped=
stop() { # the first signal lets the run end in good order; it is not started again
    stopped=yes
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT HUP

run() { # sets code
    "$marsinfer" batch --config "$settings" --resume --fail-on-error --json --log-format json >>"$log" 2>&1 &
    child=$!
    if [ -n "$stopped" ]; then stop; fi # by a signal that came before the run had a number
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal has ended the waiting, not the run
        wait "$child"
        code=$?
    done
    child=
}

tell() {
    echo "marsinfer, $folder/$settings: $1"
    echo "the end of $log:"
    tail -n 5 "$log"
}

attempt=1
while true; do
    run
    case $code in
        0 | 2 | 3 | 4 | 7 | 8 | 9 | 129 | 130 | 143) break ;; # how marsinfer ends of its own accord
        126 | 127) break ;;                                   # it is not there
    esac
    if [ -n "$stopped" ] || [ "$attempt" -ge "$tries" ]; then break; fi
    sleep "$pause_s"
    if [ -n "$stopped" ]; then break; fi
    attempt=$((attempt + 1))
done

case $code in
    0) ;;
    3) tell "done, but rows failed, of this night or of earlier ones; once the cause is mended, --resume --retry-errors answers them" ;;
    4) tell "stopped, since too many rows failed; finished rows are kept; --retry-errors answers them, and a higher \
--max-errors goes on as they are" ;;
    7) code=0 ;; # told in the log
    8) tell "storage failed: is the disk full, or an input out of reach? finished rows are kept, and the next night \
goes on" ;;
    9) tell "stopped at its deadline; finished rows are kept, and the next night goes on" ;;
    129 | 130 | 143) ;; # whoever stopped it knows; the next night goes on
    2) tell "nothing was run, or nothing written: the settings, the input or the model cannot be used" ;;
    126 | 127) tell "$marsinfer cannot be run: cron knows few folders of programs, so NIGHTLY_MARSINFER gives the whole path" ;;
    *)
        if [ -z "$stopped" ]; then "$marsinfer" doctor --json --quiet >>"$log" 2>&1; fi
        tell "crashed $attempt times, the last time with exit code $code; finished rows are kept"
        ;;
esac
find "$logs" -name "${settings%.toml}-*.log" -mtime +30 -delete
exit "$code"
